"""Loads, saves and converts models."""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError, ModelConfig, from_dict
from rwkv_jax.data.tokenizers import (
    TOKENIZER_FILES,
    HuggingFaceTokenizer,
    Tokenizer,
    chat_template_beside,
    fits_model,
    load_tokenizer,
)
from rwkv_jax.models import LanguageModel, abstract_model
from rwkv_jax.models.tuned import merge_nested, merged_params
from rwkv_jax.run_folder import BASE, LoadedModel, load_model, load_run_tokenizer, read_run_file
from rwkv_jax.weights.base import place_base
from rwkv_jax.weights.card import About, Provenance
from rwkv_jax.weights.derived import MAX_VOCABULARY, add_unused, may_have_unused, resized, selected, without_unused
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.ggml.vocabulary import tokenizer_for_gguf, tokenizer_in
from rwkv_jax.weights.hugging_face import hub_ends
from rwkv_jax.weights.model_difference import model_difference
from rwkv_jax.weights.official import (
    check_tensors,
    named_tensors,
    official_shapes,
    official_tensors,
    place_params,
    require_official_names,
    shardings_on,
)
from rwkv_jax.weights.provenance import provenance_of, provenance_of_source
from rwkv_jax.weights.quantized import (
    QUANTIZATIONS,
    DequantizedTensors,
    Quantization,
    has_packed,
    packed_tensors,
    place_quantized_params,
)
from rwkv_jax.weights.sources import Weights, find_weights, open_weights, prefix_errors
from rwkv_jax.weights.table_places import Tables, check_model, check_tables, with_tables
from rwkv_jax.weights.tensors import MappedTensors, WeightsError
from rwkv_jax.weights.writing import GGUF, check_license_for, write_weights

ComputeDtype = Literal["float32", "bfloat16", "float64"]

_HAVE_NO_TOKENIZER = (".pth", ".safetensors")


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
) -> LanguageModel:
    """`rwkv_jax.from_pretrained` without adapters, of which this package knows nothing; arguments as there."""
    if quantize not in (None, *QUANTIZATIONS):
        raise WeightsError(f"quantize = {quantize!r}: must be None or one of {', '.join(QUANTIZATIONS)}")
    if dtype not in (None, *typing.get_args(ComputeDtype)):
        raise WeightsError(f"dtype = {dtype!r}: must be None or one of {', '.join(typing.get_args(ComputeDtype))}")
    check_tables(tables, mesh, quantize)
    path = find_weights(source, revision=revision, sha256=sha256)
    room = {} if context_length is None else {"context_length": context_length}
    return with_tables(_loaded(path, dtype, mesh, quantize, room, tables), tables)


def _loaded(
    path: Path, dtype: Any, mesh: Mesh | None, quantize: Quantization | None, room: dict[str, int], tables: Tables
) -> LanguageModel:
    """The model of a file or run that may have such tables; those of a file for the host are never on a device."""
    if path.is_dir():
        if tables != "device":
            check_model(tables, from_dict(read_run_file(path)["config"]).model)
        shardings = None if mesh is None else functools.partial(shardings_on, mesh)
        loaded = load_run(path, "newest", shardings)
        model = dataclasses.replace(loaded.config.model, **room)
        if quantize is not None:
            if not model.spec.packs:
                what = f"{path} is a run of {model.spec.a_title}, whose matrices are not packed; leave it out"
                raise WeightsError(f"quantize = {quantize!r}: {what}")
            return _quantized(named_tensors(model, loaded.params), model, quantize, dtype, mesh)
        if dtype is None:
            return nnx.merge(abstract_model(model)[0], loaded.params)
        if dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise WeightsError("dtype = 'float64', which JAX has switched off; set jax_enable_x64, or give another")
        config = dataclasses.replace(model, dtype=dtype)
        return nnx.merge(abstract_model(config)[0], jax.tree.map(lambda x: x.astype(dtype), loaded.params))
    weights = open_weights(path)
    with prefix_errors(path):
        config = dataclasses.replace(weights.model_config(), **room)
        check_model(tables, config)
        check_tensors(weights.tensors, config)
        if isinstance(weights.tensors, DequantizedTensors):
            present = weights.tensors.quantization
            if quantize not in (None, present):
                raise WeightsError(f"quantize = {quantize!r}: the file is {present} already; leave it out")
            quantize = present
        if quantize is not None:
            return _quantized(weights.tensors, config, quantize, dtype, mesh, weights.drop_pages)
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
        shardings = None if mesh is None else shardings_on(mesh, config)
        options: dict[str, Any] = {"dtype": dtype, "shardings": shardings, "tables_on_host": tables == "host"}
        params = place_params(weights.tensors, config, drop_pages=weights.drop_pages, **options)
        return nnx.merge(abstract_model(config)[0], params)


