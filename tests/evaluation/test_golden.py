"""Prompts, scores and metrics are those of lm-eval 0.4.13, to the last digit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from rwkv_jax.evaluation.requests import Rolling
from rwkv_jax.evaluation.statistics import Estimate
from rwkv_jax.evaluation.tasks import TASKS
from rwkv_jax.evaluation.tasks.base import make_cases
from tests.evaluation.golden_items import FILES, FOLDER, INVENTED, SCORED, golden_cases, read

EXPECTED = read("expected_v7_s0.json")
FEW_SHOT = read("few_shot.json")
ANSWERS = read("invented_answers.json")
OF_ANSWERS = read("expected_invented.json")


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


def assert_estimates(metrics: Mapping[str, Estimate], wanted: Mapping[str, float | None]) -> None:
    """Values, and standard errors where lm-eval has them; of a bootstrap by as many draws as ours has."""
    assert {f"{name}{end}" for name in metrics for end in ("", "_stderr")} == set(wanted)
    for name, estimate in metrics.items():
        error = wanted[f"{name}_stderr"]
        assert estimate.value == pytest.approx(wanted[name], rel=1e-12)
        assert estimate.stderr is not None
        if error is not None:
            assert estimate.stderr == pytest.approx(error, rel=0.1 if name == "perplexity" else 1e-12)


@pytest.mark.parametrize("name", INVENTED)
def test_scores_and_standard_errors_of_invented_answers(name: str) -> None:
    task, wanted = TASKS[name], OF_ANSWERS[name]
    cases = make_cases(task, INVENTED[name], num_fewshot=0)
    scores = [task.score(case.item, results) for case, results in zip(cases, ANSWERS[name], strict=True)]
    for metric, values in wanted["scores"].items():
        own = [score[metric] for score in scores]
        assert own == [tuple(value) if isinstance(value, list) else value for value in values]
    assert set(wanted["scores"]) == set(task.metrics)
    summary = task.aggregate(scores, [case.group for case in cases])
    assert_estimates(summary.metrics, wanted["metrics"])
    assert set(summary.groups) == set(wanted.get("groups", ()))
    for group, metrics in summary.groups.items():
        assert_estimates(metrics, wanted["groups"][group])


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
