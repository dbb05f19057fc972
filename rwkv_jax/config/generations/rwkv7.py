"""RWKV-7 "Goose" (arXiv 2503.14456): low-rank maps of decay, in-context learning rate, value residual and gate."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from rwkv_jax.config.generations.base import OFFICIAL_OPTIMIZER, MatrixStateSpec, Recipe, ResolvedSizes, Shapes, size_of

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


def _ranks(decay: int, iclr: int, value: int, gate: int) -> dict[str, Any]:
    return {"decay_rank": decay, "iclr_rank": iclr, "value_rank": value, "gate_rank": gate}


class RWKV7Spec(MatrixStateSpec):
    """RWKV-7."""

    name = "7"
    model_class = "rwkv_jax.models.rwkv7:RWKV7"
    own_fields = (
        "decay_rank",
        "iclr_rank",
        "value_rank",
        "gate_rank",
        "unused_value_residual",
        "negative_eigenvalues",
        "output_implementation",
        "step_implementation",
    )
    fields_beside_tensors = ("negative_eigenvalues",)
    operator = "wkv7"
    has_matrix_state = True
    # A released 0.1B was worse after 100 steps of 4 x 256 tokens than before, where 3e-4 helped (rwkv-metal 0.4.0). The
    # official rates of RWKV-6 were 1 to 0.01.
    harmful_state_rate = 3e-3
    heads_tensor = "att.r_k"
    state_flops = 9  # plus the rank-one removal
    tensors = frozenset({"att.r_k", "att.k_k"})
    low_rank_decay = frozenset({"att.w1", "att.w2"})
    low_rank = low_rank_decay | {f"att.{name}{i}" for name in "avg" for i in (1, 2)}
    recipe = Recipe(
        corpus="data/world_text_document",
        num_tokens=3_100_000_000_000,
        tokenizer="world",
        vocab_size=65536,
        sequence_length=4096,
        optimizer=dataclasses.replace(OFFICIAL_OPTIMIZER, weight_decay=0.1),
        sizes={
            1024: _ranks(64, 64, 32, 128),
            2048: _ranks(96, 96, 64, 256),
            2560: _ranks(96, 96, 64, 320),
            4096: _ranks(128, 128, 96, 480),
        },
    )

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 4 C; ranks by the official trainer's functions of the width, in multiples of 32."""

        def rank(factor: float) -> int:
            # Python's round is half-to-even, as in the official trainer: width 1024 gives 64, not 96.
            return max(32, round(factor * math.sqrt(config.width) / 32) * 32)

        return ResolvedSizes(
            ffn_width=config.ffn_width or 4 * config.width,
            decay_rank=config.decay_rank or rank(2.5),
            iclr_rank=config.iclr_rank or rank(2.5),
            value_rank=config.value_rank or rank(1.7),
            gate_rank=config.gate_rank or rank(5.0),
        )

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Those of the time mixing; K, V of the channel mixing."""
        return self.time_mix_matrices(config, first=first) + 2 * config.width * self.sizes(config).ffn_width

    def time_mix_matrices(self, config: ModelConfig, *, first: bool) -> int:
        """R, K, V, O and the low-rank maps, without the value residual's in layer 0."""
        sizes, width = self.sizes(config), config.width
        ranks = sizes.decay_rank + sizes.iclr_rank + sizes.gate_rank + (0 if first else sizes.value_rank)
        return 4 * width**2 + 2 * width * ranks

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Those of the time mixing; blend of k; ln1, ln2, and ln0 in layer 0."""
        return self.time_mix_vectors(config, first=first) + (1 + 4 + (2 if first else 0)) * config.width

    def time_mix_vectors(self, config: ModelConfig, *, first: bool) -> int:
        """Blends of r, w, k, v, a, g; w0, a0, v0; k_k, k_a, r_k; ln_x; the unused value residual of layer 0."""
        vectors = 6 + 3 + 3 + 2
        if not first:
            return vectors * config.width
        unused = 1 + 2 * self.sizes(config).value_rank if config.unused_value_residual else 0
        return (vectors - 1 + unused) * config.width

    def prefill_implementation(self, platform: str) -> tuple[str | None, str]:
        """`scan` on a CPU: measured in benchmarks/README.md, of decode_cpu.py."""
        if platform == "cpu":
            return (
                "scan",
                "on a CPU, forward alone, RWKV-7's recurrence is faster than its chunks: its state stays in the cache",
            )
        return super().prefill_implementation(platform)

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        """Ranks, and whether layer 0 has the unused value residual."""
        names = {"decay_rank": "0.att.w1", "iclr_rank": "0.att.a1", "value_rank": "1.att.v1", "gate_rank": "0.att.g1"}
        ranks = {field: size_of(shapes, f"blocks.{name}", 1) for field, name in names.items()}
        return ranks | {"unused_value_residual": "blocks.0.att.v0" in shapes}
