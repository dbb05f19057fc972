"""Where a loaded model has its tables by token: as they are, folded, or in the host's memory."""

from __future__ import annotations

import typing
from typing import Literal

from jax.sharding import Mesh

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel, model_type
from rwkv_jax.models.decoding import require_tables, with_host_tables
from rwkv_jax.models.folded_tables import require_folding, with_folded_tables
from rwkv_jax.weights.tensors import WeightsError

Tables = Literal["device", "folded", "host"]


def check_tables(tables: Tables, mesh: Mesh | None, quantize: str | None) -> None:
    """Raises WeightsError for another value, and for one that does not go with a mesh or packed matrices."""
    if tables not in (known := typing.get_args(Tables)):
        raise WeightsError(f"tables = {tables!r}: must be one of {', '.join(known)}")
    if tables == "host" and mesh is not None:
        raise WeightsError("tables = 'host': is for a model on one device; leave it out, or mesh")
    if tables != "device" and quantize is not None:
        raise WeightsError(f"tables = {tables!r}: tables are packed by quantize = {quantize!r}; leave one of them out")


def check_model(tables: Tables, config: ModelConfig) -> None:
    """Raises ConfigError, before anything is loaded, for a model that has nothing which could lie there."""
    if tables == "folded":
        require_folding(config)
    elif tables == "host":
        require_tables(model_type(config), config)


def with_tables(model: LanguageModel, tables: Tables) -> LanguageModel:
    """The model with its tables there; raises ConfigError as `with_folded_tables` and `with_host_tables`."""
    forms = {"folded": with_folded_tables, "host": with_host_tables}
    return forms[tables](model) if tables in forms else model
