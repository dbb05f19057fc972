"""What a reply to `34+57=` is worth: functions of the prompt's record and the reply's text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def formatted(record: Mapping[str, Any], reply: str) -> bool:
    """Whether the reply is a number in brackets, and nothing else."""
    del record
    return re.fullmatch(r"\[\d+\]", reply) is not None


def right(record: Mapping[str, Any], reply: str) -> bool:
    """Whether it is the sum, in brackets or not."""
    return reply.strip("[]") == str(record["sum"])


def success(record: Mapping[str, Any], reply: str) -> bool:
    """Both."""
    return formatted(record, reply) and right(record, reply)
