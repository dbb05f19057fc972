"""Options of the server. Standard library only: they are the flags of `rwkv serve`."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from pathlib import Path

from rwkv_jax.checks import checker, require, require_whole

_MAX_PORT = 2**16 - 1


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How a model is served."""

    host: str = "127.0.0.1"
    """Address to listen on; the default takes connections from this machine only, 0.0.0.0 from everywhere."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    model_name: str | None = None
    """Name by which requests ask for the model; None is the name of its file or folder."""
    api_keys: Path | None = None
    """File of the keys that requests must have, one NAME:KEY or NAME:sha256:DIGEST a line; NAME is the key's tenant."""
    public_without_keys: bool = False
    """Serve without keys on an address that other machines reach, too."""
    requests_per_minute: float | None = None
    """Requests of each key in a minute; None is no limit."""
    max_concurrent: int | None = None
    """Requests of each key at once; None is no limit."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt; None is no limit."""
    max_body_bytes: int = 64 * 2**20
    """Size of a request, which may have a state in it."""
    timeout_seconds: float = 600.0
    """Seconds after which a request is ended."""
    drain_seconds: float = 30.0
    """Seconds in which running requests may end after SIGTERM or SIGINT."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser, such as https://chat.example.org; * is all."""
    access_log: Path | None = None
    """File to which a line of JSON is appended for each request; None is standard output."""
    ssl_certfile: Path | None = None
    """Certificate chain in PEM, for HTTPS."""
    ssl_keyfile: Path | None = None
    """Its private key, unless that is in the same file."""
    state_store: str | None = None
    """Where states and sessions are kept: a SQLite file, :memory:, or redis://HOST:PORT, which servers may share. None
    is a file of the model's name in ~/.local/state/rwkv-jax."""
    state_bytes: int = 4 * 2**30
    """Size of all states in a file, of which the least recently used go first; or of one state in Redis."""
    state_idle_days: float = 30.0
    """Days after which a state that nobody has used is gone."""

    adapter_folder: Path | None = None
    """Folder below which administrators may load adapters while the server runs; None lets nobody."""
    adapter_admins: tuple[str, ...] = ()
    """Names in the file of API keys whose keys may load and remove adapters."""

    def __post_init__(self) -> None:
        check = checker(self)
        check(bool(self.host), "host", "must be an address, such as 127.0.0.1")
        require_whole("port", self.port, 0, _MAX_PORT)
        is_guarded = self.api_keys is not None or self.public_without_keys
        check(
            is_guarded or self.is_loopback,
            "host",
            "other machines reach this address; give --api-keys FILE, or --public-without-keys to let everyone in",
        )
        for name in ("requests_per_minute", "timeout_seconds", "drain_seconds"):
            value = getattr(self, name)
            check(value is None or 0 < value < math.inf, name, "must be a positive number")
        require_whole("max_body_bytes", self.max_body_bytes, 1)
        for name in ("max_concurrent", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 1)
        for origin in self.cors_origins:
            require(
                origin == "*" or re.fullmatch(r"https?://[^/\s]+", origin) is not None,
                "cors_origins",
                origin,
                "must be an origin, such as https://chat.example.org, or *",
            )
        check(self.ssl_keyfile is None or self.ssl_certfile is not None, "ssl_keyfile", "needs --ssl-certfile as well")
        check(self.state_store != "", "state_store", "must be a file, :memory:, or the address of a Redis")
        require_whole("state_bytes", self.state_bytes, 1)
        check(0 < self.state_idle_days < math.inf, "state_idle_days", "must be a positive number")
        check(
            self.adapter_folder is None or (self.api_keys is not None and bool(self.adapter_admins)),
            "adapter_folder",
            "needs --api-keys, and with --adapter-admins the names of those that may load adapters from it",
        )
        check(
            self.adapter_folder is None or self.adapter_folder.expanduser().is_dir(),
            "adapter_folder",
            "there is no such folder",
        )
        check(
            not self.adapter_admins or self.adapter_folder is not None,
            "adapter_admins",
            "may load adapters from a folder; name it with --adapter-folder",
        )
        check(self.model_name is None or bool(self.model_name), "model_name", "is empty; leave it out, or name one")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
