"""Layers common to all generations: linear maps, norms, token shift and the official initial values.

Parameters have the official checkpoint's names, shapes and orientation ([out, in] for linear maps), so that checkpoint
keys map to parameters one to one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.grid import grid_shift
from rwkv_jax.models.host_tables import HostTable
from rwkv_jax.models.packed import PackedMatrix, product, product_with_bfloat16
from rwkv_jax.models.state import TimeMixState, check_state
from rwkv_kernels.arguments import broadcast_varying_axes
from rwkv_kernels.sharded import from_last_shard, from_previous_shard

CHECKPOINT_MATMUL = "matrix product"
"""Checkpoint name of matrix products, stored for the backward pass; cheap steps between them are recomputed."""

CHECKPOINT_WKV_INPUT = "operator input"
"""Checkpoint name of the WKV operator's inputs, which can be stored too."""

OPERATOR_SCOPE = "wkv_operator"
"""Name under which compiled programs list the WKV operator's instructions."""

_FEW_ROWS = 64  # as in decoding; in training the copy of a matrix is small compared with the activations


def checkpoint_wkv_inputs(*inputs: Array) -> tuple[Array, ...]:
    """Names the WKV operator's inputs for checkpointing."""
    return tuple(checkpoint_name(x, CHECKPOINT_WKV_INPUT) for x in inputs)


def linear(
    x: Array,
    weight: Array | PackedMatrix | AdaptedMatrix,
    *,
    out_dtype: jnp.dtype | None = None,
    in_axis: Literal[0, 1] = 1,
) -> Array:
    """x @ weight^T in x's dtype.

    Tokens are flattened to [B * T, C] first: on [B, T, C] XLA's CPU backend writes transposed copies of whole
    activations in the backward pass, which nearly doubles the cost of a training step.

    Args:
      x: [..., in]; weight: [out, in], the official orientation; packed, or in bfloat16 with x in float32, it is
        multiplied as stored; adapted ones are [out, in].
      out_dtype: dtype of the result; None is x's.
      in_axis: 0 for a weight [in, out]. (If the caller transposed it, a CPU would copy it for every token.)

    Returns:
      [..., out].
    """
    if isinstance(weight, AdaptedMatrix):
        assert in_axis == 1
        return weight.times(x, functools.partial(_product_of_one, out_dtype=out_dtype))
    return checkpoint_name(_product_of_one(x, weight, out_dtype=out_dtype, in_axis=in_axis), CHECKPOINT_MATMUL)


def _product_of_one(
    x: Array, weight: Array | PackedMatrix, *, out_dtype: jnp.dtype | None = None, in_axis: Literal[0, 1] = 1
) -> Array:
    """`linear` for a matrix without an adapter, not yet named for checkpointing."""
    flat = rearrange(x, "... C -> (...) C")
    out_dtype = out_dtype or x.dtype
    if isinstance(weight, PackedMatrix):
        y = product(flat, weight if in_axis == 1 else weight.T).astype(out_dtype)
    elif weight.dtype == jnp.bfloat16 and x.dtype == jnp.float32:
        y = product_with_bfloat16(flat, weight, in_axis=in_axis).astype(out_dtype)
    else:
        weight = weight.astype(x.dtype)
        multiply = functools.partial(_multiply, in_axis=in_axis, out_dtype=out_dtype)
        if x.dtype == jnp.bfloat16 and flat.shape[0] <= _FEW_ROWS:
            on_cpu = functools.partial(_multiply_few_on_cpu, in_axis=in_axis, out_dtype=out_dtype)
            y = lax.platform_dependent(flat, weight, cpu=on_cpu, default=multiply)
        else:
            y = multiply(flat, weight)
    return y.reshape(*x.shape[:-1], weight.shape[1 - in_axis])


def _multiply(x: Array, weight: Array, *, in_axis: Literal[0, 1], out_dtype: jnp.dtype) -> Array:
    return lax.dot_general(x, weight, (((1,), (in_axis,)), ((), ())), preferred_element_type=out_dtype)


def _multiply_few_on_cpu(x: Array, weight: Array, *, in_axis: Literal[0, 1], out_dtype: jnp.dtype) -> Array:
    """`_multiply` in bfloat16 such that XLA's CPU backend does not materialize the matrix in float32 at every call.

    That needs a float32 result and at least two rows.
    """
    rows = x if x.shape[0] > 1 else jnp.concatenate([x, x])
    return _multiply(rows, weight, in_axis=in_axis, out_dtype=jnp.dtype(jnp.float32))[: x.shape[0]].astype(out_dtype)


def low_rank(
    x: Array,
    down: Array | PackedMatrix,
    up: Array | PackedMatrix,
    activation: Callable[[Array], Array] | None = None,
) -> Array:
    """activation(x @ down) @ up in x's dtype, with down [C, D] and up [D, C] (stored [in, out], unlike `linear`)."""
    hidden = linear(x, down, in_axis=0)
    return linear(hidden if activation is None else activation(hidden), up, in_axis=0)


