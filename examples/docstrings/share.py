"""How many functions a model begins with a docstring.

    python -m examples.docstrings.share runs/python_stdlib runs/dpo_python_stdlib

Each model is given the first lines of the same functions of the standard library, which have no docstring there
(another one that begins with the same line may have one), and writes on at temperature 0.8 with top-p 0.9.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from examples.docstrings.pairs import FOLDER, evenly
from rwkv_jax import Engine, SamplingParams, from_pretrained, load_tokenizer
from rwkv_jax.cli.program_cache import keep_programs

NUM_PROMPTS = 400
MAX_TOKENS = 12


def begins_with_docstring(reply: str) -> bool:
    """Whether the first thing after the header is a string in three quotes."""
    return reply.lstrip().lstrip("rR").startswith(('"""', "'''"))


def share(run: str, prompts: list[str]) -> float:
    """Of replies of a model that begin with a docstring."""
    model = from_pretrained(run)
    with Engine(model, load_tokenizer(run, model.config.vocab_size)) as engine:
        sampling = SamplingParams(temperature=0.8, top_p=0.9)
        replies = engine.generate(prompts, max_tokens=MAX_TOKENS, sampling=sampling, seed=0)
    return sum(begins_with_docstring(reply.text) for reply in replies) / len(replies)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or other weights with their tokenizer beside them")
    runs = parser.parse_args().runs
    keep_programs()
    lines = (FOLDER / "undocumented.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [record["prompt"] for record in evenly([json.loads(line) for line in lines], NUM_PROMPTS)]
    for run in runs:
        print(f"{share(run, prompts):6.1%} of {len(prompts)} functions begin with a docstring: {Path(run)}", flush=True)


if __name__ == "__main__":
    main()
