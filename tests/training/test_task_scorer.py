"""A run's own scorer: the numbers of lm-eval on a random model, and those of texts read one by one.

As a program this file prints what a mesh of eight fake devices gives.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import ConfigError, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.evaluation.encoding import Pair, encode_pair, rolling_windows
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, Rolling, answer
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.parallel.mesh import MeshShape, mesh_from_shape
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.training.functions import TrainFunctions, make_train_functions
from rwkv_jax.training.sample import Sampler
from rwkv_jax.training.task_scorer import TaskScorer, lay_out
from rwkv_jax.weights.pretrained import from_pretrained
from tests.evaluation.golden_items import MODEL, SCORED, read
from tests.fake_devices import run_on_fake_devices
from tests.models.parameters import SMALL, random_like
from tests.programs import compiled_quickly

EXPECTED = read("expected_v7_s0.json")
TOKENIZER = ByteTokenizer(256)
BOUND = 1e-4
"""Of a log-probability in float32, where a second implementation in float64 differed by 2e-5."""


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
    with compiled_quickly():
        yield


class Scored:
    """Scores by a model of a file, as a run of that model would."""

    def __init__(self) -> None:
        model = from_pretrained(MODEL, dtype="float32")
        config = TrainConfig(model=model.config, training=StepConfig(batch_size=8, sequence_length=64))
        functions = make_train_functions(config)
        sampler: Any = None  # nothing is generated
        self.scorer = TaskScorer(functions, config.model, config.training, TOKENIZER, sampler)
        self.params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def score(self, pairs: list[Pair]) -> list[Any]:
        return self.scorer.score(self.params, pairs)


@pytest.fixture(scope="module")
def scored() -> Scored:
    return Scored()


@pytest.mark.parametrize(("variant", "begin"), [("nobos", False), ("bos0", True)])
def test_log_probabilities_are_those_of_lm_eval_over_the_official_package(
    scored: Scored, variant: str, begin: bool
) -> None:
    samples = EXPECTED[variant]["samples"]
    requests = [each for name in SCORED for sample in samples[SCORED[name]] for each in sample["requests"]]
    asked = [each for each in requests if "text" not in each]
    pairs = [encode_pair(TOKENIZER, each["context"], each["continuation"], begin=begin) for each in asked]
    for result, wanted in zip(scored.score(pairs), asked, strict=True):
        assert result.logprob == pytest.approx(wanted["loglikelihood"], abs=BOUND)
        assert result.is_greedy == wanted["is_greedy"]
    window = EXPECTED[variant]["rolling_max_length"]
    for page in (each for each in requests if "text" in each):
        results = scored.score(rolling_windows(TOKENIZER.encode(page["text"]), (0,), window))
        assert sum(result.logprob for result in results) == pytest.approx(page["loglikelihood"], abs=BOUND, rel=1e-7)


def test_greedy_continuations_are_told_from_others(scored: Scored) -> None:
    asked = read("greedy_v7_s0.json")
    pairs = [Pair(tuple(each["context_ids"]), tuple(each["continuation_ids"])) for each in asked]
    results = scored.score(pairs)
    assert [result.is_greedy for result in results] == [each["is_greedy"] for each in asked]
    assert {True, False} == {result.is_greedy for result in results}
    for result, each in zip(results, asked, strict=True):
        assert result.logprob == pytest.approx(each["loglikelihood"], abs=BOUND)


CONFIGS = {
    "7": dataclasses.replace(SMALL["7"], dtype="float32"),
    "transformer": ModelConfig(
        architecture="transformer", vocab_size=41, num_layers=2, width=32, head_dim=8, ffn_width=48, context_length=16
    ),
}
STEP = StepConfig(batch_size=4, sequence_length=8)


def draw_pairs(longest: int) -> list[Pair]:
    """Texts of many lengths, short and long."""
    generator = np.random.default_rng(5)
    pairs = []
    for size in [2, 3, *generator.integers(2, longest + 1, 12), longest]:
        ids = tuple(int(token) for token in generator.integers(0, 41, size))
        split = int(generator.integers(1, size))
        pairs.append(Pair(ids[:split], ids[split:]))
    return pairs


@functools.cache
def functions_of(config: ModelConfig, mesh: Any = None) -> tuple[TrainFunctions, Any]:
    """A run's functions and random parameters."""
    functions = make_train_functions(TrainConfig(model=config, training=STEP), mesh)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_like(functions.params, 3))
    return functions, params


@functools.cache
def scorer_of(config: ModelConfig, functions: TrainFunctions) -> TaskScorer:
    return TaskScorer(
        functions, config, STEP, TOKENIZER, Sampler(functions.run_model, config, FewTokens(config.vocab_size))
    )


