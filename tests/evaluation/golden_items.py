"""What lm-eval 0.4.13 made of invented items: see tests/golden/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rwkv_jax.evaluation.tasks import TASKS
from rwkv_jax.evaluation.tasks.base import Case, Task, make_cases
from tests.evaluation.lm_eval_oracle import ITEMS
from tests.golden import GOLDEN_DIR

FOLDER = GOLDEN_DIR / "eval"
MODEL = FOLDER / "base_v7_s0.safetensors"

FILES = {name: FOLDER / f"{name}.jsonl" for name in ("lambada", "piqa", "hellaswag", "winogrande", "wikitext", "gsm8k")}
FILES |= {"arc_easy": FOLDER / "arc.jsonl", "mmlu": FOLDER / "mmlu_test.jsonl"}
SCORED = {name: f"own_{name.removesuffix('_easy')}" for name in FILES if name not in ("gsm8k", "mmlu")}
"""Tasks of which `expected` has results, and their names there."""

INVENTED = {name: FOLDER / file for name, file in ITEMS.items()}
"""Files that `invented_answers.json` has answers to."""


def read(name: str) -> Any:
    """A JSON file."""
    return json.loads((FOLDER / name).read_text())


def golden_cases(name: str, folder: Path | None = None) -> tuple[Task[Any], list[Case[Any]]]:
    """A task and its cases without examples; of another folder with the same files, if given."""
    file = FILES[name] if folder is None else folder / FILES[name].name
    return TASKS[name], make_cases(TASKS[name], file, num_fewshot=0)
