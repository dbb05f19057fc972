"""RWKV in JAX: models, training, loading and saving weights, inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.checks import ConfigError
    from rwkv_jax.config import ModelConfig, TrainConfig
    from rwkv_jax.data.tokenizers import load_tokenizer
    from rwkv_jax.inference import Engine, SamplingParams
    from rwkv_jax.models import RWKV4, RWKV5, RWKV6, RWKV7, Transformer
    from rwkv_jax.training import train
    from rwkv_jax.tuning import from_pretrained
    from rwkv_jax.weights import save_pretrained

    __version__: str

__all__ = [
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "ConfigError",
    "Engine",
    "ModelConfig",
    "SamplingParams",
    "TrainConfig",
    "Transformer",
    "__version__",
    "from_pretrained",
    "load_tokenizer",
    "save_pretrained",
    "train",
]

_get_name, _dir = lazy_names(
    __name__,
    {
        "checks": ("ConfigError",),
        "config": ("ModelConfig", "TrainConfig"),
        "data.tokenizers": ("load_tokenizer",),
        "inference": ("Engine", "SamplingParams"),
        "models": ("RWKV4", "RWKV5", "RWKV6", "RWKV7", "Transformer"),
        "training": ("train",),
        "tuning": ("from_pretrained",),
        "weights": ("save_pretrained",),
    },
)


def __getattr__(name: str) -> Any:
    return _version() if name == "__version__" else _get_name(name)


def __dir__() -> list[str]:
    return sorted({*_dir(), "__version__"})


def _version() -> str:
    import importlib.metadata  # takes as long as all the rest of the interpreter's start

    try:
        return importlib.metadata.version("rwkv-jax")
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "0+unknown"
