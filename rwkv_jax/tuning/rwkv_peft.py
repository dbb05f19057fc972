"""Adapters by RWKV-PEFT: a .pth of blocks.N.att.key.lora_A and so on, and the parameters that it trained in full.

lora_A, lora_B     LoRA, whose alpha the file does not have; or PiSSA, whose initial values are in another file
disha [r, out]     Bone, which Hugging Face's peft calls MiSS
disha [in/r, r, r] Bat, by blocks of inputs
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from numpy.typing import NDArray

from rwkv_jax.checks import is_number, shown
from rwkv_jax.config import AdapterKind
from rwkv_jax.tuning.adapter import Adapter, AdapterError, Parts, pissa_as_lora
from rwkv_jax.weights.pth.file import read_torch_file
from rwkv_jax.weights.tensors import MappedTensors, WeightsError, join_names

_PART = re.compile(r"(?:model\.)?(?P<matrix>.+)\.(?P<part>(?:init_)?lora_[AB]|disha)")
_PISSA_INIT = "init_pissa.pth"  # RWKV-PEFT's name for it, in the run's folder
_INIT_MARK = re.compile(r"[_.-]?init(?:ial)?(?=[_.-]|$)")


def read_rwkv_peft(path: Path, alpha: float | None = None, init: Path | None = None) -> Adapter:
    """Reads an adapter file.

    Args:
      alpha: of LoRA, as it was trained with; the other kinds have none.
      init: PiSSA's initial values, which other kinds have not; None takes init_pissa.pth beside the adapter, or its
        own name with `init` in it.

    Raises:
      AdapterError: alpha is missing, or it or `init` is given where there is none; halves are missing; kinds are mixed.
      WeightsError: a file cannot be read (UnsafeFileError: or has anything but tensors in it).
    """
    tensors = _verified(path)
    try:
        parts, replaced = _split(tensors)
        kind = _kind(parts)
        if kind != "lora":
            _refuse_alpha(alpha, f"kind = {kind!r}")
            if init is not None:
                raise AdapterError(f"adapter_init = {shown(str(init))}: kind = {kind!r}, which has none; leave it out")
            renamed = {name: {"miss_block": of["disha"]} if kind == "miss" else of for name, of in parts.items()}
            return Adapter(kind, renamed, dict.fromkeys(parts, 1.0), replaced)
        init = init or _beside(path)
        if init is not None:
            _refuse_alpha(alpha, f"{init.name}, beside it, has initial values of PiSSA")
            return _pissa(parts, replaced, init)
        if parts and alpha is None:
            raise AdapterError(
                "adapter_alpha is missing: RWKV-PEFT's LoRA files do not have it, and a wrong one gives a wrong model; "
                "give the --lora_alpha (or peft_config's lora_alpha) that it was trained with, and for PiSSA its "
                f"{_PISSA_INIT}"
            )
        if alpha is not None and (not is_number(alpha) or not 0 < alpha < float("inf")):
            raise AdapterError(f"adapter_alpha = {shown(alpha)}: must be a number above zero")
        checked = Adapter("lora", parts, dict.fromkeys(parts, 1.0), replaced)
        scales = {name: (alpha or 0) / checked.rank(name) for name in parts}
        return Adapter("lora", parts, scales, replaced)
    except WeightsError as error:
        raise AdapterError(f"{path}: {error}") from error


def _verified(path: Path) -> MappedTensors:
    tensors = read_torch_file(path).tensors
    tensors.verify()
    return tensors


def _split(tensors: Mapping[str, NDArray]) -> tuple[dict[str, dict[str, NDArray]], dict[str, NDArray]]:
    """The parts of adapted matrices, and whole parameters."""
    parts: dict[str, dict[str, NDArray]] = {}
    replaced: dict[str, NDArray] = {}
    for name, tensor in tensors.items():
        if (match := _PART.fullmatch(name)) is None:
            replaced[name.removeprefix("model.")] = tensor
        else:
            parts.setdefault(match["matrix"], {})[match["part"]] = tensor
    return parts, replaced


def _kind(parts: Mapping[str, Parts]) -> AdapterKind:
    kinds: dict[AdapterKind, str] = {}
    for name, of in parts.items():
        blocks = of.get("disha")
        kind: AdapterKind = "lora" if blocks is None else "bat" if blocks.ndim == 3 else "miss"
        kinds.setdefault(kind, name)
    if len(kinds) > 1:
        found = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
        raise AdapterError(f"kinds are mixed ({found}); take a file of one kind")
    return next(iter(kinds)) if kinds else "lora"


def _refuse_alpha(alpha: float | None, why: str) -> None:
    if alpha is not None:
        raise AdapterError(f"adapter_alpha = {shown(alpha)}: {why}, which has no such factor; leave it out")


def _beside(path: Path) -> Path | None:
    """The file of PiSSA's initial values that belongs to an adapter file, if there is one."""
    for other in sorted(path.parent.glob("*.pth")):
        is_own = other != path and _INIT_MARK.sub("", other.stem) == path.stem
        if is_own or (other.name == _PISSA_INIT and other != path):
            return other
    return None


def _pissa(parts: Mapping[str, Parts], replaced: Mapping[str, NDArray], init: Path) -> Adapter:
    initial, _ = _split(_verified(init))
    wide: dict[str, Parts] = {}
    for name, of in parts.items():
        before = {part: initial.get(name, {}).get(f"init_{part}") for part in ("lora_A", "lora_B")}
        for part, x in before.items():
            if x is None or part not in of or x.shape != of[part].shape:
                found = "missing" if x is None else list(x.shape)
                raise AdapterError(f"{init}: {name}.init_{part} is {found}; it is of another adapter")
        wide[name] = pissa_as_lora(of, {part: x for part, x in before.items() if x is not None})
    if extra := sorted(initial.keys() - parts.keys()):
        raise AdapterError(f"{init}: has initial values of {join_names(extra)}, which the adapter lacks")
    return Adapter("lora", wide, dict.fromkeys(wide, 1.0), replaced)
