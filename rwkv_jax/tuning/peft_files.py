"""Adapters in folders of Hugging Face's peft: adapter_config.json and adapter_model.safetensors (or .bin).

Tensors are named base_model.model.MODULE.lora_A.weight and so on, with MODULE in the layout of the model that was
tuned: flash-linear-attention's, which rwkv7-hf shares (model.layers.3.attn.k_proj), that of transformers, or the
official one (blocks.3.att.key). `modules_to_save` are whole tensors under the same prefix. The config has rank and
alpha, so that nothing has to be told again; what else in it would change the numbers is refused. Ours have the base's
digest in the metadata of the safetensors, which peft passes over.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.atomic import new_folder
from rwkv_jax.checks import is_number, is_whole, shown
from rwkv_jax.config import AdapterKind, ModelConfig
from rwkv_jax.json_object import parse_object
from rwkv_jax.tuning.adapter import Adapter, AdapterError, rank_of
from rwkv_jax.weights.layout_rules import WRITTEN, Rule
from rwkv_jax.weights.layouts import LAYOUTS, from_layout
from rwkv_jax.weights.pth.file import read_torch_file
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors
from rwkv_jax.weights.tensors import MappedTensors, WeightsError, join_names

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_TORCH_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_DIGEST = "rwkv_jax_base_digest"
_MAX_CONFIG_BYTES = 2**20
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|miss_block)(?:\.default)?(?:\.weight)?"
)
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initial values that are taken out of the base: the file alone does not say of what W it is an adapter."""
_REFUSED = (
    *("fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config"),
    "velora_config",
)
"""Fields that, if set, change the numbers in ways that are not known here."""
_PATTERN = re.compile(r"(?:[\w$^|()\[\]?-]|\\?\.|\.\*|\\d\+?)*")  # of names, without nested repetitions
_MAX_PATTERN = 200
_BRANCHING = re.compile(r"\.\*|\?|\\d\+|\(")
_MAX_BRANCHING = 3
"""In one pattern: the time to match one without success is exponential in their number."""