def _quantized(
    tensors: Mapping[str, NDArray],
    config: ModelConfig,
    quantize: Quantization,
    dtype: ComputeDtype | None,
    mesh: Mesh | None,
    drop_pages: Callable[[], None] = lambda: None,
) -> LanguageModel:
    if mesh is not None:
        raise WeightsError(f"quantize = {quantize!r}: packed matrices are on one device; leave quantize out, or mesh")
    if dtype == "float64":
        raise WeightsError(f"quantize = {quantize!r}: does not go with dtype = 'float64'; leave one of them out")
    config = dataclasses.replace(config, dtype=dtype or "float32")
    return nnx.merge(abstract_model(config)[0], place_quantized_params(tensors, config, quantize, drop_pages))


def check_initial_weights(source: str | os.PathLike[str], config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Checks weights against the model and tokenizer of a run that is to start from them; reads no tensor data.

    Raises:
      WeightsError: they are of another generation or size (each difference is listed, and how to set it), the tokenizer
        saved with them is another one, or they do not exist.
    """
    path = find_weights(source)
    weights_for(path, config)
    beside = find_tokenizer(path, config.vocab_size)
    if beside is not None and beside.fingerprint != tokenizer.fingerprint:
        folder = path if path.is_dir() else path.parent
        raise WeightsError(
            f"{path}: was trained with the tokenizer that lies beside it, and data.tokenizer is another one; "
            f"to start from these weights: --data.tokenizer {folder}"
        )


def initial_params(source: str | os.PathLike[str], config: ModelConfig, shardings: Any = None) -> Any:
    """The initial parameters of a run that starts from weights, in the dtype in which it trains them.

    Args:
      shardings: where each goes, a nested dict; None is the first device.

    Raises:
      WeightsError: as `check_initial_weights`.
    """
    weights = weights_for(find_weights(source), config, warn=False)
    return place_params(
        weights.tensors, config, dtype=config.parameter_dtype, shardings=shardings, drop_pages=weights.drop_pages
    )


def weights_for(path: Path, config: ModelConfig, *, warn: bool = True) -> Weights:
    """The tensors of weights that a model is to start from, as it has them.

    Raises:
      WeightsError: as `check_initial_weights`.
    """
    weights = open_model(path, warn=warn)
    with prefix_errors(path):
        own = weights.model_config()
        if may_have_unused(own) and may_have_unused(config):  # the run's config decides, not the file
            unused = config.unused_value_residual
            tensors = add_unused(weights.tensors, own) if unused else without_unused(weights.tensors)
            weights = weights._replace(tensors=tensors)
            own = dataclasses.replace(own, unused_value_residual=unused)
        if difference := model_difference(own, config):
            raise WeightsError(f"these weights are of another model: {difference}")
        check_tensors(weights.tensors, config)
    return weights


def open_model(path: Path, *, warn: bool = True) -> Weights:
    """The tensors of any model: of a file, or of a run's newest checkpoint, whatever its architecture.

    Args:
      path: from `find_weights`.

    Raises:
      WeightsError: as `open_weights` or `load_run`.
    """
    if not path.is_dir():
        return open_weights(path, warn=warn)
    loaded = load_run(path, "newest")
    tensors = named_tensors(loaded.config.model, loaded.params)
    return Weights(tensors, "official", lambda: None, MappedTensors({}, []), loaded.config.model)


def load_run(
    run_dir: Path,
    which: Literal["newest", "best"],
    shardings: Callable[[ModelConfig], Any] | None = None,
    *,
    ema: bool = False,
) -> LoadedModel:
    """`run_folder.load_model`, of a tuning run with its base: adapters merged, everything in float32.

    Raises:
      WeightsError: as `check_initial_weights`, of the base, or its numbers are others than in training.
    """
    loaded = load_model(run_dir, which, shardings, ema=ema)
    config = loaded.config
    if not config.tuning.is_partial:
        return loaded
    assert config.initial_weights is not None  # as the config has checked
    placed = None if shardings is None else shardings(config.model)
    try:
        weights = weights_for(find_weights(config.initial_weights), config.model, warn=False)
    except WeightsError as error:
        raise WeightsError(f"{run_dir} is a tuning run, whose base cannot be read: {error}") from error
    recorded, found = read_run_file(run_dir)["identity"][BASE], weights_digest(weights.tensors)
    if found != recorded and not config.tuning.allow_other_base:
        raise WeightsError(
            f"{run_dir}: was trained on another base than {config.initial_weights} holds now ({recorded[:16]}..., "
            f"now {found[:16]}...); put the file back that was there"
        )
    base = place_base(weights, config.tuning, config.model, loaded.params, placed)
    if placed is not None:
        whole = jax.tree.map(lambda sharding: NamedSharding(sharding.mesh, PartitionSpec()), placed)
        first = jax.tree.leaves(whole)[0]
        loaded = loaded._replace(params=jax.device_put(loaded.params, first))
    merge = functools.partial(merged_params, tuning=config.tuning, model=config.model)
    params = jax.jit(merge, out_shardings=placed)(merge_nested(base, loaded.params))
    return loaded._replace(params=params)


def save_pretrained(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    layout: str = "official",
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    license: str | None = None,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model's weights atomically; nothing is overwritten. A folder also gets a model card, README.md.

    Args:
      path: FILE.pth or FILE.safetensors, or a folder, which gets model.safetensors (in shards of 5 GB if it is larger);
        or FILE.gguf for llama.cpp, of RWKV-6 and 7, which needs the package gguf.
      layout: naming of the tensors: official, transformers (RWKV-4), flash-linear-attention (RWKV-6, 7), or huggingface
        (RWKV-7, as the RWKV organization has it on the hub); all but the first are folders with a config.json.
      dtype: float32, bfloat16, float16 or float64, to cast tensors to; None keeps them unchanged. GGUF files may be of
        q8_0, matrices in 8 bits.
      tokenizer: written into the folder, where `load_tokenizer` finds it, with huggingface as transformers reads it, if
        that form exists; or into a GGUF file, which can hold World and bytes, and has World's without one where the
        model has 65536 ids.
      license: for the card of a folder, the hub's identifier, such as apache-2.0. With None it says that none is
        stated, and `rwkv push` asks for one.
      source: what the model was loaded from, a run, a file or OWNER/NAME on the hub, of which the card of a folder says
        what is known: how it was trained, on what data, and what it reached.

    A model of packed matrices is written as stored, to safetensors under official names.

    Raises:
      WeightsError: the path exists, the layout does not have this generation, packed matrices have no place there, or
        the license is no identifier.
    """
    check_license_for(Path(path), license)
    provenance = Provenance() if source is None else provenance_of_source(source)
    if tokenizer is not None and not fits_model(tokenizer, model.config.vocab_size):
        raise WeightsError(
            f"tokenizer: has {tokenizer.vocab_size} entries where the model has {model.config.vocab_size}; use its own"
        )
    require_official_names(model.config)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tensors: Mapping[str, NDArray]
    if has_packed(params):
        if layout != "official" or dtype is not None or Path(path).suffix.lower() in (".pth", GGUF):
            raise WeightsError(
                f"{path}: packed matrices are written as they are, to FILE.safetensors or a folder, without layout and "
                "dtype; for other files load the model without quantize"
            )
        tensors = packed_tensors(model.config, params)
        provenance = dataclasses.replace(provenance, relation="quantized")
    else:
        tensors = official_tensors(model.config, params)
    if tokenizer is None and Path(path).suffix.lower() == GGUF:
        tokenizer = tokenizer_for_gguf(Path(path), None, model.config.vocab_size)
    write_weights(tensors, model.config, Path(path), layout, dtype, tokenizer, About(license, provenance))


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str = "official",
    dtype: str | None = None,
    tokenizer: str | None = None,
    with_unused: bool = False,
    ema: bool = False,
    resize_vocab: int | None = None,
    cut_used: bool = False,
    change: Callable[[Mapping[str, NDArray], ModelConfig], Mapping[str, NDArray]] | None = None,
    changed: str | None = None,
    license: str | None = None,
) -> ModelConfig:
    """Converts weights tensor by tensor, without building a model, so that size does not matter.

    Args:
      source, target, layout, dtype: as in `from_pretrained` and `save_pretrained`.
      tokenizer: what `load_tokenizer` takes, to be written into the target folder or GGUF file; None takes the one of
        the weights, unless the target is a file that has no room for it. A chat template of other people's that lies
        beside the weights is written into a folder, too.
      with_unused: writes RWKV-7's blocks.0.att.v0, v1 and v2, zeros if the source lacks them: nothing uses them, but
        the official trainer loads no file without them.
      ema: takes the averages of a run's weights (training.ema_decay).
      resize_vocab: cuts rows of ids from the end of embedding and head or adds some, as `resized` says. A tokenizer of
        the source that does not fit then is not written.
      cut_used: also cuts rows of ids that the source's tokenizer has.
      change: from the official tensors and the model's config to the tensors to write, under the same names.
      changed: what that does, for the model card: they then are a fine-tuned form of the source.
      license: as in `save_pretrained`.

    Returns:
      The config of the model.

    Raises:
      WeightsError: as `from_pretrained` and `save_pretrained`.
    """
    check_license_for(Path(target), license)
    path = find_weights(source)
    # A mismatched tokenizer beside the weights does not matter if another is written, or none.
    takes_beside = tokenizer is None and Path(target).suffix.lower() not in _HAVE_NO_TOKENIZER
    config, tensors, provenance = _official(path, ema)
    if resize_vocab is not None:
        own = _check_cut(path, config.vocab_size, resize_vocab, cut_used=cut_used)
        tensors = resized(tensors, config, resize_vocab)
        config = dataclasses.replace(config, vocab_size=resize_vocab)
    else:
        own = find_tokenizer(path, config.vocab_size) if takes_beside else None
    found = own if takes_beside and own is not None and fits_model(own, config.vocab_size) else None
    if tokenizer is not None:
        found = load_tokenizer(tokenizer, config.vocab_size)
    elif Path(target).suffix.lower() == GGUF:
        found = tokenizer_for_gguf(path, own, config.vocab_size)
    if with_unused:
        if layout != "official" or not may_have_unused(config):
            raise WeightsError(
                f"with_unused = True: only RWKV-7 in the official layout has such tensors, not {config.title} in the "
                f"{layout} layout; leave it out"
            )
        tensors = add_unused(tensors, config)
        config = dataclasses.replace(config, unused_value_residual=True)
    if change is not None:
        tensors = change(tensors, config)
    told = {"cast to": dtype, "vocabulary made": resize_vocab, "": changed}
    changes = tuple(f"{what} {value}".strip() for what, value in told.items() if value is not None)
    relation = provenance.relation if changed is None else "finetune"
    provenance = dataclasses.replace(provenance, changes=changes, relation=relation)
    has_template = not path.is_dir() and Path(target).suffix.lower() not in (*_HAVE_NO_TOKENIZER, GGUF)
    template = _template_beside(path) if has_template else None
    write_weights(tensors, config, Path(target), layout, dtype, found, About(license, provenance), template)
    return config