class FewTokens(ByteTokenizer):
    """As many ids as a model has."""

    def __init__(self, count: int) -> None:
        super().__init__(256)
        self.vocab_size = count
        self._table = self._table[:count]


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_laid_end_to_end_score_as_each_by_itself(name: str) -> None:
    config = CONFIGS[name]
    functions, params = functions_of(config)
    pairs = draw_pairs(longest=40 if name == "7" else 9)
    forward = jax.jit(lambda tokens: functions.run_model.model(params)(tokens)[0][0])
    for (context, continuation), result in zip(pairs, scorer_of(config, functions).score(params, pairs), strict=True):
        ids = np.zeros(48 if name == "7" else 16, np.int32)  # one length for the compiler's sake
        size = len(context) + len(continuation)
        ids[:size] = context + continuation
        logits = np.asarray(forward(ids[None]), np.float64)[len(context) - 1 : size - 1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert result.logprob == pytest.approx(sum(logprobs[range(len(continuation)), continuation]), abs=BOUND)
        assert result.is_greedy == (list(continuation) == list(np.argmax(logits, axis=-1)))


def test_streams_are_full_and_lose_nothing() -> None:
    pairs = draw_pairs(40)
    streams = lay_out(pairs, 4, 8)
    used = sum(len(a) + len(b) - 1 for a, b in pairs)
    assert streams.tokens.shape[0] == 4
    assert streams.tokens.size <= used + 4 * (8 + 40)
    assert streams.begins.sum() == len(pairs)
    for (_, continuation), (row, begin, end) in zip(pairs, streams.stretches, strict=True):
        assert tuple(streams.targets[row, begin:end]) == continuation
    whole = lay_out(draw_pairs(9), 4, 8, crosses=False)
    for (context, continuation), (row, begin, end) in zip(draw_pairs(9), whole.stretches, strict=True):
        start = end - len(context) - len(continuation) + 1
        assert start // 8 == (end - 1) // 8
        assert tuple(whole.targets[row, begin:end]) == continuation


def test_requests_are_encoded_once_and_answers_end_at_stops() -> None:
    config = CONFIGS["7"]
    functions, params = functions_of(config)
    scorer = scorer_of(config, functions)
    requests = [Loglikelihood("  \n", "\x05\x06"), Rolling("\x07\x08" * 20), Generate("\x01", (), 3)]
    scorer.prepare(requests)
    heard: dict[int, Any] = {}
    results = answer(scorer.of(params), requests, heard.__setitem__)
    assert heard == dict(enumerate(results))
    text = results[2]
    assert len(text) <= 3
    longer = Generate("\x01", tuple(text[1:2]), 3)
    assert scorer.of(params).generate([longer]) == [text[:1] if text[1:2] not in text[:1] else ""]
    (pair,) = scorer.tokens(requests[1])
    assert results[1] == scorer.score(params, [pair])[0].logprob


def test_a_prompt_longer_than_the_cache_loses_its_beginning_and_is_answered() -> None:
    config = CONFIGS["transformer"]
    functions, params = functions_of(config)
    sampler = Sampler(functions.run_model, config, FewTokens(config.vocab_size))
    scorer, greedy = TaskScorer(functions, config, STEP, TOKENIZER, sampler), SamplingParams(temperature=0.0)
    prompt = tuple(int(token) for token in np.random.default_rng(2).integers(1, 41, 40))
    for max_tokens, kept in ((4, 11), (256, 1)):
        expected = sampler.text(params, prompt[-kept:], max_tokens, greedy, 0)
        assert expected
        requests = [Generate(context, (), max_tokens) for context in (prompt, TOKENIZER.decode(prompt))]
        scorer.prepare(requests)
        assert scorer.of(params).generate(requests) == [expected, expected]


def test_cut_prompts_are_counted() -> None:
    """T = 8 and a context of 16: nine tokens are read in a batch, the last of them only as a target."""
    ids = tuple(range(1, 21))
    requests = [
        Loglikelihood(ids[:6], ids[6:8]),  # with the end of text, T + 1 tokens
        Loglikelihood(ids[:6], ids[6:9]),
        Rolling(ids),
        Generate(ids[:11], (), 4),
        Generate(ids[:12], (), 4),
    ]
    for name, expected in (("transformer", [False, True, False, False, True]), ("7", [False] * 5)):
        config = CONFIGS[name]
        scorer = scorer_of(config, functions_of(config)[0])
        assert [scorer.is_truncated(request) for request in requests] == expected
        scorer.prepare(requests)
        assert [len(scorer._prompts[request]) for request in requests[3:]] == ([11, 11] if name != "7" else [11, 12])


def test_what_cannot_be_encoded_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> list[int]:
        raise ConfigError(text)

    config = CONFIGS["7"]
    scorer = scorer_of(config, functions_of(config)[0])
    monkeypatch.setattr(TOKENIZER, "encode", refuse)
    with pytest.raises(ConfigError, match="a prompt"):
        scorer.prepare([Generate("a prompt", ())])


@pytest.mark.long
def test_a_mesh_scores_what_one_device_scores() -> None:
    found = run_on_fake_devices(8, "tests.training.test_task_scorer")
    assert found["logprobs"] < BOUND
    assert found["greedy is the same"]


def main() -> None:
    config, pairs = dataclasses.replace(CONFIGS["7"], vocab_size=42), draw_pairs(40)  # which tensor = 2 divides
    functions, params = functions_of(config)
    expected = scorer_of(config, functions).score(params, pairs)
    mesh = mesh_from_shape(MeshShape(data=2, tensor=2, sequence=2), jax.devices())
    functions, _ = functions_of(config, mesh)
    placed = jax.device_put(params, shardings(mesh, functions.sharded.param_specs))
    results = scorer_of(config, functions).score(placed, pairs)
    pairs_of_results = list(zip(expected, results, strict=True))
    found = {
        "logprobs": max(abs(a.logprob - b.logprob) for a, b in pairs_of_results),
        "greedy is the same": all(a.is_greedy == b.is_greedy for a, b in pairs_of_results),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
