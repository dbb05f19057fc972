"""Held-out loss and bits per byte, with those of general-purpose compressors for comparison."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rwkv_jax.data.tokens.token_file import TokenFile


class HeldOut(NamedTuple):
    """How well a model predicts held-out text."""

    loss: float
    """Mean -log p(token), nats."""
    bits_per_byte: float
    """Bits per byte of text: comparable between tokenizers."""


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Converts nats per token to bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


def evaluate(eval_step: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], held_out: TokenFile) -> HeldOut:
    """Mean loss over batches of held-out text.

    Args:
      eval_step: (params, batch) -> `loss`, a sum in nats, and `count`, the number of tokens.
    """
    # Sums stay on the device until the end, so that batches are dispatched without waiting.
    sums = [eval_step(params, batch) for batch in batches]
    total = sum(float(batch.loss) for batch in sums)
    count = sum(float(batch.count) for batch in sums)
    loss = total / count
    return HeldOut(loss, bits_per_byte(loss, held_out.bytes_per_token))


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on the same data."""
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9": len(lzma.compress(data, preset=9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}
