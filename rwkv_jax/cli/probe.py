"""`rwkv probe`: what a model cannot do, and where it stops."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rwkv_jax.checks import ConfigError, checker
from rwkv_jax.cli.flags import WeightsFlags

if TYPE_CHECKING:
    from rwkv_jax.inference.engine.engine import Engine

STORAGES: tuple[tuple[str, Literal["bfloat16", "int8", "int4"] | None], ...] = (
    ("as given", None),
    ("bfloat16", "bfloat16"),
    ("int8", "int8"),
    ("int4", "int4"),
)


@dataclasses.dataclass(frozen=True)
class ProbeCommand:
    """Probe a model's limits: long contexts, recall, bias, floods, privacy, compression (docs/evaluation.md)."""

    weights: Annotated[WeightsFlags, tyro.conf.arg(name="")]
    probes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ("recall", "bias", "robustness")
    """positions, passkey, needle, recall, bias, rarity, robustness, membership, prompt_leak, compressed."""
    texts: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[FILE...]")] = ()
    """Files of text that the model was not trained on: for positions, rarity, membership and compressed."""
    training_texts: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[FILE...]")] = ()
    """Files of text that it was trained on: for rarity and membership."""
    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Tokens of texts with a needle."""
    num_positions: int = 2**17
    """How far losses by position go, if the texts do."""
    samples: int = 16
    """Texts for each cell of a grid; four times as many for each number of facts."""
    nums_facts: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Facts in a text, for recall."""
    num_tokens: int = 100_000
    """Tokens of a flood."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for probes.json, probes.md and a picture for each probe that has one; None only prints."""
    seed: int = 0
    """Of everything that is drawn."""

    def run(self) -> None:
        """Runs the probes and prints their tables."""
        check = checker(self)
        check(bool(self.probes), "probes", "name one at least")
        check(bool(self.lengths) and min(self.lengths) >= 1, "lengths", "must be positive, and there must be one")
        check(self.samples >= 2, "samples", "must be at least 2")
        check(self.num_positions >= 1, "num_positions", "must be positive")
        check(self.num_tokens >= 8, "num_tokens", "must be at least 8")
        check(self.seed >= 0, "seed", "must not be negative")
        check(
            "compressed" not in self.probes or self.weights.quantize is None,
            "weights.quantize",
            "the probe compressed loads the weights in every form itself; leave --quantize out",
        )
        texts, training_texts = (_read(field, getattr(self, field)) for field in ("texts", "training_texts"))

        from rwkv_jax.evaluation.engine_scorer import options_for
        from rwkv_jax.evaluation.limits.run import Inputs, check_probes, probe
        from rwkv_jax.evaluation.report import describe_model, machine, versions
        from rwkv_jax.inference.engine.engine import Engine

        given = {name for name, value in (("texts", texts), ("training_texts", training_texts)) if value}
        check_probes(self.probes, given | {"storages"})

        def load(quantize: Literal["bfloat16", "int8", "int4"] | None) -> Engine:
            model, tokenizer = dataclasses.replace(self.weights, quantize=quantize).load()
            return Engine(model, tokenizer, options_for(model, tune="never"))

        storages: tuple[tuple[str, Callable[[], Engine]], ...] = tuple(
            (name, functools.partial(load, quantize)) for name, quantize in STORAGES
        )
        with load(self.weights.quantize) as engine:
            probe(
                Inputs(
                    engine,
                    texts,
                    training_texts,
                    storages if "compressed" in self.probes else (),
                    lengths=self.lengths,
                    num_positions=self.num_positions,
                    samples=self.samples,
                    nums_facts=self.nums_facts,
                    num_tokens=self.num_tokens,
                    seed=self.seed,
                ),
                self.probes,
                output=self.output,
                about={"model": describe_model(engine), "versions": versions(), "machine": machine()},
                report=lambda finding: print(finding.markdown(), flush=True),
            )
        if self.output is not None:
            print(f"written to {self.output}", file=sys.stderr)


def _read(field: str, paths: tuple[Path, ...]) -> tuple[str, ...]:
    """Texts of files. Raises ConfigError if one cannot be read, is empty or is not UTF-8."""
    texts = []
    for path in paths:
        try:
            text = path.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{field} = {str(path)!r}: cannot be read ({error}); name a file of UTF-8 text"
            ) from error
        if not text:
            raise ConfigError(f"{field} = {str(path)!r}: is empty; leave it out")
        texts.append(text)
    return tuple(texts)
