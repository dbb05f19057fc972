"""Reads the config.json of Llama 2 and 3, Qwen2 and Qwen3, whose tensors do not tell all of a model.

Their folders on the Hugging Face hub have safetensors under the names of `transformers` (`layout_rules`, layout llama).
What a config turns on that `rwkv_jax.models.llama` does not compute is refused by name, never left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rwkv_jax.checks import is_number, is_whole
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.json_object import parse_object
from rwkv_jax.weights.tensors import WeightsError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"

MODEL_TYPES = ("llama", "qwen2", "qwen3")
"""Values of model_type that are read."""

MAX_CONTEXT = 4096
"""Tokens for which a state has room unless the config allows fewer; it is allocated whole."""

_MAX_BYTES = 2**20
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_hub_config(path: Path, *, dtype: Literal["float32", "bfloat16", "float64"] = "float32") -> ModelConfig:
    """The model of a config.json of `MODEL_TYPES`; both forms of rotary settings are known, new and old.

    Args:
      dtype: in which it computes, which the tensors tell.

    Raises:
      WeightsError: there is no such file, it is of another model, or turns on what is not computed here; all that is
        wrong is listed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}); these tensors do not tell heads and positions, so put the "
            "config.json beside them that came with them"
        ) from error
    fields = parse_object(content, path, WeightsError)
    kind = fields.get("model_type")
    if kind not in MODEL_TYPES:
        raise WeightsError(f"{path}: model_type = {kind!r}: only {', '.join(MODEL_TYPES)} are read under these names")
    positions = _rotary(fields)
    if wrong := [*_unsupported(fields, positions), *_wrong_numbers(fields, positions)]:
        raise WeightsError(f"{path}: " + "; ".join(wrong))
    heads = fields["num_attention_heads"]
    is_scaled = positions.get("rope_type", "default") != "default"
    try:
        return ModelConfig(
            architecture="llama",
            vocab_size=fields["vocab_size"],
            num_layers=fields["num_hidden_layers"],
            width=fields["hidden_size"],
            head_dim=_head_dim(fields),
            ffn_width=fields["intermediate_size"],
            context_length=min(fields.get("max_position_embeddings") or MAX_CONTEXT, MAX_CONTEXT),
            attention_heads=heads,
            kv_heads=fields.get("num_key_value_heads") or heads,
            rotary_base=float(positions.get("rope_theta", 10000.0)),
            rotary_scaling=tuple(float(positions[name]) for name in _SCALING) if is_scaled else None,  # pyright: ignore
            norm_epsilon=fields.get("rms_norm_eps", 1e-6),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            tied_head=bool(fields.get("tie_word_embeddings", False)),
            dtype=dtype,
        )
    except ConfigError as error:
        raise WeightsError(f"{path}: describes a model that cannot be: {error}") from error


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of positions under their newer names: rope_theta, rope_type and what belongs to the type."""
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(own := fields.get(name), dict):
            found |= own
    if "type" in found:
        found.setdefault("rope_type", found["type"])
    for name in ("rope_theta", "partial_rotary_factor"):
        if fields.get(name) is not None:
            found.setdefault(name, fields[name])
    return found


def _unsupported(fields: Mapping[str, Any], positions: Mapping[str, Any]) -> list[str]:
    """What the config turns on that is not computed here."""
    found = []
    if (kind := positions.get("rope_type", "default")) not in ("default", "llama3"):
        found.append(f"rope_type = {kind!r}: only default and llama3 are computed")
    if (share := positions.get("partial_rotary_factor", 1)) != 1:
        found.append(f"partial_rotary_factor = {share!r}: only whole heads are rotated")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if fields.get(name):
            found.append(f"{name} = {fields[name]!r}: is not computed")
    layers = fields.get("layer_types")
    if isinstance(layers, list) and (others := sorted({str(x) for x in layers} - {"full_attention"})):
        found.append(f"layer_types has {', '.join(others)}: only full_attention is computed")
    if (activation := fields.get("hidden_act", "silu")) not in ("silu", "swish"):
        found.append(f"hidden_act = {activation!r}: only silu is computed")
    if fields.get("quantization_config"):
        found.append("quantization_config is set: only unquantized files are read; quantize = 'int8' packs them here")
    return found


def _wrong_numbers(fields: Mapping[str, Any], positions: Mapping[str, Any]) -> list[str]:
    """What is missing or no number."""
    sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    others = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    numbers = [(name, fields.get(name), True) for name in sizes]
    numbers += [(name, fields[name], True) for name in others if fields.get(name) is not None]
    numbers += [("rms_norm_eps", fields.get("rms_norm_eps", 1e-6), False)]
    numbers += [("rope_theta", positions.get("rope_theta", 1e4), False)]
    if positions.get("rope_type") == "llama3":
        numbers += [(name, positions.get(name), False) for name in _SCALING]
    wrong = [
        f"{name} = {value!r}: must be a positive {'whole ' if whole else ''}number"
        for name, value, whole in numbers
        if not ((is_whole(value) if whole else is_number(value)) and value > 0)  # pyright: ignore[reportOptionalOperand]
    ]
    if not wrong and fields.get("head_dim") is None and fields["hidden_size"] % fields["num_attention_heads"]:
        wrong.append("num_attention_heads does not divide hidden_size, and there is no head_dim")
    return wrong


def _head_dim(fields: Mapping[str, Any]) -> int:
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def hub_positions(folder: Path) -> int | None:
    """The tokens that a folder's model can read, of a config.json that `read_hub_config` takes; None if not said."""
    return _object_in(folder / CONFIG_FILE).get("max_position_embeddings")


def hub_ends(folder: Path) -> frozenset[int] | None:
    """The ids with which a folder's model ends its texts: eos_token_id of generation_config.json, or of config.json.

    Returns:
      None if the folder is not of `MODEL_TYPES`; none of them if nothing is said.

    Raises:
      WeightsError: an id that is no whole number.
    """
    config = _object_in(folder / CONFIG_FILE)
    if config.get("model_type") not in MODEL_TYPES:
        return None
    said = _object_in(folder / GENERATION_FILE).get("eos_token_id", config.get("eos_token_id"))
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if not all(is_whole(token) and token >= 0 for token in ids):
        raise WeightsError(f"{folder}: eos_token_id = {said!r}: must be whole numbers, not negative")
    return frozenset(ids)


def _object_in(path: Path) -> dict[str, Any]:
    """The fields of a file; none if there is no such file."""
    if not path.is_file():
        return {}
    return parse_object(path.read_bytes()[:_MAX_BYTES], path, WeightsError)
