"""The generations of RWKV, and what to compare them with, as Flax NNX modules.

Each generation's file is complete, to be read beside its paper: what two papers have in common, such as channel mixing,
is repeated in both files. Code that is not an equation of a paper is shared: layers.py, state.py, language_model.py.
"""

from __future__ import annotations

import functools
from typing import Any

from flax import nnx

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.deltanet import DeltaNet
from rwkv_jax.models.gated_deltanet import GatedDeltaNet
from rwkv_jax.models.gla import GLA
from rwkv_jax.models.language_model import LanguageModel
from rwkv_jax.models.llama import Llama
from rwkv_jax.models.lstm import LSTM
from rwkv_jax.models.mamba2 import Mamba2
from rwkv_jax.models.rnn import RNN
from rwkv_jax.models.rwkv4 import RWKV4
from rwkv_jax.models.rwkv5 import RWKV5
from rwkv_jax.models.rwkv6 import RWKV6
from rwkv_jax.models.rwkv7 import RWKV7
from rwkv_jax.models.transformer import Transformer


def model_type(config: ModelConfig) -> type[LanguageModel]:
    """The model class of a config."""
    return config.spec.load_model_class()


@functools.cache
def abstract_model(config: ModelConfig) -> tuple[Any, Any]:
    """A model's static part and the shapes of its parameters, as a nested dict; allocates nothing."""
    abstract = nnx.eval_shape(lambda: model_type(config)(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


__all__ = [
    "GLA",
    "LSTM",
    "RNN",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "DeltaNet",
    "GatedDeltaNet",
    "LanguageModel",
    "Llama",
    "Mamba2",
    "Transformer",
    "abstract_model",
    "model_type",
]
