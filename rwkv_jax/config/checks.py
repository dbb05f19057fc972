"""The error of a config that cannot work, and the checks that raise it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config value that cannot work; the message names the field, the value and the remedy."""


def require(condition: bool, field: str, value: object, remedy: str) -> None:
    """Raises a ConfigError that names the field and its value, and how to mend it, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field} = {value!r}: {remedy}")


def require_positive(config: object, prefix: str, *fields: str) -> None:
    """Raises a ConfigError for the first of these fields of a section that is zero, negative or not a number."""
    for name in fields:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be greater than zero")
