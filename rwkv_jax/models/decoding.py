"""Prepares models for inference: unstacked layers, and the fastest forward WKV implementation."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models.folded_tables import with_folded_tables
from rwkv_jax.models.host_tables import HostTable, host_table
from rwkv_jax.models.language_model import LanguageModel
from rwkv_jax.models.packed import PackedMatrix

Model = TypeVar("Model", bound=LanguageModel)


def unstacked(model: Model) -> Model:
    """The same model with separate arrays per layer, for decoding, which reads every weight once per token.

    A scan over stacked layers copies each layer's weights out of the stack first, which doubles that traffic. The
    result is called as before, but its state is a tuple of one `State` per layer, and compile time grows with depth.

    Returns:
      A new model; embedding, first block, norm and head share their arrays with the old one. `model` itself if its
      layers are not stacked.
    """
    if not model.is_stacked:
        return model
    runs = [run.name for run in model.layer_runs[1:]]
    split = {name: nnx.split(getattr(model, name), nnx.Param) for name in runs}

    def layers(stacked: Any) -> list[Any]:
        count = jax.tree.leaves(stacked)[0].shape[0]
        return [jax.tree.map(lambda x, index=index: x[index], stacked) for index in range(count)]

    own = jax.jit(lambda params: jax.tree.map(layers, params, is_leaf=lambda x: isinstance(x, nnx.State)))(
        {name: params for name, (_, params) in split.items()}
    )
    result = nnx.merge(*nnx.split(model))
    for name in runs:
        delattr(result, name)
    result.blocks = nnx.List([nnx.merge(split[name][0], layer) for name in runs for layer in own[name]])
    return result


def tables_by_token(model_class: type[LanguageModel]) -> frozenset[str]:
    """Official names within a layer of its tables by token."""
    return frozenset(name for name, axes in model_class.block_axes.items() if axes[0] == "vocab")


def require_tables(model_class: type[LanguageModel], config: ModelConfig) -> None:
    """Raises ConfigError for models without tables by token."""
    if not tables_by_token(model_class):
        raise ConfigError(f"tables = 'host': {config.title} has no tables by token; leave it out")


def with_host_tables(model: Model) -> Model:
    """The same model with its layers' tables by token in the host's memory (`models/host_tables.py`), for inference.

    What layers add to their rows is folded in (`models/folded_tables.py`). It shares all other parameters; the tables'
    arrays on the device are freed with the given model.

    Raises:
      ConfigError: the model has no such tables, they are packed, or it lies on several devices.
    """
    require_tables(type(model), model.config)
    names = tables_by_token(type(model))
    graphdef, state = nnx.split(model, nnx.Param)

    def on_host(path: tuple[Any, ...], x: Any) -> Any:
        if ".".join(str(entry.key) for entry in path[-3:]) not in names or isinstance(x, HostTable):
            return x
        if isinstance(x, PackedMatrix):
            raise ConfigError("tables = 'host': the tables are quantized; load the model without quantize")
        if len(x.devices()) > 1:
            raise ConfigError("tables = 'host': the model lies on several devices; load it on one, without a mesh")
        return host_table(np.asarray(x), next(iter(x.devices())))

    params = nnx.to_pure_dict(state)
    params = jax.tree.map_with_path(on_host, params, is_leaf=lambda x: isinstance(x, PackedMatrix | HostTable))
    result = nnx.merge(graphdef, params)
    return with_folded_tables(result) if model.config.spec.table_maps else result


def fetched_bytes(model: LanguageModel) -> int:
    """Bytes of the rows that one token fetches from the host in all layers."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, HostTable))
    return sum(x.row_bytes for x in leaves if isinstance(x, HostTable))


def with_implementation(
    model: Model, implementation: str | None = None, *, output: str | None = None, step: str | None = None
) -> Model:
    """The same model, sharing its arrays, with named implementations; None leaves one as it is.

    Args:
      implementation: of its WKV operator.
      output: of what follows it (`ModelConfig.output_implementation`).
      step: of a single token of both (`ModelConfig.step_implementation`).
    """
    named = {"wkv_implementation": implementation, "output_implementation": output, "step_implementation": step}
    named = {name: value for name, value in named.items() if value is not None}
    result = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(result):
        if isinstance(config := getattr(module, "config", None), ModelConfig):
            module.config = dataclasses.replace(config, **named)  # pyright: ignore[reportAttributeAccessIssue]
    return result


def prefill_implementation(config: ModelConfig, platform: str) -> tuple[str | None, str]:
    """Chooses the WKV implementation for prefill, where nothing is differentiated.

    Returns:
      Its name, or None for the same as in training; and the reason, in a sentence.
    """
    if config.wkv_implementation is not None:
        return None, "the model's config names one"
    return config.spec.prefill_implementation(platform)
