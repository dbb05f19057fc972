"""Error messages of the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence


def with_flags(message: str, arguments: Sequence[str]) -> str:
    """Replaces field names in an error message by flags: `--top-p 2.0` for `top_p = 2.0`.

    Only flags that were given are named: other values come from a file or a default.

    Args:
      message: starts with a field, or a location and a field: `PLACE: field = value: reason`.
      arguments: the command line's.
    """
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--") and len(argument) > 2}
    flags = {flag[2:].replace("-", "_"): flag for flag in given}
    for field in re.finditer(r"(?:^|(?<=: ))(?P<name>[\w.]+)(?P<sign> = |(?=:))", message):
        if flag := flags.get(field["name"]):
            space = " " if field["sign"] else ""
            return f"{message[: field.start()]}{flag}{space}{message[field.end() :]}"
    return message


def out_of_memory(error: BaseException) -> str | None:
    """The message for an out-of-memory error of a device or host; None for other errors."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
        return None
    return (
        f"memory is too small ({text or 'MemoryError'}); hold the model in fewer bits with --quantize int8 or int4, "
        "ask for fewer texts at once, end other programs that use the device, or take a smaller model"
    )