def broadcast_param(parameter: Array, x: Array) -> Array:
    """Broadcasts a parameter of one token's shape to x's shape and dtype.

    It is broadcast from its own axes in one step, so that its gradient is one sum over B and T: multiplying with
    [1, 1, C] makes it a sum over T alone in a batch of one row, which XLA's CPU backend computes 70 times slower.

    Args:
      parameter: [C] or [1, 1, C], or [H, N] for x [B, T, H, N].
    """
    own_axes = parameter.shape[-2:] if parameter.ndim == 2 else parameter.shape[-1:]
    # Within `shard_map`: marked as varying while it is small, or its gradient would be summed over shards as [B, T, C].
    parameter, _ = broadcast_varying_axes(parameter, x)
    return jnp.broadcast_to(parameter.reshape(own_axes).astype(x.dtype), x.shape)


def copy_to_tensor_parallel(x: Array, axis_name: str | None) -> Array:
    """Marks a value replicated over a mesh axis as input of computations that differ between its shards.

    The value is unchanged; its gradient is the sum of the shards' gradients, computed once at this point.
    """
    return x if axis_name is None else lax.pcast(x, axis_name, to="varying")


def reduce_from_tensor_parallel(x: Array, axis_name: str | None) -> Array:
    """Sums the shards' partial results; the sum is replicated."""
    return x if axis_name is None else lax.psum(x, axis_name)


def as_replicated(x: Array, axis_name: str | None) -> Array:
    """Marks a value that all shards of an axis have computed identically as replicated."""
    if axis_name is None:
        return x
    return lax.psum(jnp.where(lax.axis_index(axis_name) == 0, x, jnp.zeros_like(x)), axis_name)


def shard_offset(size: int, axis_name: str | None) -> Array | int:
    """Global index of a shard's first entry along an axis of which it has `size` entries."""
    return 0 if axis_name is None else size * lax.axis_index(axis_name)


def row_parallel_linear(x: Array, weight: Array | PackedMatrix | AdaptedMatrix, axis_name: str | None) -> Array:
    """`linear` with x's last axis split over a mesh axis; each shard has its columns of the weight."""
    y = linear(x, weight)
    if axis_name is None:
        return y
    return checkpoint_name(reduce_from_tensor_parallel(y, axis_name), CHECKPOINT_MATMUL)


def row_parallel_gated_linear(
    gate: Array, x: Array, weight: Array | PackedMatrix | AdaptedMatrix, axis_name: str | None
) -> Array:
    """gate * (x @ weight^T) with x's last axis split over a mesh axis; each shard has its channels of the gate.

    The sum over shards is reduce-scattered, gated and gathered: as much traffic as the sum in `row_parallel_linear`.

    Args:
      gate: [..., out / shards]; x: [..., in / shards]; weight: [out, in / shards].
    """
    y = linear(x, weight)
    if axis_name is None:
        return gate * y
    own = lax.psum_scatter(y, axis_name, scatter_dimension=y.ndim - 1, tiled=True)
    own = checkpoint_name(own, CHECKPOINT_MATMUL)
    return lax.all_gather(gate * own, axis_name, axis=y.ndim - 1, tiled=True, to="invarying")


def wkv_operator(
    operator: Callable[..., Any], context: SequenceContext, implementation: str | None
) -> Callable[..., Any]:
    """Binds all arguments of a WKV operator except arrays and state: packing, padding, mesh axis, implementation."""
    bound = functools.partial(
        operator,
        axis_name=context.axes.sequence,
        segment_ids=context.segment_ids,
        lengths=context.lengths,
        implementation=implementation,
    )
    return jax.named_scope(OPERATOR_SCOPE)(bound)


def token_shift(x: Array, shift: Array, context: SequenceContext) -> tuple[Array, Array]:
    """The previous token's input at every position.

    Args:
      x: [B, T, C]; the shard's steps if `sequence` splits time.
      shift: [B, C], the input before x, zeros at the start of a text; replicated over `sequence`.

    Returns:
      x_prev [B, T, C], and the next shift [B, C]: x at each row's last step (`shift` for a row of length 0). On a
      `grid`, what its neighbors give each patch, and the shift as it was.
    """
    if context.grid is not None:
        return grid_shift(x, context.grid, context.grid_kernel), shift
    segment_ids, axis_name = context.segment_ids, context.axes.sequence
    shift = shift.astype(x.dtype)
    before, id_before = shift[:, None], None if segment_ids is None else segment_ids[:, :1]
    if axis_name is not None:
        is_first = lax.axis_index(axis_name) == 0
        before = jnp.where(is_first, before, from_previous_shard(x[:, -1:], axis_name))
        if segment_ids is not None:
            halo = from_previous_shard(segment_ids[:, -1:], axis_name)
            id_before = jnp.where(is_first, segment_ids[:, :1], halo)
    x_prev = jnp.concatenate([before, x[:, :-1]], axis=1)
    if segment_ids is not None:
        begins = jnp.diff(segment_ids, axis=1, prepend=id_before) != 0
        x_prev = jnp.where(begins[:, :, None], 0, x_prev)
    return x_prev, _last_step(x, shift, context.lengths, axis_name)