def _template_beside(path: Path) -> str | None:
    try:
        return chat_template_beside(path.parent)
    except ConfigError as error:
        raise WeightsError(f"{error}, or move it away to convert without a template") from error


def _official(path: Path, ema: bool) -> tuple[ModelConfig, Mapping[str, NDArray], Provenance]:
    """The model of weights or a run, its official tensors in their order, and what is known of where it is from."""
    if path.is_dir():
        loaded = load_run(path, "newest", ema=ema)
        model = loaded.config.model
        require_official_names(model)
        return model, official_tensors(model, loaded.params), provenance_of(path, step=loaded.step, ema=ema)
    if ema:
        raise WeightsError(f"ema = True: {path} is no run, which alone has averages of its weights; leave it out")
    weights = open_weights(path)
    with prefix_errors(path):
        config = weights.model_config()
        require_official_names(config)
        check_tensors(weights.tensors, config)
    # Official files keep their order; other projects' files get the official one.
    is_official = weights.layout == "official"
    tensors = weights.tensors if is_official else selected(weights.tensors, official_shapes(config))
    return config, tensors, provenance_of(path)


def _check_cut(path: Path, old: int, new: int, *, cut_used: bool) -> Tokenizer | None:
    """The tokenizer of a source whose vocabulary is resized; WeightsError if ids that it uses would be cut."""
    if not 1 <= new <= MAX_VOCABULARY:
        raise WeightsError(f"resize_vocab = {new}: must be from 1 to {MAX_VOCABULARY}")
    tokenizer = find_tokenizer(path, old)
    if tokenizer is not None and new < tokenizer.vocab_size and not cut_used:
        raise WeightsError(
            f"resize_vocab = {new}: the tokenizer of {path} has {tokenizer.vocab_size} ids, whose rows would be cut; "
            "name as many, or set cut_used"
        )
    return tokenizer


def find_tokenizer(path: Path, vocab_size: int, named: str | None = None) -> Tokenizer | None:
    """The tokenizer that is named, as `load_tokenizer` takes it; or that of a run, one in or beside a file, or None.

    Texts of Llamas and Qwens begin and end as the files beside them say (`HuggingFaceTokenizer.of_hub_model`).

    Raises:
      ConfigError: there is one that does not fit the vocabulary, or a run's has changed.
    """
    if path.is_dir():
        return load_run_tokenizer(path) if named is None else load_tokenizer(named, vocab_size)
    if named is None and (own := tokenizer_in(path, vocab_size)) is not None:
        return own
    if named is None and not any((path.parent / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = load_tokenizer(path.parent if named is None else named, vocab_size)
    if isinstance(tokenizer, HuggingFaceTokenizer) and (ends := hub_ends(path.parent)) is not None:
        return tokenizer.of_hub_model(ends)
    return tokenizer
