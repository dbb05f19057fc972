"""What tests of commands call, and what they get."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Printed(NamedTuple):
    """What a command has written."""

    out: str
    err: str


Command = Callable[..., Printed]
"""(*arguments, stdin="") -> what `rwkv ARGUMENTS` has written."""
