"""Which way to fine-tune learns what: facts, a style, a format; and what is forgotten meanwhile?

    python -m experiments.fine_tuning_methods.run

A model that the experiment trains answers prompts of made-up text (`text.py`). One set of prompts and answers then
plants all three at once: numbers of new names (facts), capitals where it wrote small letters (style), JSON where it
wrote a list (format). Every method takes the same number of steps, with the learning rate of three whose training loss
was the least at the end. Answers are written greedily. Style and format are asked for with scenes that were not trained
on, facts also in a form in which they were not told.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from numpy.typing import NDArray

from experiments import common
from experiments.fine_tuning_methods.text import (
    Asked,
    Counts,
    Text,
    exact_share,
    make_text,
    structured_share,
    upper_share,
)
from experiments.fine_tuning_methods.training import Learner, rows_of
from rwkv_jax import save_pretrained
from rwkv_jax.chat.formats import RAVEN
from rwkv_jax.config import ModelConfig, TuningConfig
from rwkv_jax.data.chat.rows import PackedRows
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.models import abstract_model
from rwkv_jax.models.initial_state import begin_texts, state_shapes
from rwkv_jax.models.tuned import INITIAL_STATE, is_trained, kept_shapes, merged_params


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune, and the learning rates of which one is chosen."""

    tuning: TuningConfig
    rates: tuple[float, ...]


