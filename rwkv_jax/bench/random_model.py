"""Models with random weights and a matching tokenizer, for measurements and comparisons with other libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx
from numpy.typing import NDArray
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import SavedTokenizer, Tokenizer
from rwkv_jax.models import LanguageModel, abstract_model
from rwkv_jax.weights.official import official_shapes, place_params
from rwkv_jax.weights.quantized import Quantization, place_quantized_params


def random_model(config: ModelConfig, quantize: Quantization | None = None, seed: int = 0) -> LanguageModel:
    """A model with random weights, determined by the seed; as fast as a trained one.

    Args:
      config: its dtype is used for parameters and computation.
      quantize: as in `from_pretrained`.
    """
    tensors = RandomTensors(config, seed)
    if quantize is None:
        params = place_params(tensors, config, dtype=config.dtype)
    else:
        params = place_quantized_params(tensors, config, quantize)
    return nnx.merge(abstract_model(config)[0], params)


class RandomTensors(Mapping[str, NDArray]):
    """float32 tensors of a model under official names, drawn on access, determined by the seed.

    Their scales are like those of trained models, so that each tensor affects the logits, which are neither constant
    nor chaotic. With the official initial values every block's output is zero, which would hide errors.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._shapes = official_shapes(config)
        self._seeds = dict(zip(self._shapes, np.random.SeedSequence(seed).spawn(len(self._shapes)), strict=True))

    def __getitem__(self, name: str) -> NDArray:
        shape = self._shapes[name]
        normal = np.random.default_rng(self._seeds[name]).standard_normal(shape, np.float32)
        mean, deviation = _mean_and_deviation(name, shape)
        return np.float32(mean) + np.float32(deviation) * normal

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _mean_and_deviation(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values, by its official name."""
    *module, parameter = name.split(".")
    if module[-1].startswith("ln"):
        return (1.0 if parameter == "weight" else 0.0), 0.2
    if name == "emb.weight":
        return 0.0, 1.0
    if parameter == "weight":  # [out, in]
        # Small block outputs, or rounding errors would grow from layer to layer.
        writes = module[-1] == "output" or module[-2:] == ["ffn", "value"]
        return 0.0, (0.3 if writes else 1.0) * shape[-1] ** -0.5
    if parameter.endswith(("1", "2")):  # of low rank, [in, out]
        return 0.0, shape[-2] ** -0.5
    if parameter.startswith(("x_", "time_mix_", "time_maa_")):
        return 0.5, 0.3
    return (-1.0, 1.0) if parameter in ("w0", "time_decay") else (0.0, 0.5)


class NumberTokenizer(Tokenizer):
    """Token 17 is the text "17 ", token 0 is end_of_text."""

    def __init__(self, vocab_size: int) -> None:
        table = [b"", *(f"{token} ".encode() for token in range(1, vocab_size))]
        record = json.dumps({"kind": "numbers", "vocab_size": vocab_size})  # which nothing loads
        super().__init__(table, 0, SavedTokenizer("tokenizer.kind.json", record.encode()))

    @override
    def encode(self, text: str) -> list[int]:
        """Ids of a text of numbers separated by spaces."""
        return [int(word) for word in text.split()]
