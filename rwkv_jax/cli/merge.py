"""`rwkv merge`: merges adapters into their base."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rwkv_jax.atomic import refuse_existing
from rwkv_jax.cli.flags import License, PinFlags, Pinned, tell_of_state
from rwkv_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merge adapters into their base and write the weights, as convert does; computed in float64 and rounded once."""

    base: tyro.conf.Positional[str]
    """A file or folder of weights, a run folder, or OWNER/NAME[/FILE] on the Hugging Face hub."""
    adapters_and_target: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="ADAPTER... OUT")]]
    """Adapters (folders of Hugging Face's peft, .pth by RWKV-PEFT), and last what to write: FILE.pth, FILE.safetensors
    or a folder, which must not exist yet."""
    weights: tuple[float, ...] = ()
    """Of what each adapter changes; several add up. None given: 1 each."""
    adapter_alpha: float | None = None
    """alpha of LoRA adapters by RWKV-PEFT, whose files do not have it: as they were trained with."""
    adapter_init: Path | None = None
    """File of PiSSA's initial values; None looks beside the adapter."""
    layout: Literal["official", "transformers", "flash-linear-attention", "huggingface"] = "official"
    """Naming of the tensors: transformers reads RWKV-4, flash-linear-attention RWKV-6 and 7; huggingface is that of the
    RWKV organization's folders on the hub, RWKV-7."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """dtype to write. What adapters change is often smaller than the last digit of bfloat16, and lost there."""
    tokenizer: str | None = None
    """Tokenizer to save with the weights: world, bytes or a file; None takes the one saved with the base."""
    dequantize: bool = False
    """Merge into a base in 8 or 4 bits, with its rounding; the original weights are the better base."""
    allow_other_base: bool = False
    """Merge into a base with other numbers than the one the adapter was trained on, if the shapes are the same."""
    license: License = None
    pinned: Pinned = dataclasses.field(default_factory=PinFlags)

    def run(self) -> None:
        """Merges, one tensor at a time, and prints what was written."""
        if len(self.adapters_and_target) < 2:
            raise ConfigError("merge: needs BASE, at least one ADAPTER, and OUT")
        *sources, target = self.adapters_and_target
        refuse_existing(Path(target).expanduser(), label=target)

        from rwkv_jax.tuning.files import open_adapter
        from rwkv_jax.tuning.merge import merge_weights

        given = {"alpha": self.adapter_alpha, "init": self.adapter_init}
        adapters = [open_adapter(source, **given) for source in sources]
        model = merge_weights(
            self.pinned.find(self.base),
            adapters,
            target,
            weights=self.weights or None,
            layout=self.layout,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
            dequantize=self.dequantize,
            allow_other_base=self.allow_other_base,
            license=self.license,
        )
        merged = ", ".join(
            f"{source} ({adapter.kind}, {len(adapter.parts)} matrices"
            f"{f', {len(adapter.replaced)} tensors in full' if adapter.replaced else ''})"
            for source, adapter in zip(sources, adapters, strict=True)
        )
        print(f"{target}: {model.title} {model.num_layers} x {model.width} in {self.dtype}, with {merged}")
        for source in (self.base, *sources):
            tell_of_state(source, target)
