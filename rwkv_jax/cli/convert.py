"""`rwkv convert`: weights from one format to another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write weights anew in another format; reads official .pth, safetensors, transformers, fla and training runs."""

    source: tyro.conf.Positional[str]
    """A file or folder of weights, a run folder, or OWNER/NAME[/FILE] on the Hugging Face hub."""
    target: tyro.conf.Positional[Path]
    """FILE.pth, FILE.safetensors, or a folder, which gets model.safetensors and the tokenizer; must not exist yet."""
    layout: Literal["official", "transformers", "flash-linear-attention"] = "official"
    """Whose names the tensors get: transformers reads RWKV-4, flash-linear-attention RWKV-6 and 7."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """To which tensors are rounded; None leaves every bit as it is."""
    tokenizer: str | None = None
    """To write beside the weights: world, bytes or a file; None takes the one beside the source."""

    def run(self) -> None:
        """Converts tensor by tensor and says what was written."""
        from rwkv_jax.weights.pretrained import convert

        model = convert(self.source, self.target, layout=self.layout, dtype=self.dtype, tokenizer=self.tokenizer)
        print(
            f"{self.target}: {model.architecture} {model.num_layers} x {model.width}, "
            f"{model.num_parameters() / 1e6:.1f}M parameters, vocabulary {model.vocab_size}, {self.layout} names"
        )
