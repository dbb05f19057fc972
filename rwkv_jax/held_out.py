"""Held-out loss and bits per byte, with those of general-purpose compressors for comparison; answers of tasks."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rwkv_jax.data.tokens.token_file import TokenFile


class HeldOut(NamedTuple):
    """How well a model predicts held-out text."""

    loss: float
    """Mean -log p(token), nats."""
    bits_per_byte: float | None
    """Bits per byte of text: comparable between tokenizers. None where only some tokens count."""
    texts: HeldOut | None = None
    """The same of the texts, if these figures are of the chats of a mixture of both."""

    def record(self) -> dict[str, float]:
        """The figures that there are, by name; those of texts as `texts.NAME`."""
        figures = {"loss": self.loss, "bits_per_byte": self.bits_per_byte}
        own = {name: value for name, value in figures.items() if value is not None}
        texts = {} if self.texts is None else self.texts.record()
        return own | {f"texts.{name}": value for name, value in texts.items()}

    def describe(self) -> str:
        """The figures on a line."""
        if self.bits_per_byte is None:
            texts = "" if self.texts is None else f"; texts: {self.texts.describe()}"
            return f"loss {self.loss:.4f} per token that counts{texts}"
        return f"loss {self.loss:.4f}, {self.bits_per_byte:.4f} bits/byte"


class Answers(NamedTuple):
    """How well a model does a synthetic task, on rows that it was not trained on."""

    loss: float
    """Mean -log p(target) over scored positions, nats."""
    accuracy: float
    """Share of the scored positions whose target is the likeliest token."""
    whole_accuracy: float
    """Share of the rows all of whose scored positions are right."""
    chance: float
    """The accuracy without what is to be learned, as the task defines it."""
    parts: Mapping[str, Answers] = {}
    """The same at other lengths, such as `length_96`, and of the task's variants, such as `distance_32`."""

    def record(self) -> dict[str, float]:
        """The figures by name; those of parts as `PART.accuracy`."""
        own = {name: getattr(self, name) for name in ("loss", "accuracy", "whole_accuracy", "chance")}
        for part, found in self.parts.items():
            own |= {f"{part}.{name}": value for name, value in found.record().items()}
        return own

    def describe(self) -> str:
        """The figures on a line, and those of each part on one of its own."""
        lines = [
            f"loss {self.loss:.4f}, accuracy {self.accuracy:.2%} (chance {self.chance:.2%}), "
            f"whole answers {self.whole_accuracy:.2%}"
        ]
        return "\n".join([*lines, *(f"  {part}: {found.describe()}" for part, found in self.parts.items())])


class Measured(NamedTuple):
    """How well a model does on held-out pairs of replies, prompts or an application's examples."""

    loss: float
    """Mean loss of the objective."""
    metrics: Mapping[str, float]
    """Means that the objective reports, and what else is measured."""

    def record(self) -> dict[str, float]:
        """The figures, by name."""
        return {"loss": self.loss, **self.metrics}

    def describe(self) -> str:
        """The figures on a line."""
        listed = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        return f"loss {self.loss:.4f}{listed}"


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Converts nats per token to bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


def evaluate(
    eval_step: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], held_out: TokenFile | None
) -> HeldOut:
    """Mean loss over batches of held-out text.

    Args:
      eval_step: (params, batch) -> `loss`, a sum in nats, and `count`, the number of tokens.
      held_out: what the batches read; None if it is no text of which all bytes count.
    """
    # Sums stay on the device until the end, so that batches are dispatched without waiting.
    sums = [eval_step(params, batch) for batch in batches]
    total = sum(float(batch.loss) for batch in sums)
    count = sum(float(batch.count) for batch in sums)
    loss = total / count
    return HeldOut(loss, None if held_out is None else bits_per_byte(loss, held_out.bytes_per_token))


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on the same data."""
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9": len(lzma.compress(data, preset=9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}
