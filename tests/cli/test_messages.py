"""Errors in the words of a command line."""

from __future__ import annotations

import pytest

from rwkv_jax.cli.messages import out_of_memory, with_flags


@pytest.mark.parametrize(
    ("message", "arguments", "told"),
    [
        ("top_p = 2.0: must lie in (0, 1]", ["--top-p", "2"], "--top-p 2.0: must lie in (0, 1]"),
        ("top_p = 2.0: must lie in (0, 1]", ["--top_p=2"], "--top_p 2.0: must lie in (0, 1]"),
        ("model.width = 5: is odd", ["--model.width", "5"], "--model.width 5: is odd"),
        ("a.pth: quantize = 'int8': is int4", ["--quantize", "int8"], "a.pth: --quantize 'int8': is int4"),
        ("json: is given", ["--json"], "--json: is given"),
        # Not a flag that was given, or no field's name at all.
        ("top_p = 2.0: must lie in (0, 1]", ["--top-k", "2"], "top_p = 2.0: must lie in (0, 1]"),
        ("top_p = 2.0: is above seed = 1", ["--seed", "1"], "top_p = 2.0: is above seed = 1"),
        ("seeds = 2.0: are several", ["--seed", "1"], "seeds = 2.0: are several"),
        ("the disk is full", ["--seed", "--", "-"], "the disk is full"),
        ("", [], ""),
    ],
)
def test_fields_are_named_as_the_flags_that_were_given(message: str, arguments: list[str], told: str) -> None:
    assert with_flags(message, arguments) == told


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED:  Out of\nmemory"), "RESOURCE_EXHAUSTED: Out of memory"),
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 3 GiB"), "Unable to allocate 3 GiB"),
    ],
    ids=str,
)
def test_memory_that_is_too_small_is_told_with_a_remedy(error: Exception, reason: str) -> None:
    message = out_of_memory(error)
    assert message is not None
    assert message.startswith(f"memory is too small ({reason}); hold the model in fewer bits with --quantize int8 ")


def test_other_errors_are_none_of_memory() -> None:
    assert out_of_memory(RuntimeError("INTERNAL: a defect")) is None
