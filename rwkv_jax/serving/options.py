"""Options of the server. Standard library only: they are the flags of `rwkv serve`."""

from __future__ import annotations

import dataclasses

from rwkv_jax.checks import checker, require_whole

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

    def __post_init__(self) -> None:
        check = checker(self)
        check(bool(self.host), "host", "must be an address, such as 127.0.0.1")
        require_whole("port", self.port, 0, _MAX_PORT)
        check(self.model_name is None or bool(self.model_name), "model_name", "is empty; leave it out, or name one")
