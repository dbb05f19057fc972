"""The engine finds what lm-eval found with the official package: every log-probability, and so the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from typing_extensions import override

from rwkv_jax import from_pretrained
from rwkv_jax.data.tokenizers import SavedTokenizer, Tokenizer
from rwkv_jax.evaluation.encoding import Pair
from rwkv_jax.evaluation.engine_scorer import EngineScorer, options_for
from rwkv_jax.evaluation.requests import answer
from rwkv_jax.inference.engine.engine import Engine
from tests.evaluation.golden_items import MODEL, SCORED, golden_cases, read
from tests.programs import compiled_quickly

EXPECTED = read("expected_v7_s0.json")
TOLERANCE: dict[str, Any] = {"abs": 1e-4, "rel": 1e-6}
"""Of sums over up to 300 tokens in float32, which reach -2000."""


class Bytes(Tokenizer):
    """Bytes are ids, as in the golden requests; the model has some ids more."""

    def __init__(self, vocab_size: int) -> None:
        table = [bytes([i]) if i < 256 else b"?" for i in range(vocab_size)]
        super().__init__(table, 0, SavedTokenizer("bytes", b"bytes"))

    @override
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def engine(programs_on_disk: None) -> Iterator[Engine]:
    model = from_pretrained(MODEL, dtype="float32")
    with compiled_quickly(), Engine(model, Bytes(model.config.vocab_size), options_for(model)) as engine:
        yield engine


def plain(results: Sequence[Any]) -> tuple[list[float], list[bool]]:
    """Log-probabilities, and of continuations whether they are greedy."""
    logprobs = [result if isinstance(result, float) else result.logprob for result in results]
    return logprobs, [result.is_greedy for result in results if not isinstance(result, float)]


@pytest.mark.parametrize("variant", ["nobos", "bos0"])
def test_every_request_and_every_metric(engine: Engine, variant: str) -> None:
    golden = EXPECTED[variant]
    scorer = EngineScorer(engine, begin=variant == "bos0", window=golden["rolling_max_length"])
    tasks = {name: golden_cases(name) for name in SCORED}
    results = iter(answer(scorer, [ask for _, cases in tasks.values() for case in cases for ask in case.requests]))
    for name, (task, cases) in tasks.items():
        scores = []
        for case, sample in zip(cases, golden["samples"][SCORED[name]], strict=True):
            own = [next(results) for _ in case.requests]
            logprobs, greedy = plain(own)
            assert logprobs == pytest.approx([each["loglikelihood"] for each in sample["requests"]], **TOLERANCE)
            assert greedy == [each["is_greedy"] for each in sample["requests"] if "is_greedy" in each]
            scores.append(task.score(case.item, own))
        metrics = task.aggregate(scores, [case.group for case in cases]).metrics
        wanted = golden["metrics"][SCORED[name]]
        for metric, estimate in metrics.items():
            exact = metric in ("acc", "acc_norm")
            expected = wanted[f"{metric},none"]
            assert estimate.value == (expected if exact else pytest.approx(expected, rel=1e-4)), (name, metric)


def test_greedy_continuations(engine: Engine) -> None:
    golden = read("greedy_v7_s0.json")
    pairs = [Pair(tuple(each["context_ids"]), tuple(each["continuation_ids"])) for each in golden]
    logprobs, greedy = plain(EngineScorer(engine).score_ids(pairs))
    assert logprobs == pytest.approx([each["loglikelihood"] for each in golden], **TOLERANCE)
    assert greedy == [each["is_greedy"] for each in golden]
    assert 0 < sum(greedy) < len(greedy)
