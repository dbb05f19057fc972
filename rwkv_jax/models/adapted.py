"""Frozen matrices with trained ones beside them, and their products without a sum of the two in memory.

An adapted matrix is a pytree that replaces a parameter's array, as a packed one does; `linear` handles it, so models do
not change. With W [out, in] the base, s a factor, and x [in] the input:

    lora, rslora   y = W x + s B (A x)                                lora_A [r, in], lora_B [out, r]
    pissa          the same, of a base that lacks B0 A0               and init_lora_A, init_lora_B: A0 and B0
    dora           y = m / |V| (W x + s B (A x)), V = W + s B A       and lora_magnitude_vector: m [out]
    miss           y = W x + D^T u, u_j = sum of x_i with i % r = j   miss_block: D [r, out]
    bat            y_a = sum_b (W_ab + W_ab D_a + D_a) x_b            miss_block: D [out / r, r, r], by output blocks
                   y_a = sum_b (W_ab + W_ab D_b + D_b) x_b            disha: D [in / r, r, r], by input blocks

|V| is the norm of each row, a constant to gradients; a and b are blocks of r outputs and r inputs. Sources: LoRA
(arXiv 2106.09685), rsLoRA (2312.03732), PiSSA (2404.02948), DoRA (2402.09353, section 4.3), MiSS and Bat (2409.15371);
names and bat by output blocks as in Hugging Face PEFT, bat by input blocks as in RWKV-PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.config import AdapterKind
from rwkv_jax.models.packed import PackedMatrix

Multiply = Callable[..., Array]
"""(x [..., in], weight, in_axis=1) -> [..., out] in x's dtype."""

CHECKPOINT = "matrix product"
"""The checkpoint name of other products, under which A x is stored, and the sum of both products."""

BY_INPUTS = "disha"
"""The part of bat that has a block for each block of inputs."""

_exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedMatrix:
    """A matrix [out, in] and an adapter's parts; leading axes are those of stacked layers."""

    base: Array | PackedMatrix
    """[..., out, in]."""
    parts: dict[str, Array]
    """By name, with the base's leading axes; with `rows` the adapters' axis K follows those."""
    scale: Array
    """s [...], with `rows` [..., K]; the base alone where it is 0."""
    rows: Array | None = None
    """int32 [..., B]: the adapter of each row of a batch, whose tokens follow each other; None with one adapter."""
    dropout_keys: Array | None = None
    """uint32 [..., B, T], random numbers of the tokens; None without dropout."""
    kind: AdapterKind = dataclasses.field(default="lora", kw_only=True, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, kw_only=True, metadata={"static": True})
    """Share of the adapter's inputs set to zero, if there are keys."""
    inputs_over: str | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})
    """Mesh axis over which the inputs are split, within `jax.shard_map`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter it replaces."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the parameter it replaces."""
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        """dtype of the base."""
        return self.base.dtype

    def __getitem__(self, index: Any) -> Self:
        """Indexes the leading axes; `...` returns the matrix itself."""
        if index is ...:
            return self
        if self.ndim == 2:
            raise IndexError("an adapted matrix has no rows of its own; `merged` has")
        return jax.tree.map(lambda x: x[index], self)

    def __iter__(self) -> Iterator[Self]:
        """The matrices along the first leading axis."""
        return (self[i] for i in range(self.shape[0]))

    def times(self, x: Array, multiply: Multiply) -> Array:
        """The product with x [..., in], with rows or keys [B, ..., in]: [..., out] in x's dtype.

        Raises:
          ValueError: several adapters of a kind that does not only add to a matrix.
        """
        if self.kind == "bat":
            self._refuse_rows()
            return checkpoint_name(self._times_bat(x, multiply), CHECKPOINT)
        y, adapted = multiply(x, self.base), self._dropped(x)
        if self.kind == "miss":
            hidden, up = self._remainder_sums(adapted), self._scaled("miss_block")
        else:
            down = self.parts["lora_A"]
            down = down if self.rows is None else rearrange(down, "K r i -> (K r) i")
            hidden, up = multiply(adapted, down), jnp.swapaxes(self._scaled("lora_B"), -1, -2)
            hidden = checkpoint_name(hidden, CHECKPOINT)
            if self.rows is None:
                # Keeps B^T apart, so that its gradient is computed as [r, out]: for [out, r] XLA's CPU backend takes
                # five to nine times as long, a tenth of a training step.
                up = lax.optimization_barrier(up)
        if self.rows is not None:
            hidden, up = self._of_rows(hidden, up)
        # Named before dora scales it, whose gradient by m would otherwise take the product with the base again.
        y = checkpoint_name(y + multiply(hidden, up, in_axis=0), CHECKPOINT)
        if self.kind == "dora":
            self._refuse_rows()
            y = y * self._magnitude_factor().astype(y.dtype)
        return y

    def _of_rows(self, hidden: Array, up: Array) -> tuple[Array, Array]:
        """Of the products of each row of the batch with all adapters, those with its own; and all adapters' parts."""
        assert self.rows is not None
        num_adapters, rank, _ = up.shape
        if self.kind == "miss":  # the sums are the same for all
            hidden = jnp.tile(hidden, num_adapters)
        is_own = jnp.repeat(jax.nn.one_hot(self.rows, num_adapters, dtype=bool), rank, axis=1)
        by_row = hidden.reshape(len(self.rows), -1, num_adapters * rank)
        hidden = jnp.where(is_own[:, None], by_row, 0).reshape(hidden.shape)
        return hidden, up.reshape(num_adapters * rank, -1)

    def _refuse_rows(self) -> None:
        if self.rows is not None:
            raise ValueError(f"kind = {self.kind!r}: does not only add to a matrix, so a batch has one such adapter")

    def _scaled(self, part: str) -> Array:
        """s times a part."""
        x = self.parts[part]
        scale = self.scale.astype(x.dtype)
        return x * scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))

    def _dropped(self, x: Array) -> Array:
        """x [B, T, in] with a share of its numbers set to zero, the others scaled such that the mean stays."""
        if self.dropout_keys is None or not self.dropout:
            return x
        channel = lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1)
        if self.inputs_over is not None:
            channel += (x.shape[-1] * lax.axis_index(self.inputs_over)).astype(jnp.uint32)
        bits = mixed(self.dropout_keys[..., None] + channel * jnp.uint32(0x9E3779B1))
        kept = bits >= jnp.uint32(round(self.dropout * 2**32))
        return jnp.where(kept, x / (1 - self.dropout), 0)

    def _remainder_sums(self, x: Array) -> Array:
        """Sums [..., r] of inputs [..., in] whose index has the same remainder modulo r."""
        size, rank = x.shape[-1], self.parts["miss_block"].shape[-2]
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % rank)])
        sums = reduce(padded, "... (b r) -> ... r", "sum", r=rank)
        if self.inputs_over is not None and size % rank:  # a shard begins within a block
            sums = jnp.roll(sums, size * lax.axis_index(self.inputs_over), axis=-1)
        return sums

    def _times_bat(self, x: Array, multiply: Multiply) -> Array:
        if BY_INPUTS not in self.parts:  # blocks of W times D by outputs: a matrix of its own
            return multiply(x, self.merged().astype(x.dtype))
        blocks = self._scaled(BY_INPUTS).astype(x.dtype)
        rank, num_outputs = blocks.shape[-1], self.shape[0]
        changed = jnp.einsum("bpq,...bq->...bp", blocks, rearrange(x, "... (b q) -> ... b q", q=rank))
        y = multiply(x + changed.reshape(x.shape), self.base)
        return y + jnp.tile(jnp.sum(changed, axis=-2), num_outputs // rank)

    def _magnitude_factor(self) -> Array:
        """m / |V| [..., out]; 1 where the layer is not adapted, and for rows of zeros."""
        magnitude = self.parts["lora_magnitude_vector"]
        norms = lax.stop_gradient(self.row_norms()).astype(magnitude.dtype)
        factor = magnitude / jnp.where(norms == 0, 1, norms)
        return jnp.where((self.scale[..., None] == 0) | (norms == 0), 1, factor)

    def row_norms(self) -> Array:
        """|V| [..., out] of V = W + s B A."""
        squares = jnp.sum(jnp.square(self._with_low_rank()), axis=-1)
        return jnp.sqrt(squares if self.inputs_over is None else lax.psum(squares, self.inputs_over))

    def _whole_base(self) -> Array:
        """W in at least float32."""
        if isinstance(self.base, PackedMatrix):
            return self.base.dequantized()
        return self.base.astype(jnp.promote_types(self.base.dtype, jnp.float32))

    def _with_low_rank(self) -> Array:
        base = self._whole_base()
        return base + _exact(self._scaled("lora_B"), self.parts["lora_A"]).astype(base.dtype)

    def merged(self) -> Array:
        """The plain matrix of the same product [..., out, in], in at least float32.

        Raises:
          ValueError: it has several adapters.
        """
        if self.rows is not None:
            raise ValueError(f"{self.scale.shape[-1]} adapters of the rows of a batch: no matrix is merged of all")
        base = self._whole_base()
        if self.kind == "bat":
            by_inputs = BY_INPUTS in self.parts
            blocks = self._scaled(BY_INPUTS if by_inputs else "miss_block").astype(base.dtype)
            rank = blocks.shape[-1]
            grid = rearrange(base, "... (a p) (b q) -> ... a b p q", p=rank, q=rank)
            blocks = jnp.expand_dims(blocks, -4 if by_inputs else -3)
            return rearrange(grid + _exact(grid, blocks) + blocks, "... a b p q -> ... (a p) (b q)")
        if self.kind == "miss":
            block = self._scaled("miss_block").astype(base.dtype)
            columns = jnp.arange(base.shape[-1]) % block.shape[-2]
            return base + jnp.swapaxes(jnp.take(block, columns, axis=-2), -1, -2)
        whole = self._with_low_rank()
        return whole * self._magnitude_factor().astype(whole.dtype)[..., None] if self.kind == "dora" else whole


def mixed(h: Array) -> Array:
    """Mixes the bits of uint32: the finalizer of MurmurHash3, by Austin Appleby, in the public domain."""
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(multiplier)
    return h ^ (h >> 16)
