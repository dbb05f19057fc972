"""lm-eval itself with our model on local files, against `evaluate` on the same files: `make test-peers`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax import ModelConfig, save_pretrained
from rwkv_jax.bench.random_model import random_model
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.evaluation.engine_scorer import options_for
from rwkv_jax.evaluation.run import evaluate
from rwkv_jax.evaluation.statistics import Estimate
from rwkv_jax.inference import Engine
from rwkv_jax.weights.pretrained import from_pretrained
from tests.evaluation.golden_items import INVENTED, read
from tests.evaluation.lm_eval_oracle import renamed
from tests.evaluation.lm_eval_tasks import DEFINITIONS, mmlu_subjects, write_tasks

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"

FILES = {name: INVENTED[name] for name in DEFINITIONS}


def run_lm_eval(folder: Path, weights: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """lm-eval's metrics and, for each task, the answers to each document's requests."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    where = [str(PEER), "-c", "import lm_eval; print(lm_eval.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    tasks = write_tasks(folder, Path(found).parent, FILES)
    command = [str(PEER), "-m", "rwkv_jax.evaluation.lm_eval_model", "--model", "rwkv_jax", "--log_samples"]
    command += ["--model_args", f"pretrained={weights},tokenizer=bytes", "--include_path", str(folder)]
    command += ["--tasks", ",".join(tasks), "--output_path", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    answers = {name: answers_in(folder / "out", f"own_{name}") for name in FILES if name != "mmlu"}
    by_item = {}
    for subject, items in mmlu_subjects(FILES["mmlu"]).items():
        own = answers_in(folder / "out", f"own_mmlu_{subject}")
        by_item |= {i: responses for (i, _), responses in zip(items, own, strict=True)}
    answers["mmlu"] = [responses for _, responses in sorted(by_item.items())]
    return json.loads(results.read_text()), answers


def answers_in(folder: Path, task: str) -> list[Any]:
    """The responses to each document's requests."""
    (path,) = folder.rglob(f"samples_{task}_2*.jsonl")
    samples = {sample["doc_id"]: sample for sample in map(json.loads, path.read_text().splitlines())}
    return [sample["resps"] for _, sample in sorted(samples.items())]


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
        report = evaluate(engine, FILES, output=tmp_path / "ours", num_fewshot=0)
        assert theirs["config"]["rwkv_jax"]["hash"] == engine.identity.model
    for task in report.tasks:
        name = task.task.name
        assert_estimates(task.summary.metrics, theirs["results"][f"own_{name}"])
        for subject, metrics in task.summary.groups.items():
            assert_estimates(metrics, theirs["results"][f"own_{name}_{subject}"])
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


def assert_estimates(metrics: Mapping[str, Estimate], theirs: Mapping[str, Any]) -> None:
    """Values and standard errors are lm-eval's.

    Few passages of a random model differ by nats: bootstraps of their perplexity agree in their size only. Golden
    numbers (test_golden.py) hold it closer.
    """
    wanted = renamed(theirs)
    for name, estimate in metrics.items():
        error = wanted[f"{name}_stderr"]
        assert estimate.value == pytest.approx(wanted[name], rel=1e-5), name
        if error is not None:
            assert estimate.stderr == pytest.approx(error, rel=0.5 if name == "perplexity" else 1e-5, abs=1e-12), name


def test_the_golden_numbers_are_what_lm_eval_makes(tmp_path: Path) -> None:
    command = [str(PEER), "-m", "tests.evaluation.lm_eval_oracle", str(tmp_path / "made.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "made.json").read_text()) == read("expected_invented.json")