def _last_step(x: Array, shift: Array, lengths: Array | None, axis_name: str | None) -> Array:
    """x [B, T, C] at the last step of each row, `shift` for empty rows: [B, C]."""
    if lengths is None:
        return x[:, -1] if axis_name is None else from_last_shard(x[:, -1], axis_name)
    time = x.shape[1]
    index = lengths - 1 - shard_offset(time, axis_name)
    last = jnp.take_along_axis(x, jnp.clip(index, 0, time - 1)[:, None, None], axis=1)[:, 0]
    if axis_name is not None:
        is_here = (index >= 0) & (index < time)
        last = reduce_from_tensor_parallel(jnp.where(is_here[:, None], last, 0), axis_name)
    return jnp.where((lengths > 0)[:, None], last, shift)


class MixOutput(NamedTuple):
    """Output of time or channel mixing."""

    y: Array
    """[B, T, C]."""
    state: Any
    """The state after it."""


class Mixer(nnx.Module):
    """Base of time and channel mixing: `mix` has a paper's equations; call the module to use it in another model."""

    config: ModelConfig

    def initial_state(self, batch_size: int) -> Any:
        """The state at the start of a text; for channel mixing the last input, [B, C]."""
        return jnp.zeros((batch_size, self.config.width), self.config.dtype)

    def mix(self, x: Array, *, state: Any, context: SequenceContext) -> MixOutput:
        """x [B, T, C], already normalized, and the state before it -> y [B, T, C] and the next state."""
        raise NotImplementedError

    def __call__(
        self, x: Array, state: Any = None, *, segment_ids: Array | None = None, lengths: Array | None = None
    ) -> MixOutput:
        """Runs the mixing alone, for use in another model.

        Args:
          x: [B, T, C], already normalized.
          state: from an earlier call; None is the start of a text.
          segment_ids, lengths: as in `LanguageModel.hidden`.

        Returns:
          y [B, T, C] and the next state.

        Raises:
          ValueError: a state of another generation, size or batch.
        """
        batch_size = x.shape[0]
        if state is None:
            state = self.initial_state(batch_size)
        else:
            expected = jax.eval_shape(lambda: self.initial_state(batch_size))
            check_state(state, expected, owner="this layer", source=f"layer.initial_state(batch_size={batch_size})")
        return self.mix(x, state=state, context=SequenceContext(segment_ids, lengths))


class TimeMixer(Mixer):
    """Base of time mixing in generations whose model's state is a `State`."""

    @override
    def initial_state(self, batch_size: int) -> TimeMixState:
        model = self.config.spec.load_model_class()
        return model.initial_block_state(self.config, batch_size).time_mix


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float64 for float64, otherwise float32: the dtype of norms, attention scores and logits."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _normalize(x: Array, epsilon: float) -> Array:
    """Zero mean and unit variance over the last axis, in at least float32."""
    x = x.astype(wide_dtype(x.dtype))
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + epsilon)


class Linear(nnx.Module):
    """A bias-free linear map with weight [out, in]."""

    def __init__(self, weight: Array) -> None:
        self.weight = nnx.Param(weight)

    def __call__(self, x: Array) -> Array:
        """[..., in] -> [..., out]; see `linear`."""
        return linear(x, self.weight[...])


class BiasedLinear(Linear):
    """A linear map with weight [out, in] and bias [out]."""

    def __init__(self, weight: Array) -> None:
        super().__init__(weight)
        self.bias = nnx.Param(jnp.zeros_like(weight[:, 0]))

    @override
    def __call__(self, x: Array) -> Array:
        y = super().__call__(x)
        return y + broadcast_param(self.bias[...], y)


class Embedding(nnx.Module):
    """A table of token vectors, weight [V, C]."""

    def __init__(self, weight: Array) -> None:
        self.weight = nnx.Param(weight)

    def __call__(self, tokens: Array, dtype: str | None = None, axes: MeshAxes = UNSHARDED) -> Array:
        """[B, T] integers in [0, V) -> [B, T, C] in the given dtype, or the table's.

        If `axes.tensor` splits V, each shard looks up the tokens of its part.
        """
        weight = self.weight[...]
        if axes.tensor is None:
            return _rows(weight, tokens).astype(dtype or weight.dtype)
        rows = tokens - shard_offset(weight.shape[0], axes.tensor)
        is_here = (rows >= 0) & (rows < weight.shape[0])
        vectors = jnp.where(is_here[..., None], _rows(weight, jnp.where(is_here, rows, 0)), 0)
        # Exact: all terms but one are zero.
        return reduce_from_tensor_parallel(vectors.astype(dtype or weight.dtype), axes.tensor)


