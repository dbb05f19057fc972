"""lm-eval's own task definitions, of local files. Standard library only: lm-eval's environment imports it, too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DEFINITIONS = {
    "lambada": ("lambada/lambada_openai.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "wikitext": ("wikitext/wikitext.yaml", "test"),
    "mmlu": ("mmlu/default/_default_template_yaml", "test"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test"),
}
"""Of each task, lm-eval's own definition, and the split that is evaluated."""

METRICS = {"exact_match,strict-match": "exact_match_strict", "exact_match,flexible-extract": "exact_match_flexible"}
"""Names of lm-eval's metrics where ours are others."""


def write_tasks(folder: Path, lm_eval: Path, files: Mapping[str, Path]) -> list[str]:
    """Writes definitions, and gives the names that lm-eval is asked for: own_NAME of each file.

    MMLU becomes a group of groups, as lm-eval has it, with a task for each subject, of three at least.
    """
    for name, file in files.items():
        if name != "mmlu":
            _write_task(folder, lm_eval, name, f"own_{name}", file)
            continue
        subjects = mmlu_subjects(file)
        for subject, items in subjects.items():
            part = folder / f"{subject}.jsonl"
            part.write_text("".join(json.dumps(item) + "\n" for _, item in items))
            about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
            _write_task(
                folder, lm_eval, name, f"own_mmlu_{subject}", part, f"description: {json.dumps(about + 2 * chr(10))}"
            )
        tasks = [f"own_mmlu_{subject}" for subject in subjects]
        _write_group(folder, "own_mmlu_first", tasks[:2])
        _write_group(folder, "own_mmlu_others", tasks[2:])
        _write_group(folder, "own_mmlu", ["own_mmlu_first", "own_mmlu_others"])
    return [f"own_{name}" for name in files]


def mmlu_subjects(file: Path) -> dict[str, list[tuple[int, Any]]]:
    """Of each subject the items, with their places in the file."""
    subjects: dict[str, list[tuple[int, Any]]] = {}
    for index, item in enumerate(map(json.loads, file.read_text().splitlines())):
        subjects.setdefault(item["subject"], []).append((index, item))
    return subjects


def _write_task(folder: Path, lm_eval: Path, name: str, task: str, file: Path, *more: str) -> None:
    definition, split = DEFINITIONS[name]
    lines = [
        f"include: {lm_eval / 'tasks' / definition}",
        f"task: {task}",
        "num_fewshot: 0",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{split}: {file}}}}}",
        *(
            f"{each}_split: {split if each == split else 'null'}"
            for each in ("training", "validation", "test", "fewshot")
        ),
        *more,
    ]
    (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n")


def _write_group(folder: Path, group: str, members: Sequence[str]) -> None:
    aggregate = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    lines = [f"group: {group}", f"task: [{', '.join(members)}]", aggregate, "metadata: {version: 2}"]
    (folder / f"{group}.yaml").write_text("\n".join(lines) + "\n")
