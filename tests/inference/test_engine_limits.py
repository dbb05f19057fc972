"""An engine of fewer tokens than can be reported with each, and the best of texts of which some say nothing."""

from __future__ import annotations

import dataclasses

import pytest

from rwkv_jax.bench.random_model import NumberTokenizer
from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.sampling.params import SamplingParams
from tests.inference.models import CONFIGS, OPTIONS, random_model
from tests.programs import compiled_quickly

SMALL = dataclasses.replace(CONFIGS["7"], vocab_size=16)


@pytest.fixture(scope="module")
def engine() -> Engine:
    with compiled_quickly():
        return Engine(random_model(SMALL), NumberTokenizer(SMALL.vocab_size), EngineOptions(**OPTIONS))


@pytest.mark.parametrize("top_logprobs", [3, 16])
def test_likeliest_tokens_of_a_small_vocabulary(engine: Engine, top_logprobs: int) -> None:
    found = engine.generate([1, 2], top_logprobs=top_logprobs, max_tokens=6, stop_ids=())
    assert len(found.top_logprobs) == 6
    for token, value, top in zip(found.ids, found.logprobs, found.top_logprobs, strict=True):
        assert len({likely for likely, _ in top}) == top_logprobs
        assert [x for _, x in top] == sorted((x for _, x in top), reverse=True)
        assert dict(top).get(token, value) == pytest.approx(value, abs=1e-5)


def test_more_likeliest_tokens_than_there_are_end_no_text_of_others(engine: Engine) -> None:
    with engine.stream([1, 2], max_tokens=9, stop_ids=()) as chunks:
        next(chunks)
        with pytest.raises(ConfigError, match=r"^top_logprobs = 17: must be a whole number, from 0 to 16$"):
            engine.generate([1, 2], top_logprobs=17)
        assert len(list(chunks)) == 8


def test_the_best_of_several_says_something_if_any_does(engine: Engine) -> None:
    sampling = SamplingParams(logit_bias={0: 1.5})
    single = [engine.generate([1, 2], max_tokens=5, sampling=sampling, seed=seed) for seed in range(8)]
    assert any(not one.ids for one in single)
    best = engine.generate([1, 2], best_of=8, max_tokens=5, sampling=sampling, seed=0)
    spoken = [one for one in single if one.ids]
    assert best.ids == max(spoken, key=lambda one: one.mean_logprob).ids
    never = engine.generate([1, 2], best_of=3, max_tokens=5, sampling=SamplingParams(logit_bias={0: 1e9}))
    assert (never.text, never.ids, never.finish_reason) == ("", (), "stop")
