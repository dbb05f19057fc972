"""An engine whose prefill takes another implementation than its decoding."""

from __future__ import annotations

from typing import Any

import pytest
from jax import Array

from rwkv_jax.inference import engine
from rwkv_kernels import OPERATORS, dispatch
from tests.inference.models import CONFIGS, GREEDY, LONG_IDS, quick_engine, random_model


def test_prompts_are_prefilled_by_what_was_measured_and_nothing_is_decoded_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the text of an engine that has measured nothing."""
    steps: set[int] = set()
    scan = OPERATORS["wkv7"].implementations["scan"]

    def spy(r: Array, *inputs: Any, **options: Any) -> Any:
        steps.add(r.shape[1])
        return scan.run(r, *inputs, **options)

    measured = dispatch.Implementation(spy, dispatch.anything)
    monkeypatch.setitem(OPERATORS["wkv7"].implementations, "associative_scan", measured)  # pyright: ignore[reportArgumentType]
    model = random_model(CONFIGS["7"])
    plain = quick_engine(model).generate(LONG_IDS, max_tokens=3, sampling=GREEDY)
    assert not steps
    monkeypatch.setattr(engine, "measured_prefill", lambda *_: "associative_scan")
    found = quick_engine(model).generate(LONG_IDS, max_tokens=3, sampling=GREEDY)
    assert steps == {16, 4}
    assert found.ids == plain.ids
    assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
