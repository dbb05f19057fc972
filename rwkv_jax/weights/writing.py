"""Writes official tensors as files and folders, in any layout."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from numpy.typing import NDArray

from rwkv_jax.atomic import new_folder, refuse_existing
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import CHAT_TEMPLATE, TOKENIZER_FILES, Tokenizer, hugging_face_files, save_tokenizer
from rwkv_jax.file_kinds import is_url
from rwkv_jax.versions import versions
from rwkv_jax.weights.card import CARD_FILE, About, Files, check_license, model_card
from rwkv_jax.weights.derived import rounded
from rwkv_jax.weights.ggml.vocabulary import vocabulary_for
from rwkv_jax.weights.ggml.writing import QUANTIZED, write_gguf
from rwkv_jax.weights.hub_rwkv7 import KEEPS_UNUSED
from rwkv_jax.weights.hub_rwkv7 import LAYOUT as HUGGINGFACE
from rwkv_jax.weights.layouts import LAYOUTS, hub_config, to_layout
from rwkv_jax.weights.model_config import UNUSED
from rwkv_jax.weights.official import fields_in_metadata
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.tensors import WeightsError, tensor_spec

_LOG = logging.getLogger(__name__)

GGUF = ".gguf"
"""Suffix of files for llama.cpp."""

_METADATA = {"format": "pt"}  # required by transformers
_FILES = (".pth", ".safetensors")
_WRITTEN = "FILE.pth, FILE.safetensors, FILE.gguf or a folder"
_NO_FOLDERS = (".bin", ".ckpt", ".json", ".npz", ".pt", ".st", ".zip")  # suffixes of other formats


def check_license_for(path: Path, license: str | None) -> None:
    """Raises WeightsError for what is no license, or one for a path that has no card to state it; None is neither."""
    if license is None:
        return
    check_license(license)
    if path.suffix.lower() in (GGUF, *_FILES):
        raise WeightsError(
            f"license = {license!r}: only a folder has a model card, which states it; name a folder, or leave it out"
        )


def write_weights(
    tensors: Mapping[str, NDArray],
    model: ModelConfig,
    path: Path,
    layout: str,
    dtype: str | None,
    tokenizer: Tokenizer | None,
    about: About | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes official tensors to a file or folder, as `save_pretrained` says, of any size.

    Args:
      about: what the model card of a folder says besides.
      chat_template: of other people's, to be written into a folder.
    """
    about = about or About()
    check_license_for(path, about.license)
    if layout not in LAYOUTS:
        raise WeightsError(f"layout = {layout!r}: must be one of {', '.join(LAYOUTS)}")
    suffix = path.suffix.lower()
    if suffix in _NO_FOLDERS:
        raise WeightsError(f"{path}: {suffix} files are not written; name {_WRITTEN}")
    if dtype == QUANTIZED and suffix != GGUF:
        raise WeightsError(f"dtype = {dtype!r}: is for FILE.gguf; for other files, leave it out and set quantize")
    if dtype is not None and suffix != GGUF:
        tensors = rounded(tensors, dtype)
    path = path.expanduser()
    if is_url(path):
        raise WeightsError(f"{path}: is a web address, not a path; name {_WRITTEN}")
    told = fields_in_metadata(model)
    if told and (suffix in (".pth", GGUF) or layout != "official"):
        named = ", ".join(f"model.{name} = True" for name in told)
        place = f"a {suffix} file" if suffix in (".pth", GGUF) else f"the {layout} layout"
        raise WeightsError(
            f"{path}: {named}, which {place} cannot say, so whoever loads it would compute something else; write the "
            "official layout to FILE.safetensors or a folder"
        )
    refuse_existing(path, WeightsError)  # reported before anything is fetched from a device
    if suffix == GGUF:
        if layout != "official":
            raise WeightsError(f"{path}: GGUF files have names of their own, not the {layout} layout's; leave it out")
        write_gguf(path, tensors, model, dtype, vocabulary_for(path, tokenizer))
        return
    if suffix in _FILES:
        if layout != "official":
            raise WeightsError(f"{path}: the {layout} layout is a folder with a config.json; name a folder")
        if tokenizer is not None:
            raise WeightsError(f"{path}: a tokenizer is written beside the weights; name a folder")
        if suffix == ".pth":
            write_torch_file(path, tensors)
        else:
            write_safetensors(path, tensors, _METADATA | told, is_model=True)
        return
    if layout == HUGGINGFACE and UNUSED[0] in tensors:
        told |= {KEEPS_UNUSED: "true"}
    written = to_layout(tensors, layout)
    config = None if layout == "official" else hub_config(layout, tensors)
    for_others: dict[str, bytes] = {}
    if layout == HUGGINGFACE and tokenizer is not None:
        for_others = _files_for_transformers(tokenizer, model, chat_template)
    with new_folder(path, WeightsError) as folder:
        weights = write_sharded_safetensors(folder, written, metadata=_METADATA | told)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, content in for_others.items():
            (folder / name).write_bytes(content)
        if tokenizer is not None and not for_others:
            save_tokenizer(tokenizer, folder)
        if chat_template is not None and not for_others:
            (folder / CHAT_TEMPLATE).write_bytes(chat_template.encode())
        files = _describe_files(path.name, layout, written, weights, tokenizer)
        (folder / CARD_FILE).write_text(model_card(model, files, about, versions()), encoding="utf-8")


def _files_for_transformers(tokenizer: Tokenizer, model: ModelConfig, chat_template: str | None) -> dict[str, bytes]:
    """The files of a tokenizer by name, as transformers reads them; none, with a warning, if it has no such form."""
    try:
        return hugging_face_files(tokenizer, vocab_size=model.vocab_size, chat_template=chat_template)
    except ConfigError as error:
        _LOG.warning("%s; it is written in a form that only rwkv-jax reads", error)
        return {}


def _describe_files(
    name: str, layout: str, written: Mapping[str, NDArray], weights: Path, tokenizer: Tokenizer | None
) -> Files:
    """What a folder of this name has."""
    specs = [tensor_spec(written, each) for each in written]
    told = None
    if tokenizer is not None:
        present = [each for each in TOKENIZER_FILES if weights.with_name(each).is_file()]
        told = f"{', '.join(present)}, {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}"
    return Files(
        name,
        layout,
        Counter(str(spec.dtype) for spec in specs),
        sum(spec.num_bytes for spec in specs),
        read_safetensors(weights).content_sha256,
        told,
    )
