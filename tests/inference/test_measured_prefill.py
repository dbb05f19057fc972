"""An engine whose prefill takes another implementation than its decoding."""

from __future__ import annotations

from typing import Any

import pytest
from jax import Array

from rwkv_jax.inference.engine import assembly, programs
from rwkv_kernels import OPERATORS, dispatch
from tests.inference.models import CONFIGS, GREEDY, LONG_IDS, quick_engine, random_model


def test_long_pieces_of_prompts_are_prefilled_by_what_was_measured_for_them_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the text of an engine that has measured nothing, and of one that may not take it."""
    steps: set[int] = set()
    scan = OPERATORS["wkv7"].implementations["scan"]

    def spy(r: Array, *inputs: Any, **options: Any) -> Any:
        steps.add(r.shape[1])
        return scan.run(r, *inputs, **options)

    measured = dispatch.Implementation(spy, dispatch.anything)
    monkeypatch.setitem(OPERATORS["wkv7"].implementations, "associative_scan", measured)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(assembly, "measured_prefill", lambda *_: "associative_scan")
    model = random_model(CONFIGS["7"])
    plain = quick_engine(model, fresh=True).generate(LONG_IDS, max_tokens=3, sampling=GREEDY)
    assert not steps  # all pieces are shorter than what was measured
    monkeypatch.setattr(programs, "PREFILL_STEPS", 16)
    assert quick_engine(model, fresh=True, tune="never").generate(LONG_IDS, max_tokens=3, sampling=GREEDY) == plain
    assert not steps
    found = quick_engine(model, fresh=True).generate(LONG_IDS, max_tokens=3, sampling=GREEDY)
    assert steps == {16}  # and not pieces of 4, nor single tokens
    assert found.ids == plain.ids
    assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
