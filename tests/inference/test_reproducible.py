"""What the same seed promises: the same draws always, and with `batch_invariant` the same bits in any company."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine.options import EngineOptions
from rwkv_jax.inference.engine.requests import Completion
from rwkv_jax.inference.sampling.params import SamplingParams
from tests.inference.models import CONFIGS, GREEDY, IDS, quick_engine, random_model

SAMPLED: dict[str, Any] = {"max_tokens": 12, "sampling": SamplingParams.rwkv(temperature=1.5), "stop_ids": ()}


def numbers(completion: Completion) -> tuple[Any, ...]:
    """All that a text's computation has left behind, with every bit."""
    return completion.text, completion.ids, completion.logprobs, completion.top_logprobs


@pytest.mark.parametrize("generation", ["4", "7"])
def test_batch_invariant_texts_have_the_same_bits_alone_and_among_others(generation: str) -> None:
    engine = quick_engine(random_model(CONFIGS[generation]), batch_invariant=True)
    draws = np.random.default_rng(0)
    prompts = [draws.integers(1, 256, length).tolist() for length in (1, 3, 7, 16, 40, 5, 70)]
    together = engine.generate(prompts, seed=list(range(7)), top_logprobs=2, **SAMPLED)
    for seed, (prompt, expected) in enumerate(zip(prompts, together, strict=True)):
        alone = engine.generate(prompt, seed=seed, top_logprobs=2, **SAMPLED)
        assert numbers(alone) == numbers(expected)
    order = draws.permutation(7).tolist()
    again = engine.generate([prompts[i] for i in order], seed=order, top_logprobs=2, **SAMPLED)
    assert [numbers(each) for each in again] == [numbers(together[i]) for i in order]


def test_batch_invariant_engines_have_one_batch_size_and_no_prefix_cache() -> None:
    assert EngineOptions(num_slots=6, batch_invariant=True).sizes == (6,)
    assert quick_engine(random_model(CONFIGS["7"]), batch_invariant=True).prefix_cache is None
    with pytest.raises(ConfigError, match=r"batch_sizes = .*: with batch_invariant all slots are decoded at once"):
        EngineOptions(num_slots=6, batch_sizes=(1, 6), batch_invariant=True)
    with pytest.raises(ConfigError, match="batch_invariant = 1: must be True or False"):
        EngineOptions(batch_invariant=1)  # pyright: ignore[reportArgumentType]


def test_presets_are_taken_by_name() -> None:
    engine = quick_engine(random_model(CONFIGS["7"]))
    for name, sampling in (("greedy", GREEDY), ("openai", SamplingParams.openai()), ("rwkv", SamplingParams.rwkv())):
        named: Any = name
        expected = engine.generate([IDS, (1, 2)], max_tokens=5, seed=3, sampling=[sampling, GREEDY])
        assert engine.generate([IDS, (1, 2)], max_tokens=5, seed=3, sampling=[named, "greedy"]) == expected
        assert engine.generate(IDS, max_tokens=5, seed=3, sampling=named).ids == expected[0].ids
    wrongs: list[Any] = ["best", ["best"]]
    for wrong in wrongs:
        with pytest.raises(
            ConfigError, match="sampling = 'best': must be a SamplingParams, or one of greedy, openai, rwkv"
        ):
            engine.generate(IDS, sampling=wrong)


def test_x64_changes_no_text() -> None:
    texts = []
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            engine = quick_engine(random_model(CONFIGS["7"]))
            texts.append(numbers(engine.generate(IDS, seed=5, **SAMPLED)))
    assert texts[0] == texts[1]


def test_an_engine_is_clean_under_strict_promotion() -> None:
    """No dtype and no rank is promoted silently, prompts, draws, penalties, guidance and states included."""
    engine_options: dict[str, Any] = {"num_slots": 2}
    expected = quick_engine(random_model(CONFIGS["7"]), **engine_options).generate(IDS, seed=5, **SAMPLED)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        engine = quick_engine(random_model(CONFIGS["7"]), **engine_options)
        assert numbers(engine.generate(IDS, seed=5, **SAMPLED)) == numbers(expected)
        typical = SamplingParams(typical_p=0.9, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
        engine.generate(
            [IDS, (1, 2)], max_tokens=3, sampling=typical, top_logprobs=2, guidance_scale=2.0, negative_prompt="x"
        )
        session = engine.session()
        session.append("Hello")
        with session.stream(" world", max_tokens=9, sampling=GREEDY) as stream:
            next(stream)
        assert session.num_tokens == len("Hello world") + 2
