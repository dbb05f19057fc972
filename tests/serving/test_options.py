"""Options of the server: what cannot work, or would be open to everybody unasked, is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.serving.options import ServeOptions

KEYS = Path("keys")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_keys(host: str) -> None:
    assert ServeOptions(host=host).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "example.org", "127.0.0.1.example.org", "2130706433"])
def test_other_machines_need_keys_unless_told_otherwise(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-keys FILE, or --public-without-keys"):
        ServeOptions(host=host)
    assert not ServeOptions(host=host, api_keys=KEYS).is_loopback
    assert not ServeOptions(host=host, public_without_keys=True).is_loopback


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_seconds": 0.0},
        {"timeout_seconds": float("nan")},
        {"timeout_seconds": float("inf")},
        {"drain_seconds": -1.0},
        {"requests_per_minute": 0.0},
        {"max_concurrent": 0},
        {"max_prompt_tokens": 0},
        {"max_body_bytes": 0},
        {"cors_origins": ("example.org",)},
        {"cors_origins": ("https://example.org/",)},
        {"ssl_keyfile": KEYS},
    ],
    ids=str,
)
def test_values_that_cannot_work_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name} = "):
        ServeOptions(**wrong)


def test_values_that_work() -> None:
    options = ServeOptions(cors_origins=("*", "https://a.example:8443"), ssl_certfile=KEYS, ssl_keyfile=KEYS)
    dataclasses.replace(options, requests_per_minute=0.5, max_concurrent=1, max_prompt_tokens=1)
