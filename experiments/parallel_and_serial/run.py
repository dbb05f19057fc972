"""One model in its parallel and its serial form: does it compute the same, and what does parallelism save?

python -m experiments.parallel_and_serial.run

Each generation runs as a whole model, by every implementation of its operator, on a text at once; and as a loop in
Python that feeds one token at a time to the compiled model with its state, which is how an RNN without a parallel form
would have to read. Rows take turns; medians are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import common
from rwkv_jax.bench.random_model import random_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import with_implementation
from rwkv_jax.models.implementations import known_implementations

LOOP = "token loop"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and the text."""

    models: tuple[str, ...] = tuple(common.GENERATIONS)
    num_layers: int = 2
    width: int = 128
    head_dim: int = 64
    vocab_size: int = 256
    num_tokens: int = 512
    implementations: tuple[str, ...] = ("scan", "chunked", "associative_scan")
    repetitions: int = 5


SMALL = Sizes()
SMALLEST = Sizes(
    models=("RWKV-4",),
    width=16,
    head_dim=8,
    vocab_size=11,
    num_tokens=6,
    implementations=("scan", "chunked"),
    repetitions=1,
)


def losses(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Mean of -log p of tokens 1 to T - 1, nats."""
    log_probs = jax.nn.log_softmax(model(tokens[:, :-1]).logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))


def forms_of(
    model: LanguageModel, tokens: jax.Array, implementations: Sequence[str]
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]]:
    """Each form's forward pass, () -> (logits [1, T, V], state), and its gradients; the loop has none."""
    graphdef, params = nnx.split(model, nnx.Param)
    step = jax.jit(lambda params, token, state: nnx.merge(graphdef, params)(token, state))

    def loop() -> Any:
        state, rows = model.initial_state(1), []
        for position in range(tokens.shape[1]):
            logits, state = step(params, tokens[:, position : position + 1], state)
            rows.append(logits)
        return jnp.concatenate(rows, axis=1), state

    forms: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {LOOP: (loop, None)}
    known = known_implementations(model.config)["wkv_implementation"]
    for name in (name for name in implementations if name in known):
        named = nnx.split(with_implementation(model, name), nnx.Param)[0]
        forward = jax.jit(lambda params, named=named: tuple(nnx.merge(named, params)(tokens)))
        gradients = jax.jit(jax.grad(lambda params, named=named: losses(nnx.merge(named, params), tokens)))
        forms[name] = (lambda run=forward: run(params), lambda run=gradients: run(params))
    return forms


def difference(found: Any, expected: Any) -> float:
    """Largest absolute difference of two trees, over the expected one's largest number in that leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in jax.tree.map(np.asarray, [*pairs]))


def measure(sizes: Sizes) -> common.Results:
    """Milliseconds of each form and its differences from others, by model."""
    rows, forward, training = {}, {}, {}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, sizes.vocab_size, (1, sizes.num_tokens), np.int32))
    for name in sizes.models:
        common.progress(name)
        shape = dataclasses.asdict(sizes)
        fields = {field: shape[field] for field in ("vocab_size", "num_layers", "width", "head_dim")}
        forms = forms_of(random_model(ModelConfig(**common.GENERATIONS[name], **fields)), tokens, sizes.implementations)
        forward |= {(name, form): run for form, (run, _) in forms.items()}
        training |= {(name, form): run for form, (_, run) in forms.items() if run is not None}
        expected, expected_gradients = forms[LOOP][0](), training[name, "scan"]()
        for form, (run, gradients) in forms.items():
            rows.setdefault(name, {})[form] = {
                "difference_to_loop": difference(run(), expected),
                "gradient_difference_to_scan": gradients and difference(gradients(), expected_gradients),
            }
    for field, functions in (("forward_ms", forward), ("training_ms", training)):
        times = common.time_in_turns(functions, sizes.repetitions)
        for name, form in forward:
            found = times.get((name, form))
            rows[name][form][field] = None if found is None else 1e3 * common.median(found)
    return {"rows": rows}


def claims(results: common.Results) -> common.Claims:
    """Equality, and that no serial form is worth having."""
    rows = results["rows"].values()
    forms = [form for row in rows for form in row.values()]
    return {
        "logits and state of every form are those of the loop, to 1e-4 of the largest": all(
            form["difference_to_loop"] < 1e-4 for form in forms
        ),
        "gradients of every form are those of the scan, to 1e-3 of the largest in each array": all(
            form["gradient_difference_to_scan"] < 1e-3 for form in forms if form["gradient_difference_to_scan"]
        ),
        "the scan is at least 10 times as fast as the loop": all(
            row[LOOP]["forward_ms"] > 10 * row["scan"]["forward_ms"] for row in rows
        ),
    }


def draw(results: common.Results, path: Path) -> None:
    """Bars: forward and training time of every form."""
    figure, axes = common.new_figure(2, width=4.6)
    colors = dict(
        zip((LOOP, *results["sizes"]["implementations"]), ("#8c8c8c", "#b0453a", "#1f6f5c", "#2878b5"), strict=False)
    )
    for panel, field, title in zip(axes, ("forward_ms", "training_ms"), ("forward", "with gradients"), strict=True):
        for place, forms in enumerate(results["rows"].values()):
            shown = [(form, row[field]) for form, row in forms.items() if row[field] is not None]
            for index, (form, milliseconds) in enumerate(shown):
                x = place + (index - (len(shown) - 1) / 2) * 0.2
                panel.bar(x, milliseconds, 0.18, color=colors[form], label=form if place == 0 else None)
        panel.set(yscale="log", ylabel="ms", title=f"{results['sizes']['num_tokens']} tokens, {title}")
        panel.set_xticks(range(len(results["rows"])), results["rows"])
    handles, labels = axes[0].get_legend_handles_labels()
    axes[1].legend(handles, labels, fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