LORA_RATES, OTHER_RATES = (6e-3, 2e-2, 6e-2), (2e-3, 6e-3, 2e-2)
METHODS: dict[str, Method] = {
    "all weights": Method(TuningConfig(), (2e-3, 6e-3, 2e-2)),
    "LoRA, rank 16": Method(TuningConfig(adapter="lora", rank=16), LORA_RATES),
    "LoRA, rank 2": Method(TuningConfig(adapter="lora", rank=2), LORA_RATES),
    "state": Method(TuningConfig(state=True, state_rate=1.0), (1.0, 3.0, 10.0)),
    "norms and vectors": Method(TuningConfig(also=("ln", "time")), (1.5e-2, 5e-2, 0.15)),
    "DoRA, rank 16": Method(TuningConfig(adapter="dora", rank=16), LORA_RATES),
    "PiSSA, rank 16": Method(TuningConfig(adapter="pissa", rank=16), OTHER_RATES),
    "MiSS, rank 32": Method(TuningConfig(adapter="miss", rank=32), OTHER_RATES),
    "Bat, rank 32": Method(TuningConfig(adapter="bat", rank=32), OTHER_RATES),
}
BASE = "base"
COUNTS = Counts()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of model, text and runs."""

    methods: tuple[str, ...] = tuple(METHODS)
    num_rates: int = 3
    counts: Counts = COUNTS
    num_layers: int = 2
    width: int = 64
    head_dim: int = 32
    length: int = 64
    """T of a row, which is one prompt with its reply."""
    batch_size: int = 16
    base_steps: int = 1000
    base_rate: float = 4e-3
    num_steps: int = 240


SMALL = Sizes()
SMALLEST = Sizes(("state",), 2, Counts(2, 2, 2, 2, 1, 1), 2, 16, 8, 64, 2, 2, num_steps=2)


Answer = Callable[[Any, Any], tuple[dict[str, list[str]], float]]
"""Of parameters and the state in which texts begin, or None: replies by name of the questions, and nats a byte of the
right replies to those of kinds that nothing was planted in."""


def answerer(model: ModelConfig, questions: Mapping[str, list[Asked]], length: int) -> Answer:
    """Asks everything at once, in one program for all parameters."""
    graphdef, tokenizer = abstract_model(model)[0], load_tokenizer("bytes", model.vocab_size)
    flat = [each for group in questions.values() for each in group] + questions["own"]
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(RAVEN.first_turn(each.prompt))] for each in flat]
    forced = len(flat) - len(questions["own"])  # behind them the right reply is read, and its losses are wanted
    tokens = np.full((len(flat), length + 1), tokenizer.end_of_text, np.int32)
    given, counts = np.zeros(len(flat), np.int32), np.zeros((len(flat), length), bool)
    for row, (prompt, each) in enumerate(zip(prompts, flat, strict=True)):
        ids = [*prompt, *tokenizer.encode(f" {each.reply}")]
        tokens[row, : len(ids)] = ids
        given[row] = len(prompt) if row < forced else length + 1
        counts[row, len(prompt) - 1 : len(ids)] = row >= forced

    @jax.jit
    def read(params: Any, initial: Any) -> tuple[jax.Array, jax.Array]:
        language_model = nnx.merge(graphdef, params)
        rows, first = jnp.asarray(tokens), jnp.asarray(given)

        def step(carry: tuple[Any, jax.Array], at: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            state, last = carry
            logits, state = language_model(jnp.where(at < first, rows[:, at], last)[:, None], state)
            logits = logits[:, 0]
            nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, at + 1][:, None], axis=1)[:, 0]
            likeliest = logits.argmax(axis=-1).astype(jnp.int32)
            return (state, likeliest), (likeliest, nats)

        start = (begin_texts(initial, language_model, len(tokens)), jnp.zeros(len(tokens), jnp.int32))
        return lax.scan(step, start, jnp.arange(length))[1]

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state_shapes(model))

    def answer(params: Any, initial: Any) -> tuple[dict[str, list[str]], float]:
        initial = empty if initial is None else initial
        written, nats = (np.asarray(x).T for x in read(params, initial))
        replies = iter(reply_of(written[row, given[row] - 1 :], tokenizer) for row in range(forced))
        by_name = {name: [next(replies) for _ in group] for name, group in questions.items()}
        return by_name, float(nats[counts].mean())

    return answer


def reply_of(tokens: NDArray, tokenizer: Any) -> str:
    """Text up to the end-of-text token, without the space with which replies begin."""
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    ids = tokens[: ends[0]] if len(ends) else tokens
    return tokenizer.decode(ids.tolist()).removeprefix(" ")


def measured(answer: Answer, questions: Mapping[str, list[Asked]], params: Any, initial: Any) -> dict[str, float]:
    """Shares from 0 to 1, and nats a byte."""
    replies, nats = answer(params, initial)
    exact = {name: exact_share(replies[name], group) for name, group in questions.items()}
    return {
        "facts": exact["facts"],
        "other_form": exact["other_form"],
        "style": upper_share(replies["style"]),
        "style_exact": exact["style"],
        "format": structured_share(replies["format"]),
        "format_exact": exact["format"],
        "own_facts": exact["own_facts"],
        "own_exact": exact["own"],
        "own_nats": nats,
    }


def num_trained(tuning: TuningConfig, model: ModelConfig) -> int:
    """Numbers that a method trains."""
    if not tuning.is_partial:
        return model.num_parameters()
    shapes = jax.tree.leaves_with_path(kept_shapes(tuning, model))
    paths = [(tuple(str(getattr(key, "key", key)) for key in path), leaf) for path, leaf in shapes]
    return sum(math.prod(leaf.shape) for path, leaf in paths if is_trained(tuning, model, path))


def last_loss(losses: list[float]) -> float:
    """The mean of the last quarter of the steps."""
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last)


def tuned(
    name: str, sizes: Sizes, learner: Learner, before: Any, rows: PackedRows, text: Text, answer: Answer
) -> dict[str, Any]:
    """A method at each of its rates, from the same parameters: the chosen rate's figures, and those of all."""
    method, model = METHODS[name], learner.model
    by_rate: dict[float, dict[str, float]] = {}
    for rate in method.rates[: sizes.num_rates]:
        run = learner.run(before, rows, sizes.num_steps, rate)
        params = merged_params(run.params, method.tuning, model)
        initial = run.params[INITIAL_STATE] if method.tuning.state else None
        by_rate[rate] = {
            "training_loss": last_loss(run.losses),
            **measured(answer, text.questions, params, initial),
        }
        common.progress(f"{name} at {rate:g}: {common.rounded(by_rate[rate])}")
    losses = {rate: found["training_loss"] for rate, found in by_rate.items()}
    chosen = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
    return {
        "numbers": num_trained(method.tuning, model),
        "rate": chosen,
        **by_rate[chosen],
        "by_rate": {f"{rate:g}": found for rate, found in by_rate.items()},
    }


