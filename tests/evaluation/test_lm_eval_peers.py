"""lm-eval itself with our model on local files, against `evaluate` on the same files: `make test-peers`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax import ModelConfig, save_pretrained
from rwkv_jax.bench.random_model import random_model
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.evaluation.engine_scorer import options_for
from rwkv_jax.evaluation.run import evaluate
from rwkv_jax.inference import Engine
from rwkv_jax.weights.pretrained import from_pretrained
from tests.evaluation.golden_items import FILES

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"

DEFINITIONS = {
    "lambada": ("lambada/lambada_openai.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "wikitext": ("wikitext/wikitext.yaml", "test"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test"),
}
"""Of each task, lm-eval's own definition, and the split that is evaluated."""

METRICS = {"exact_match,strict-match": "exact_match_strict", "exact_match,flexible-extract": "exact_match_flexible"}
"""Names of lm-eval's where ours are others."""


def write_task(folder: Path, lm_eval: Path, name: str) -> None:
    """lm-eval's definition, of a local file."""
    definition, split = DEFINITIONS[name]
    lines = [
        f"include: {lm_eval / 'tasks' / definition}",
        f"task: own_{name}",
        "num_fewshot: 0",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{split}: {FILES[name]}}}}}",
        *(
            f"{each}_split: {split if each == split else 'null'}"
            for each in ("training", "validation", "test", "fewshot")
        ),
    ]
    (folder / f"own_{name}.yaml").write_text("\n".join(lines) + "\n")


def run_lm_eval(folder: Path, weights: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """lm-eval's metrics and, for each task, the answers to each document's requests."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    where = [str(PEER), "-c", "import lm_eval; print(lm_eval.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    for name in DEFINITIONS:
        write_task(folder, Path(found).parent, name)
    command = [str(PEER), "-m", "rwkv_jax.evaluation.lm_eval_model", "--model", "rwkv_jax", "--log_samples"]
    command += ["--model_args", f"pretrained={weights},tokenizer=bytes", "--include_path", str(folder)]
    command += ["--tasks", ",".join(f"own_{name}" for name in DEFINITIONS), "--output_path", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    answers = {}
    for name in DEFINITIONS:
        (path,) = (folder / "out").rglob(f"samples_own_{name}_*.jsonl")
        samples = {sample["doc_id"]: sample for sample in map(json.loads, path.read_text().splitlines())}
        answers[name] = [sample["resps"] for _, sample in sorted(samples.items())]
    return json.loads(results.read_text()), answers


def plain(response: Any) -> tuple[Any, ...]:
    """An answer of lm-eval's samples file, which writes numbers as text, or of our journal."""
    while isinstance(response, list) and len(response) == 1:
        (response,) = response
    parts = response if isinstance(response, list) else [response]
    return tuple(str(part) == "True" if str(part) in ("True", "False") else part for part in parts)


def test_lm_eval_with_our_model_finds_what_evaluate_finds(tmp_path: Path) -> None:
    assert PEER.is_file(), "make test-peers sets up the environment that this needs"
    weights = tmp_path / "model.safetensors"
    save_pretrained(random_model(ModelConfig(vocab_size=257, num_layers=2, width=64)), weights)
    theirs, their_answers = run_lm_eval(tmp_path, weights)
    model = from_pretrained(weights)
    with Engine(model, ByteTokenizer(257), options_for(model)) as engine:
        report = evaluate(engine, {name: FILES[name] for name in DEFINITIONS}, output=tmp_path / "ours", num_fewshot=0)
        assert theirs["config"]["rwkv_jax"]["hash"] == engine.identity.model
    for task in report.tasks:
        name = task.task.name
        wanted = {
            METRICS.get(key, key.removesuffix(",none")): value
            for key, value in theirs["results"][f"own_{name}"].items()
        }
        for metric, estimate in task.summary.metrics.items():
            assert estimate.value == pytest.approx(wanted[metric], rel=1e-5), (name, metric)
        lines = (tmp_path / "ours" / "journal" / f"{name}.jsonl").read_text().splitlines()[1:]
        items = {item["item"]: item["results"] for item in map(json.loads, lines)}
        assert sorted(items) == list(range(len(their_answers[name])))
        for index, answers in enumerate(their_answers[name]):
            for mine, yours in zip(items[index], answers, strict=True):
                ours, lm_evals = plain(mine), plain(yours)
                if name == "gsm8k":
                    assert ours == lm_evals
                else:
                    assert float(ours[0]) == pytest.approx(float(lm_evals[0]), abs=1e-4, rel=1e-6)
                    assert ours[1:] == lm_evals[1:]
