"""What lm-eval 0.4.13 makes of invented answers to invented items; run by a Python that has it.

    PEER_PYTHON -m tests.evaluation.lm_eval_oracle OUTPUT.json

wrote `tests/golden/eval/expected_invented.json`: of each task the score of each item, the metrics and their standard
errors, and those of MMLU's subjects. The model is one that reads its answers from `invented_answers.json`; prompts,
filters, metrics and aggregation are lm-eval's own, and so are the 100,000 resamples of a perplexity's standard error.
"""

# It runs in an environment of its own, with lm-eval, which the project's does not have.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.evaluation.lm_eval_tasks import METRICS, mmlu_subjects, write_tasks

FOLDER = Path(__file__).parents[1] / "golden" / "eval"
ITEMS = {
    "lambada": "lambada.jsonl",
    "piqa": "piqa.jsonl",
    "hellaswag": "hellaswag.jsonl",
    "winogrande": "winogrande.jsonl",
    "arc_easy": "arc.jsonl",
    "wikitext": "wikitext.jsonl",
    "mmlu": "mmlu_metrics.jsonl",
    "gsm8k": "gsm8k_metrics.jsonl",
}
"""The files that answers were invented for."""


def renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's numbers with our names, NAME and NAME_stderr; None where it has no standard error."""
    found = {}
    for key, value in metrics.items():
        metric, comma, chosen = key.partition(",")
        name = METRICS.get(f"{metric.removesuffix('_stderr')},{chosen}", metric.removesuffix("_stderr"))
        if comma:
            found[name + "_stderr" * metric.endswith("_stderr")] = None if value == "N/A" else value
    return found


def evaluate(folder: Path) -> dict[str, Any]:
    """Results of all tasks."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    files = {name: FOLDER / file for name, file in ITEMS.items()}
    answers = json.loads((FOLDER / "invented_answers.json").read_text())
    subjects = mmlu_subjects(files["mmlu"])
    by_task = {f"own_{name}": own for name, own in answers.items()}
    by_task |= {f"own_mmlu_{name}": [answers["mmlu"][i] for i, _ in items] for name, items in subjects.items()}

    class Invented(LM):
        def _answers(self, requests: list[Any], *_: Any, **__: Any) -> list[Any]:
            return [by_task[each.task_name][each.doc_id][each.idx] for each in requests]

        loglikelihood = loglikelihood_rolling = generate_until = _answers

    names = write_tasks(folder, Path(str(lm_eval.__file__)).parent, files)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(Invented(), tasks=names, task_manager=manager, bootstrap_iters=100_000)

    def scores(task: str) -> dict[str, list[Any]]:
        own: dict[str, list[Any]] = {}
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                name = METRICS.get(f"{metric},{sample['filter']}", str(metric))
                own.setdefault(name, []).append(sample[metric])
        return own

    results = {}
    for name in ITEMS:
        if name != "mmlu":
            results[name] = {"scores": scores(f"own_{name}"), "metrics": renamed(found["results"][f"own_{name}"])}
            continue
        acc: list[Any] = [None] * len(answers[name])
        for subject, items in subjects.items():
            for (i, _), score in zip(items, scores(f"own_mmlu_{subject}")["acc"], strict=True):
                acc[i] = score
        groups = {subject: renamed(found["results"][f"own_mmlu_{subject}"]) for subject in subjects}
        metrics = renamed(found["groups"]["own_mmlu"])
        results[name] = {"scores": {"acc": acc}, "metrics": metrics, "groups": groups}
    return results


def main(output: str) -> None:
    """Write the results."""
    os.environ |= {"DISABLE_MULTIPROC": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        results = evaluate(Path(folder))
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items()]
    Path(output).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