def measure(sizes: Sizes) -> common.Results:
    """The base's figures, and every method's."""
    text = make_text(sizes.counts)
    model = ModelConfig(
        generation="7",
        vocab_size=common.NUM_BYTES,
        num_layers=sizes.num_layers,
        width=sizes.width,
        head_dim=sizes.head_dim,
    )
    tokenizer = load_tokenizer("bytes", model.vocab_size)
    own, planted = (rows_of(each, tokenizer, sizes.batch_size, sizes.length) for each in (text.base, text.tuning))
    answer = answerer(model, text.questions, sizes.length)
    first = Learner(model, TuningConfig(), own, None)
    run = first.run(None, own, sizes.base_steps, sizes.base_rate)
    rows: dict[str, Any] = {BASE: measured(answer, text.questions, run.params, None)}
    common.progress(f"base, {last_loss(run.losses):.4f} nats a byte: {common.rounded(rows[BASE])}")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.safetensors"
        save_pretrained(common.model_of(model, run.params), base)
        for name in sizes.methods:
            tuning = METHODS[name].tuning
            learner = Learner(model, tuning, planted, str(base)) if tuning.is_partial else first
            before = learner.first_params() if tuning.is_partial else run.params
            rows[name] = tuned(name, sizes, learner, before, planted, text, answer)
    return {"parameters": model.num_parameters(), "planted_rows": len(text.tuning), "rows": rows}


def claims(results: common.Results) -> common.Claims:
    """States learn the style and not the facts. The first three were set before the results, the others after them."""
    rows = results["rows"]
    state, full, small, wide = (rows[name] for name in ("state", "all weights", "LoRA, rank 2", "LoRA, rank 16"))
    learned = [row for name, row in rows.items() if name != BASE]
    return {
        "every method writes style and format, 90% and more": all(
            min(row["style"], row["format"]) >= 0.9 for row in learned
        ),
        "all weights and LoRA of rank 16 know 90% of the facts": min(full["facts"], wide["facts"]) >= 0.9,
        "the state knows less than half of the facts that LoRA of rank 2 knows, with about as many numbers": (
            state["facts"] < 0.5 * small["facts"]
        ),
        "every method writes 95% of the letters as capitals": all(row["style"] >= 0.95 for row in learned),
        "the state knows less than a tenth of the facts": state["facts"] < 0.1,
        "no method still knows a tenth of the base's own facts": all(row["own_facts"] < 0.1 for row in learned),
    }


SHOWN = (
    ("facts", "facts", "#b0453a"),
    ("other_form", "facts in another form", "#e0a39c"),
    ("style", "style", "#2878b5"),
    ("format", "format", "#8ecae6"),
    ("own_facts", "the base's own facts", "#9a9a9a"),
)


def draw(results: common.Results, path: Path) -> None:
    """What each method learned, in percent."""
    figure, (axes,) = common.new_figure(1, width=9, height=3.6)
    names = list(results["rows"])
    width = 0.8 / len(SHOWN)
    for at, (key, label, color) in enumerate(SHOWN):
        places = np.arange(len(names)) + width * (at - (len(SHOWN) - 1) / 2)
        axes.bar(places, [100 * results["rows"][name][key] for name in names], width, color=color, label=label)
    labels = [name.replace(", ", "\n").replace(" and ", "\nand ") for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=8)
    axes.set(ylabel="of unseen prompts; facts: of all, %", ylim=(0, 102))
    axes.legend(fontsize=8, ncols=len(SHOWN), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