def _rows(weight: Array | PackedMatrix | HostTable, index: Array) -> Array:
    if isinstance(weight, PackedMatrix | HostTable):
        return weight.rows(index)
    if weight.dtype != jnp.bfloat16:
        return weight[index]
    # XLA's CPU backend would convert the whole table to float32 before the first step of a decoding loop. Making the
    # table depend on each step's ids converts only the rows looked up.
    table, index = lax.optimization_barrier((weight, index))
    return table[index]


class LayerNorm(nnx.Module):
    """Layer norm over the width with weight and bias [C] and the official epsilon, computed in float32."""

    epsilon = 1e-5

    def __init__(self, width: int, dtype: str) -> None:
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))

    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., C] in x's dtype."""
        y = _normalize(x, self.epsilon)
        return (y * broadcast_param(self.weight[...], y) + broadcast_param(self.bias[...], y)).astype(x.dtype)


class HeadNorm(nnx.Module):
    """Group norm with one group per head, weight and bias [C], computed in float32."""

    def __init__(self, weight: Array, epsilon: float) -> None:
        self.epsilon = epsilon
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros_like(weight))

    def __call__(self, x: Array) -> Array:
        """[B, T, H, N] -> [B, T, C] in x's dtype."""
        y = rearrange(_normalize(x, self.epsilon), "B T H N -> B T (H N)")
        return (y * broadcast_param(self.weight[...], y) + broadcast_param(self.bias[...], y)).astype(x.dtype)


def initial_head_norm(config: ModelConfig, layer: int | Array, epsilon: float) -> HeadNorm:
    """The norm over each head with the official initial weight ((1 + l) / L)^0.7."""
    weight = ((1 + layer) / config.num_layers) ** 0.7
    return HeadNorm(jnp.full((config.width,), weight, config.parameter_dtype), epsilon)


def channel_param(values: Array) -> nnx.Param[Array]:
    """A parameter with one number per channel in the official shape [1, 1, C]."""
    return nnx.Param(rearrange(values, "C -> 1 1 C"))


_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _stretch(_: int, x: Array) -> Array:
    """The quintic of Muon (Jordan, 2024): singular values grow 3.4-fold until they are in (0.68, 1.13)."""
    gram = _product(x, x.T)
    return 3.4445 * x + _product(-4.7750 * gram + 2.0315 * _product(gram, gram), x)


def _polish(_: int, x: Array) -> Array:
    """A Newton-Schulz iteration: singular values near 1 become 1."""
    return 1.5 * x - 0.5 * _product(_product(x, x.T), x)


def orthogonal(key: Array, shape: tuple[int, int], gain: float, dtype: str) -> Array:
    """A random matrix times gain whose rows (columns, if there are more rows) are orthonormal.

    The distribution is the official one's, uniform over such matrices, which a QR factorization with signs fixed by
    R's diagonal also samples. Here it is the polar factor of a normal matrix, found by Newton-Schulz iterations:
    matmuls only, so that it shards and batches over layers on every platform. (Batched LAPACK factorizations inside
    one jitted function deadlock on jaxlib 0.10's CPU backend: each waits for a thread that another one occupies.)
    """
    rows, columns = shape
    matrix = jax.random.normal(key, shape, jnp.dtype(dtype))
    if rows > columns:
        matrix = matrix.T
    short, long = sorted(shape)
    # Singular values of a normal matrix are below sqrt(short) + sqrt(long) + t but for a chance of e^{-t^2 / 2}.
    matrix = matrix / (math.sqrt(short) + math.sqrt(long) + 6)
    # A square matrix may have a singular value as small as 1e-7 of the largest; one twice as long as it is wide, 0.17.
    matrix = jax.lax.fori_loop(0, 16 if long < 2 * short else 5, _stretch, matrix)
    matrix = gain * jax.lax.fori_loop(0, 6, _polish, matrix)
    return matrix.T if rows > columns else matrix


def uniform(key: Array, shape: tuple[int, ...], bound: float, dtype: str) -> Array:
    """Uniform in [-bound, bound)."""
    return jax.random.uniform(key, shape, jnp.dtype(dtype), -bound, bound)


def head_gain(vocab_size: int, width: int) -> float:
    """Gain of the output head's orthogonal initial value: 0.5 sqrt(V / C), or 0.5 where V <= C."""
    return 0.5 * math.sqrt(vocab_size / width) if vocab_size > width else 0.5
