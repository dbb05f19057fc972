"""Tables by token with what a layer adds to their rows folded in, for inference: a step reads rows, and no matrix.

RWKV-7a and 7b read table[token] + W e_t, e_t being the token's vector after layer 0's first norm (`models/rwkv7a.py`).
Both terms depend on the token alone, so their sum is a table, too, as the official inference code has it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.host_tables import HostTable
from rwkv_jax.models.language_model import LanguageModel
from rwkv_jax.models.layers import linear
from rwkv_jax.models.packed import PackedMatrix
from rwkv_jax.models.stacks import FIRST

Model = TypeVar("Model", bound=LanguageModel)

_ROWS_AT_A_TIME = 8192  # of a table in the host's memory, of which a device computes the sums


def require_folding(config: ModelConfig) -> None:
    """Raises ConfigError for models that add nothing to rows of tables."""
    if not config.spec.table_maps:
        raise ConfigError(f"tables = 'folded': {config.title} adds nothing to rows of tables; leave it out")


def with_folded_tables(model: Model) -> Model:
    """The same model with W e of each token added to its tables, for inference; itself if that has been done.

    Rows are held in the compute dtype, in which the sum of both terms was taken before. Vectors in place of the tokens'
    own (`inputs_embeds`) no longer change them. All other parameters are shared with the given model, with which the
    tables as they were are freed.

    Raises:
      ConfigError: the model adds nothing to its tables, has none, or they are packed.
    """
    require_folding(model.config)
    maps = model.config.spec.table_maps
    result = nnx.merge(*nnx.split(model))
    parts = [getattr(result, run.name) for run in result.layer_runs[1:]] if result.is_stacked else list(result.blocks)
    blocks, embedded = [getattr(result, FIRST), *parts], None
    for block in blocks:
        for table_name, map_name in maps.items():
            mixer, name = _owner(block, table_name)
            _, matrix_name = _owner(block, map_name)
            matrix = getattr(mixer, matrix_name)
            if matrix is None:
                continue
            table, weight = getattr(mixer, name), matrix.weight[...]
            if isinstance(table.weight[...], PackedMatrix) or isinstance(weight, PackedMatrix):
                raise ConfigError("tables = 'folded': the tables are quantized; load the model without quantize")
            if isinstance(table.weight[...], AdaptedMatrix):
                raise ConfigError("tables = 'folded': the tables have an adapter; merge it first (rwkv merge)")
            if embedded is None:
                embedded = _embedded(result)
            table.weight = nnx.Param(_folded(table.weight[...], weight, embedded))
            setattr(mixer, matrix_name, None)
    return result


def fixed_parameters(model: LanguageModel) -> frozenset[str]:
    """Official names of what can no longer change: tables in the host's memory, and what folded ones are made of."""
    tables = {name for name, axes in model.block_axes.items() if axes[0] == "vocab"}
    maps, first = model.config.spec.table_maps, getattr(model, FIRST)
    is_folded = any(getattr(*_owner(first, name)) is None for name in maps.values())
    if not is_folded and not any(isinstance(getattr(*_owner(first, name)).weight[...], HostTable) for name in tables):
        return frozenset()
    within = tables | (set(maps.values()) if is_folded else set())
    names = {f"blocks.{layer}.{name}" for layer in range(model.config.num_layers) for name in within}
    if is_folded:
        names |= {"emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias"}
    return frozenset(names)


def _owner(block: Any, name: str) -> tuple[Any, str]:
    """The module that has an official name within a layer, such as ffn.s_emb.weight, and its attribute there."""
    part, attribute, _ = name.split(".")
    return getattr(block, part), attribute


def _embedded(model: LanguageModel) -> Array:
    """The vectors of all tokens after layer 0's first norm, [V, C], in the compute dtype."""
    graphdef, params = nnx.split((model.emb, model.first_block.ln0))
    dtype, tokens = model.config.dtype, jnp.arange(model.config.vocab_size, dtype=jnp.int32)

    def vectors(params: Any) -> Array:
        embedding, norm = nnx.merge(graphdef, params)
        return norm(embedding(tokens, dtype))

    return jax.jit(vectors)(params)


def _folded(table: Array | HostTable, weight: Array, embedded: Array) -> Array | HostTable:
    """The sums [V, D], or [L, V, D] of stacked layers, in the dtype of `embedded`."""
    if isinstance(table, HostTable):
        return _folded_on_host(table, weight, embedded)
    if table.ndim == 2:
        return _sums(table, weight, embedded)
    return _stacked_sums(table, weight, embedded)


@jax.jit
def _sums(table: Array, weight: Array, embedded: Array) -> Array:
    return table.astype(embedded.dtype) + linear(embedded, weight)


@jax.jit
def _stacked_sums(tables: Array, weights: Array, embedded: Array) -> Array:
    return jax.lax.map(lambda own: _sums(*own, embedded), (tables, weights))


def _folded_on_host(table: HostTable, weight: Array, embedded: Array) -> HostTable:
    """The sums in the host's memory, some rows at a time."""
    given = table.source.values
    weights = weight if weight.ndim == 3 else weight[None]
    assert len(given) == len(weights)
    sums = np.empty(given.shape, np.dtype(embedded.dtype))
    for layer, own in enumerate(weights):
        for begin in range(0, given.shape[1], _ROWS_AT_A_TIME):
            rows = slice(begin, begin + _ROWS_AT_A_TIME)
            sums[layer, rows] = _sums(jnp.asarray(given[layer, rows]), own, embedded[rows])
    return table.with_rows(sums, np.asarray(weights))
