"""lm-eval's `local-completions` against the server: whether it finds what `Engine.score` says, to 1e-4.

    python benchmarks/serve_lm_eval.py --lm-eval-python PATH

PATH is the interpreter of an environment with lm-eval (pip install "lm-eval[api]==0.4.13"). The task is multiple choice
over sentences of this file, so nothing is downloaded; the model has random weights and reads bytes. lm-eval tokenizes
by the server (`tokenizer_backend=remote`). Exit status 1 if a log-probability is off, or whether a choice is greedy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rwkv_jax.bench.random_model import random_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from serve_cost import served

TOLERANCE = 1e-4
NUM_QUESTIONS, NUM_CHOICES = 20, 3
VOCAB_SIZE = 256

TASK = """\
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


def is_letter(token: int) -> bool:
    """Whether a byte is a printable character of ASCII, but no space."""
    return 0x20 < token < 0x7F


def questions(engine: Engine) -> list[dict[str, Any]]:
    """Questions of words of this file; where the model goes on with letters, the first choice is what it says."""
    draws, words = random.Random(0), (__doc__ or "").split()
    found = []
    for _ in range(NUM_QUESTIONS):
        text = " ".join(draws.choices(words, k=draws.randint(1, 40)))
        choices = [" " + " ".join(draws.choices(words, k=draws.randint(1, 5))) for _ in range(NUM_CHOICES)]
        ids = engine.generate(engine.tokenizer.encode(text), max_tokens=8, sampling="greedy", stop_ids=()).ids
        greedy = bytes(itertools.takewhile(is_letter, ids)).decode()
        found.append({"question": text, "choices": [greedy or choices[0], *choices[1:]], "answer": 0})
    return found


def by_lm_eval(python: str, port: int, docs: list[dict[str, Any]], scratch: Path) -> list[list[tuple[float, bool]]]:
    """For each question log-probability and greediness of each choice."""
    (scratch / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (scratch / "tiny.yaml").write_text(TASK.format(data=scratch / "data.jsonl"))
    url = f"http://127.0.0.1:{port}/v1/completions"
    model = f"model=random,base_url={url},tokenizer_backend=remote,num_concurrent=4,max_retries=1,max_length=4096"
    command = [python, "-m", "lm_eval", "--model", "local-completions", "--model_args", model, "--tasks", "tiny"]
    command += ["--include_path", str(scratch), "--output_path", str(scratch / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(scratch / "hub")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, cwd=scratch, check=False)
    if done.returncode:
        raise RuntimeError(f"lm-eval ended with status {done.returncode}: {done.stderr[-3000:]}")
    (path,) = (scratch / "out").rglob("samples_tiny_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [[_pair(*response) for response in sample["filtered_resps"]] for sample in samples]


def _pair(logprob: Any, is_greedy: Any) -> tuple[float, bool]:
    """lm-eval writes them as text."""
    return float(logprob), str(is_greedy) == "True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval-python", required=True)
    arguments = parser.parse_args()
    config = ModelConfig(vocab_size=VOCAB_SIZE, num_layers=2, width=64)
    options = EngineOptions(num_slots=8, prefill_length=64, short_prefill_length=16)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(random_model(config), ByteTokenizer(VOCAB_SIZE), options) as engine,
    ):
        docs = questions(engine)
        with served(engine) as port:
            found = by_lm_eval(arguments.lm_eval_python, port, docs, Path(folder))
        encode = engine.tokenizer.encode
        error, num_greedy, wrong = 0.0, 0, 0
        for doc, answers in zip(docs, found, strict=True):
            contexts = [encode(doc["question"])] * NUM_CHOICES
            scores = engine.score(contexts, [encode(choice) for choice in doc["choices"]])
            for score, (logprob, is_greedy) in zip(scores, answers, strict=True):
                error = max(error, abs(score.logprob - logprob))
                num_greedy += score.is_greedy
                wrong += score.is_greedy != is_greedy
    print(
        f"{NUM_QUESTIONS * NUM_CHOICES} choices, {num_greedy} of them greedy: log-probabilities differ by {error:.1e}"
    )
    print(f"at most from Engine.score; {wrong} differ in whether they are greedy")
    sys.exit(not (error < TOLERANCE and wrong == 0 and num_greedy > 0))


if __name__ == "__main__":
    main()