def read_peft(folder: Path) -> Adapter:
    """Reads an adapter; nothing in the files is run.

    Raises:
      AdapterError: the config is missing or has a kind or setting that is not read, tensors are missing, of unknown
        modules or not finite, or their ranks are not those of the config.
      WeightsError: a file cannot be read, or is damaged (UnsafeFileError).
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    try:
        return _adapter(config, tensors)
    except WeightsError as error:
        raise AdapterError(f"{folder}: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror}); name the folder of an adapter") from error
    if len(content) > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{path}: has more than {_MAX_CONFIG_BYTES} bytes, so it is no adapter's; get it again")
    return parse_object(content, path, AdapterError)


def _read_tensors(folder: Path) -> MappedTensors:
    if (folder / TENSORS_FILE).is_file():
        tensors = read_safetensors(folder / TENSORS_FILE)
    elif (folder / _TORCH_FILE).is_file():
        tensors = read_torch_file(folder / _TORCH_FILE).tensors
    else:
        raise AdapterError(f"{folder}: has neither {TENSORS_FILE} nor {_TORCH_FILE}; get the whole folder")
    tensors.verify()
    return tensors


def _adapter(config: Mapping[str, Any], tensors: MappedTensors) -> Adapter:
    kind = _kind(config)
    parts: dict[str, dict[str, NDArray]] = {}
    modules: dict[str, str] = {}
    replaced: dict[str, NDArray] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise AdapterError(f"the tensor {shown(key)} does not begin with {_PREFIX}, so it is not peft's")
        key = key.removeprefix(_PREFIX)
        if (match := _PART.fullmatch(key)) is None:
            replaced |= _in_full(key.replace(".modules_to_save.default.", "."), tensor)
            continue
        module = match["module"]
        name = _official_matrix(module)
        if modules.setdefault(name, module) != module:
            raise AdapterError(f"{modules[name]} and {module} are both {name}; remove one of them")
        parts.setdefault(name, {})[match["part"]] = tensor
    saved = config.get("modules_to_save") or []
    if replaced and not saved:
        raise AdapterError(
            f"modules_to_save = {shown(saved)}: and yet there are whole tensors ({join_names(list(replaced))}); one of "
            "the two files is another adapter's"
        )
    adapter = Adapter(kind, parts, dict.fromkeys(parts, 1.0), replaced, tensors.metadata.get(_DIGEST))
    return _with_factors(adapter, modules, config)


def _kind(config: Mapping[str, Any]) -> AdapterKind:
    """The kind of an adapter, by a config of which nothing else changes the numbers."""
    for field in _REFUSED:
        if config.get(field):
            raise AdapterError(f"{field} = {shown(config[field])}: is not read; merge this adapter with peft itself")
    kind = config.get("peft_type")
    if kind == "MISS":
        found = config.get("init_weights", True)
        if found == "mini":
            raise AdapterError("init_weights = 'mini': is not read; merge this adapter with peft itself")
        return "bat" if found == "bat" else "miss"
    if kind != "LORA":
        raise AdapterError(f"peft_type = {shown(kind)}: must be LORA or MISS; merge this adapter with peft itself")
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.startswith(_OTHER_BASES):
        raise AdapterError(
            f"init_lora_weights = {shown(initial)}: its initial values were taken out of the base, which is not in the "
            "file; have peft write it as plain LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=))"
        )
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def _official_matrix(module: str) -> str:
    """The official name, without `.weight`, of a module that is a linear layer [out, in] there, too."""
    like = np.broadcast_to(np.float32(0), (2, 3))
    try:
        (name, found), *others = from_layout({f"{module}.weight": like}, tied=False)[1].items()
    except WeightsError as error:
        raise AdapterError(f"target {shown(module)}: is no matrix of RWKV in a known layout ({error})") from error
    if others or found.shape != like.shape or not name.endswith(".weight"):
        raise AdapterError(f"target {shown(module)}: low-rank maps and vectors are not adapted, only linear maps")
    return name.removesuffix(".weight")


def _in_full(name: str, tensor: NDArray) -> dict[str, NDArray]:
    """Tensors of modules_to_save, by official names."""
    try:
        return {official: np.asarray(x) for official, x in from_layout({name: tensor}, tied=False)[1].items()}
    except WeightsError as error:
        raise AdapterError(f"the tensor {shown(name)} is neither of an adapter nor of RWKV ({error})") from error


def _with_factors(adapter: Adapter, modules: Mapping[str, str], config: Mapping[str, Any]) -> Adapter:
    """An adapter with the factors of its config, whose ranks must be those of the tensors."""
    rank_of_module = _by_module(config, "r", "rank_pattern", is_whole)
    has_alpha = adapter.kind in ("lora", "rslora", "dora")
    alpha_of_module = _by_module(config, "lora_alpha", "alpha_pattern", is_number) if has_alpha else None
    scales: dict[str, float] = {}
    for name, module in modules.items():
        rank, told = adapter.rank(name), rank_of_module(module)
        if rank != told:
            raise AdapterError(f"r = {told}: {module} has rank {rank}; config and tensors are of different adapters")
        divisor = math.sqrt(rank) if adapter.kind == "rslora" or config.get("use_rslora") else rank
        scales[name] = 1.0 if alpha_of_module is None else alpha_of_module(module) / divisor
    return Adapter(adapter.kind, adapter.parts, scales, adapter.replaced, adapter.base_digest)


def _by_module(
    config: Mapping[str, Any], field: str, patterns_field: str, is_valid: Callable[[object], bool]
) -> Callable[[str], Any]:
    """A number of the config for each module: of the first pattern that its end matches, as in peft."""
    patterns = config.get(patterns_field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{patterns_field} = {shown(patterns)}: must be an object")
    for name, value in [(field, config.get(field)), *patterns.items()]:
        if not is_valid(value) or not _is_above_zero(value):
            raise AdapterError(f"{name} = {shown(value)}: must be a number above zero; the config is not peft's")
    compiled = []
    for pattern, value in patterns.items():
        is_read = len(pattern) <= _MAX_PATTERN and _PATTERN.fullmatch(pattern)
        if not is_read or len(_BRANCHING.findall(pattern)) > _MAX_BRANCHING:
            raise AdapterError(f"{patterns_field}: the pattern {shown(pattern)} is not read; name the modules")
        try:
            compiled.append((re.compile(rf"(?:.*\.)?(?:{pattern})"), value))
        except re.error as error:
            raise AdapterError(f"{patterns_field}: the pattern {shown(pattern)} is none ({error})") from error
    return lambda module: next((value for own, value in compiled if own.fullmatch(module)), config[field])


def _is_above_zero(value: Any) -> bool:
    """Whether a number is one above zero, and within what a float holds."""
    try:
        return 0 < float(value) < math.inf
    except OverflowError:
        return False


def write_peft(
    adapter: Adapter,
    folder: Path,
    model: ModelConfig,
    *,
    layout: str = "official",
    base: str | None = None,
) -> None:
    """Writes an adapter for peft, atomically; nothing is overwritten.

    Args:
      model: the base's config.
      layout: of the model that peft is to adapt: official, transformers (RWKV-4), flash-linear-attention (RWKV-6 and 7,
        and rwkv7-hf) or huggingface (RWKV-7).
      base: the name or path that the config gives as base_model_name_or_path.

    Raises:
      AdapterError: what peft has no place for (Bat by inputs, MiSS of several ranks, single parameters trained in
        full), an unknown layout, or the folder exists.
    """
    rename = _renaming(layout, model)
    modules = {name: rename(f"{name}.weight").removesuffix(".weight") for name in adapter.parts}
    if adapter.kind == "bat" and any("disha" in parts for parts in adapter.parts.values()):
        raise AdapterError(
            "kind = 'bat': peft's blocks are those of outputs, and these are of inputs, as RWKV-PEFT's; merge it "
            "(rwkv merge)"
        )
    tensors: dict[str, NDArray] = {}
    for name, parts in adapter.parts.items():
        for part, x in parts.items():
            suffix = ".weight" if part in ("lora_A", "lora_B") else ""
            tensors[f"{_PREFIX}{modules[name]}.{part}{suffix}"] = np.asarray(x)
    saved: list[str] = []
    for name, x in adapter.replaced.items():
        module, _, last = rename(name).rpartition(".")
        if last not in ("weight", "bias") or x.ndim not in (1, 2):
            raise AdapterError(
                f"{name}: was trained in full, and is no module of its own, which is all that peft saves; merge the "
                "adapter (rwkv merge)"
            )
        tensors[f"{_PREFIX}{module}.{last}"] = np.asarray(x)
        saved.append(module)
    config = _config(adapter, modules, model.num_layers)
    config |= {"base_model_name_or_path": base, "modules_to_save": sorted(set(saved)) or None}
    metadata = {"format": "pt"} | ({} if adapter.base_digest is None else {_DIGEST: adapter.base_digest})
    with new_folder(folder.expanduser(), AdapterError) as new:
        write_safetensors(new / TENSORS_FILE, tensors, metadata)
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _renaming(layout: str, model: ModelConfig) -> Callable[[str], str]:
    """From official names to those of a layout."""
    if layout == "official":
        return lambda name: name
    written = WRITTEN.get((layout, model.generation[0]))
    if written is None:
        raise AdapterError(
            f"layout = {layout!r}: has no {model.title}; of {', '.join(LAYOUTS)} the official one has every generation"
        )
    rules: dict[str, Rule] = {rule.official[0]: rule for rule in written.rules if len(rule.official) == 1}

    def rename(name: str) -> str:
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        rule = rules.get(name.replace(f"blocks.{layer}.", "blocks.{}.", 1) if layer else name)
        if rule is None:
            raise AdapterError(f"{name}: the layout {layout} has no tensor of its own for it; write the official one")
        return rule.foreign.format(layer)

    return rename


def _config(adapter: Adapter, modules: Mapping[str, str], num_layers: int) -> dict[str, Any]:
    """The adapter_config.json but for names of bases and of modules saved in full."""
    common = {"bias": "none", "inference_mode": True, "task_type": "CAUSAL_LM"}
    ranks = {module: rank_of(adapter.parts[name]) for name, module in modules.items()}
    rank = _most_common(ranks.values(), 8)
    targets = {"target_modules": _targets(list(modules.values()), num_layers)}
    if adapter.kind in ("miss", "bat"):
        if set(ranks.values()) - {rank}:
            raise AdapterError(f"kind = {adapter.kind!r}: peft has one rank for all of them; merge it (rwkv merge)")
        initial: bool | str = "bat" if adapter.kind == "bat" else True
        return common | targets | {"peft_type": "MISS", "r": rank, "init_weights": initial}
    is_rs = adapter.kind == "rslora"
    alphas = {
        module: float(f"{adapter.scales[name] * (math.sqrt(ranks[module]) if is_rs else ranks[module]):.12g}")
        for name, module in modules.items()
    }
    alpha = _most_common(alphas.values(), rank)
    others = {
        "lora_alpha": _whole_if_possible(alpha),
        "rank_pattern": {re.escape(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {
            re.escape(module): _whole_if_possible(value) for module, value in alphas.items() if value != alpha
        },
        "use_rslora": is_rs,
        "use_dora": adapter.kind == "dora",
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
    return common | targets | {"peft_type": "LORA", "r": rank} | others


def _targets(modules: list[str], num_layers: int) -> list[str]:
    """The ends of the modules' names, if they are adapted in every layer; their whole names otherwise."""
    ends: dict[str, set[str]] = {}
    for module in modules:
        match = re.fullmatch(r".*?\.(\d+)\.(.+)", module)
        if match is None:
            return sorted(modules)
        ends.setdefault(match[2], set()).add(match[1])
    if all(len(layers) == num_layers for layers in ends.values()):
        return sorted(ends)
    return sorted(modules)


def _most_common(values: Iterable[Any], otherwise: Any) -> Any:
    found = Counter(values).most_common(1)
    return found[0][0] if found else otherwise


def _whole_if_possible(value: float) -> float:
    return int(value) if value == int(value) else value
