"""Loads models, with adapters or without."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from rwkv_jax.models import LanguageModel
from rwkv_jax.tuning.adapter import Adapter, AdapterError, combined
from rwkv_jax.tuning.files import open_adapter
from rwkv_jax.tuning.grafting import adapted_model
from rwkv_jax.tuning.merge import checked_weights
from rwkv_jax.weights import pretrained
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.official import official_shapes, official_tensors, require_official_names
from rwkv_jax.weights.pretrained import ComputeDtype, load_run
from rwkv_jax.weights.quantized import Quantization
from rwkv_jax.weights.sources import find_weights, open_weights
from rwkv_jax.weights.table_places import Tables

AdapterSource = str | os.PathLike[str] | Adapter


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: ComputeDtype | None = None,
    mesh: Mesh | None = None,
    quantize: Quantization | None = None,
    context_length: int | None = None,
    tables: Tables = "device",
    revision: str | None = None,
    sha256: str | None = None,
    adapter: AdapterSource | Sequence[AdapterSource] | None = None,
    adapter_alpha: float | None = None,
    adapter_init: str | os.PathLike[str] | None = None,
    adapter_weights: Sequence[float] | None = None,
    allow_other_base: bool = False,
) -> LanguageModel:
    """Loads a model from weights; generation and sizes are inferred from names and shapes.

    Files are official `.pth` (never unpickled: nothing in them can run), safetensors under official names, and the
    layouts of transformers (RWKV-4), flash-linear-attention (RWKV-6, 7) and RWKV's own folders on the hub (RWKV-7);
    besides, folders of Llama 2 and 3, Qwen2 and Qwen3 (safetensors and config.json). They are memory-mapped, and each
    tensor is copied straight to the devices that hold it; one that is to be packed is packed first, and all layers of a
    parameter are copied together. Of a run of `rwkv train` the newest checkpoint is taken.

    Args:
      source: a file, a folder, or OWNER/NAME or OWNER/NAME/FILE on the Hugging Face hub (extra `hub`).
      dtype: of parameters and computation. None keeps the file's parameters bit for bit, and
        computes in bfloat16 for a bfloat16 file, in float64 for a float64 one, and in float32 otherwise.
      mesh: devices over which matrices are split: as in training on a mesh of `rwkv_jax.parallel.mesh`, over
        all of its devices on any other; None is the first device.
      quantize: "int8", "int4" or "bfloat16" quantizes matrices, with everything else in float32
        (`rwkv_jax.weights.quantized`); the model then computes in float32, or in `dtype`. None keeps them unchanged,
        so that a file of packed matrices gives a model of packed matrices.
      context_length: tokens for which a Transformer's or Llama's state has room; None is the run's, or what the
        config.json allows, up to `weights.hugging_face.MAX_CONTEXT`.
      tables: where layers' tables by token are, of RWKV-7a, 7b and 8-rc00. "folded" adds to their rows what the layers
        of 7a and 7b would add (`models/folded_tables.py`); "host" does, too, and keeps them in the host's memory, of
        which a step fetches the rows of its tokens. Such models are for inference and not saved.
      revision: branch, tag or commit of a model on the hub, of which all files are then taken; None is its main branch.
      sha256: SHA-256 in hex that the file of weights must have, compared before it is opened: as `sha256sum` prints it,
        and of the lines that it prints for the files of a sharded one (`weights.pinned.hash_of_weights`).
      adapter: what `rwkv_jax.tuning.open_adapter` reads, one or several; not merged, so that the base stays as it is
        (in 4 bits, say). None is the model alone.
      adapter_alpha, adapter_init: of adapter files that lack them (RWKV-PEFT's), as in `open_adapter`.
      adapter_weights: of what each adapter adds; None is 1.
      allow_other_base: whether an adapter's base may have had other numbers, as long as the shapes are the same.

    Returns:
      `model(tokens, state) -> (logits, state)`; see its `config`.

    Raises:
      WeightsError: the weights do not exist or are of no such model; one message lists all missing, unexpected and
        misshapen tensors. Or incompatible options, or another SHA-256 than was asked for.
      AdapterError: an adapter is not whole, or not of this base.
      UnsafeFileError: the file contains anything but plain tensors.
    """
    pins: dict[str, Any] = {"revision": revision, "sha256": sha256}
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "quantize": quantize, "context_length": context_length}
    options["tables"] = tables
    if adapter is None:
        given = {"adapter_alpha": adapter_alpha, "adapter_init": adapter_init, "adapter_weights": adapter_weights}
        for name, value in given.items():
            if value is not None:
                raise AdapterError(f"{name} = {value!r}: there is no adapter; give one, or leave it out")
        return pretrained.from_pretrained(source, **options, **pins)
    is_one = isinstance(adapter, str | os.PathLike | Adapter)
    sources: list[AdapterSource] = [adapter] if is_one else list(adapter)  # pyright: ignore[reportAssignmentType]
    adapters = [
        each if isinstance(each, Adapter) else open_adapter(each, alpha=adapter_alpha, init=adapter_init)
        for each in sources
    ]
    weights = checked_weights(adapters, adapter_weights)
    place = find_weights(source, **pins)
    model = pretrained.from_pretrained(place, **options)
    check_for(model, adapters, place, allow_other_base=allow_other_base)
    return adapted_model(model, combined(adapters, weights, official_shapes(model.config)))


def check_for(
    model: LanguageModel,
    adapters: Sequence[Adapter],
    source: str | os.PathLike[str],
    *,
    which: Literal["newest", "best"] = "newest",
    ema: bool = False,
    allow_other_base: bool = False,
) -> None:
    """Holds adapters against a model, and their bases against the file or run that the model was loaded from.

    Args:
      which, ema: of a run, what the model was loaded from, as in `load_run`.

    Raises as `Adapter.check_base`, and WeightsError for an architecture without official names.
    """
    require_official_names(model.config)
    shapes = official_shapes(model.config)
    digest = functools.cache(lambda: digest_of_source(find_weights(source), which, ema=ema))
    for adapter in adapters:
        adapter.check_base(shapes, digest, allow_other_base=allow_other_base)


def digest_of_source(path: Path, which: Literal["newest", "best"] = "newest", *, ema: bool = False) -> str:
    """`weights_digest` of a file of weights, or of a run's checkpoint, as `load_run` loads it."""
    if path.is_dir():
        loaded = load_run(path, which, ema=ema)
        return weights_digest(official_tensors(loaded.config.model, loaded.params))
    return weights_digest(open_weights(path, warn=False).tensors)
