"""Prompts, scores and metrics are those of lm-eval 0.4.13, to the last digit."""

from __future__ import annotations

from typing import Any

import pytest

from rwkv_jax.evaluation.requests import Rolling
from rwkv_jax.evaluation.tasks import TASKS
from rwkv_jax.evaluation.tasks.base import make_cases
from tests.evaluation.golden_items import FILES, FOLDER, SCORED, golden_cases, read

EXPECTED = read("expected_v7_s0.json")
FEW_SHOT = read("few_shot.json")


def as_golden(request: Any) -> list[Any]:
    if isinstance(request, Rolling):
        return [request.text]
    return [request.context, list(request.until) if hasattr(request, "until") else request.continuation]


@pytest.mark.parametrize("variant", ["nobos", "bos0"])
@pytest.mark.parametrize("name", SCORED)
def test_requests_scores_and_metrics(name: str, variant: str) -> None:
    task, cases = golden_cases(name)
    samples = EXPECTED[variant]["samples"][SCORED[name]]
    scores = []
    for case, sample in zip(cases, samples, strict=True):
        wanted = [
            [each[key] for key in ("context", "continuation", "text") if key in each] for each in sample["requests"]
        ]
        assert [as_golden(request) for request in case.requests] == wanted
        results = [
            each["loglikelihood"] if "text" in each else (each["loglikelihood"], each["is_greedy"])
            for each in sample["requests"]
        ]
        score = task.score(case.item, results)
        assert score == {
            name: tuple(sample[name]) if isinstance(sample[name], list) else sample[name] for name in score
        }
        scores.append(score)
    metrics = task.aggregate(scores, [case.group for case in cases]).metrics
    wanted = EXPECTED[variant]["metrics"][SCORED[name]]
    assert {f"{name},none": estimate.value for name, estimate in metrics.items()} == pytest.approx(
        {name: value for name, value in wanted.items() if name != "sample_len"}, rel=1e-12
    )
    assert {estimate.count for estimate in metrics.values()} == {wanted["sample_len"]}


@pytest.mark.parametrize("key", FEW_SHOT)
def test_prompts_with_examples(key: str) -> None:
    name, num, seed = key.split("/")
    task = TASKS[name]
    if name == "mmlu":
        examples = FOLDER / "mmlu_dev.jsonl" if int(num) else None
        cases = make_cases(task, FILES[name], num_fewshot=int(num), examples=examples)
        cases = [case for case in cases if case.group == seed]
    else:
        examples = FILES[name] if int(num) else None
        cases = make_cases(task, FILES[name], num_fewshot=int(num), examples=examples, seed=int(seed))
    assert [[as_golden(request) for request in case.requests] for case in cases[:4]] == FEW_SHOT[key]
