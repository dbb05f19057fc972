"""Settings are values with presets, and those that cannot work are named."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.sampling.params import SamplingParams


def test_presets() -> None:
    assert SamplingParams.openai() == SamplingParams() == SamplingParams(1.0, 1.0, 0)
    rwkv = SamplingParams.rwkv(top_k=5)
    assert (rwkv.order, rwkv.temperature, rwkv.top_p, rwkv.top_k) == ("rwkv", 1.0, 0.85, 5)
    assert (rwkv.presence_penalty, rwkv.frequency_penalty, rwkv.penalty_decay) == (0.2, 0.2, 0.996)
    assert SamplingParams.rwkv(top_p=0.5).top_p == 0.5
    assert SamplingParams.greedy().temperature == 0
    assert rwkv.penalizes
    assert not SamplingParams().penalizes


def test_settings_are_values() -> None:
    biases = {5: 1, 2: -1.0}
    sampling = SamplingParams(logit_bias=biases, banned=[7, 3, 7])
    biases[9] = 1
    assert sampling.logit_bias == ((2, -1.0), (5, 1.0))
    assert sampling.banned == (3, 7)
    same = SamplingParams(logit_bias=((2, -1.0), (5, 1.0)), banned=(3, 7))
    assert same == sampling == dataclasses.replace(sampling)
    assert len({sampling, same, SamplingParams()}) == 2
    sampling.check_ids(8)
    with pytest.raises(ConfigError, match="logit_bias names id 5: the model's ids are 0 to 4"):
        sampling.check_ids(5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be a number from 0 to"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": "1"}, "temperature = '1'"),
        ({"temperature": True}, "temperature = True"),
        ({"temperature": None}, "temperature = None"),
        ({"top_p": -0.1}, "top_p = -0.1: must be a number from 0 to 1"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 2.0}, "top_k = 2.0"),
        ({"top_k": 2**31}, "top_k = 2147483648"),
        ({"top_k": True}, "top_k = True"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"min_p": 1.01}, "min_p = 1.01"),
        ({"typical_p": 0}, "typical_p = 0"),
        ({"typical_p": math.nan}, "typical_p = nan"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf"),
        ({"presence_penalty": math.nan}, "presence_penalty = nan"),
        ({"presence_penalty": 1e10}, "presence_penalty = 1"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty = -inf"),
        ({"penalty_decay": 1.001}, "penalty_decay = 1.001"),
        ({"penalty_decay": -0.1}, "penalty_decay = -0.1"),
        ({"penalize_prompt": 1}, "penalize_prompt = 1"),
        ({"order": "vllm"}, "order = 'vllm': must be one of openai, rwkv"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of id 1 is nan"),
        ({"logit_bias": {1: -math.inf}}, "logit_bias of id 1 is -inf.*`banned` rules a token out"),
        ({"logit_bias": {1: "2"}}, "logit_bias of id 1 is '2'"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names id -1"),
        ({"logit_bias": {"50256": 1.0}}, "logit_bias names id '50256'"),
        ({"logit_bias": 3}, "logit_bias = 3: must be a mapping"),
        ({"banned": [1.5]}, "banned names id 1.5"),
        ({"banned": [-1]}, "banned names id -1"),
        ({"banned": 5}, "banned = 5: must be a sequence"),
        ({"banned": "57"}, "banned = '57': must be a sequence"),
        ({"banned": [3, 4], "logit_bias": {4: 1.0}}, "banned and logit_bias both name id 4"),
    ],
)
def test_values_that_cannot_work_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**values)
