"""An adapter in memory: what was trained on top of a frozen base, by the official names of what it changes.

    kind           the matrix W' [out, in] in place of the base's W          parts
    lora, rslora   W + s B A                                                lora_A [r, in], lora_B [out, r]
    dora           m V / |V| by rows, with V = W + s B A; 0 where |V| is    and lora_magnitude_vector m [out]
    miss           W + the tiles of D^T along `in`, the last one cut         miss_block D [r, out]
    bat            W_ab + W_ab D_b + D_b for blocks of r x r, by inputs      disha D [in / r, r, r] (RWKV-PEFT)
                   W_ab + W_ab D_a + D_a, by outputs                         miss_block D [out / r, r, r] (peft)

rslora is lora whose factor s = alpha / sqrt(r) rather than alpha / r. PiSSA's W - B0 A0 + B A is LoRA of twice the rank
(`pissa_as_lora`), for which nobody needs another base. Papers: arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA), 2402.09353
(DoRA), 2404.02948 (PiSSA), 2409.15371 (Bone, later MiSS; Bat).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from rwkv_jax.config import AdapterKind
from rwkv_jax.weights.digest import content_digest
from rwkv_jax.weights.tensors import WeightsError

Parts = Mapping[str, NDArray]
"""The arrays of an adapted matrix, by their names."""

_NUM_AXES: dict[AdapterKind, dict[str, int]] = {
    "lora": {"lora_A": 2, "lora_B": 2},
    "rslora": {"lora_A": 2, "lora_B": 2},
    "dora": {"lora_A": 2, "lora_B": 2, "lora_magnitude_vector": 1},
    "miss": {"miss_block": 2},
}
_BAT = ("disha", "miss_block")  # by inputs, by outputs
_LISTED = 20


class AdapterError(WeightsError):
    """An adapter that cannot be read, or does not fit its base; the message has the problem and the remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter. Immutable, checked when it is made; `check_base` holds it against a base."""

    kind: AdapterKind
    """Never pissa, which is kept as lora."""
    parts: Mapping[str, Parts]
    """By the official name of the matrix without `.weight`, such as blocks.3.att.key; any float dtype."""
    scales: Mapping[str, float]
    """The factor s, by the same names; 1 for kinds without one."""
    replaced: Mapping[str, NDArray] = dataclasses.field(default_factory=dict)
    """Parameters that were trained in full, by their official names: the values that take the base's place."""
    base_digest: str | None = None
    """`weights_digest` of the base it was trained on; None if unknown."""

    def __post_init__(self) -> None:
        lines = [line for name in self.parts for line in _wrong_parts(self.kind, name, self.parts[name])]
        lines += [f"{name}: has no factor" for name in self.parts if name not in self.scales]
        lines += [f"{name}: its factor is {s}" for name, s in self.scales.items() if not math.isfinite(s)]
        if self.kind in ("miss", "bat"):
            lines += [f"{name}: its kind has no factor, not {s}" for name, s in self.scales.items() if s != 1]
        arrays = {f"{name}.{part}": x for name, of in self.parts.items() for part, x in of.items()}
        for name, x in (arrays | dict(self.replaced)).items():
            if not np.isfinite(np.asarray(x, np.float32)).all():
                lines.append(f"{name}: has numbers that are not finite")
        if not arrays and not self.replaced:
            lines.append("it has no tensors")
        _raise(lines, "this is no whole adapter; get or write the file again:")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 in hex of all that changes the base's numbers."""
        lines = [f"{name}.{part} {content_digest(x)}\n" for name, of in self.parts.items() for part, x in of.items()]
        lines += [f"{name} {content_digest(x)}\n" for name, x in self.replaced.items()]
        lines += [f"{name} factor {float(self.scales[name])!r}\n" for name in self.parts]
        return hashlib.sha256("".join([f"{self.kind}\n", *sorted(lines)]).encode()).hexdigest()

    def rank(self, name: str) -> int:
        """r of an adapted matrix."""
        return rank_of(self.parts[name])

    def check_base(
        self, shapes: Mapping[str, tuple[int, ...]], digest: Callable[[], str], *, allow_other_base: bool = False
    ) -> None:
        """Checks that the adapter is one of this base.

        Args:
          shapes: of the base's tensors, by their official names.
          digest: computes the base's `weights_digest`; only called if the adapter knows its own.
          allow_other_base: whether a base with other numbers will do, as long as the shapes fit.

        Raises:
          AdapterError: lists matrices that the base lacks, ranks above a matrix and other shapes; or the digest is
            another one.
        """
        lines = [line for name in self.parts for line in self._misfits(name, shapes)]
        for name, x in self.replaced.items():
            if name not in shapes:
                lines.append(f"{name}: the base has no such tensor")
            elif x.shape != shapes[name]:
                lines.append(f"{name} is {list(x.shape)}, must be {list(shapes[name])}")
        _raise(lines, "this adapter does not fit its base; take the base that it was trained on:")
        if self.base_digest is None or allow_other_base:
            return
        if (found := digest()) != self.base_digest:
            raise AdapterError(
                f"base_digest = {self.base_digest[:16]}...: the adapter was trained on another base than this one "
                f"({found[:16]}...), which has the same shapes; take that base in its own dtype, or say that this one "
                "will do (allow_other_base)"
            )

    def _misfits(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        shape = shapes.get(f"{name}.weight")
        if shape is None or len(shape) != 2 or name == "emb":
            return [f"{name}: the base has no such matrix that can be adapted"]
        num_outputs, num_inputs = shape
        parts, rank = self.parts[name], self.rank(name)
        if rank > min(shape):
            return [f"{name}: rank {rank} is above the matrix {list(shape)}"]
        expected = {
            "lora_A": (rank, num_inputs),
            "lora_B": (num_outputs, rank),
            "lora_magnitude_vector": (num_outputs,),
            "miss_block": (rank, num_outputs) if self.kind == "miss" else (num_outputs // rank, rank, rank),
            "disha": (num_inputs // rank, rank, rank),
        }
        lines = [
            f"{name}.{part} is {list(x.shape)}, must be {list(expected[part])} for a matrix {list(shape)}"
            for part, x in parts.items()
            if x.shape != expected[part]
        ]
        if self.kind == "bat" and (num_inputs % rank or num_outputs % rank):
            lines.append(f"{name}: rank {rank} does not divide the matrix {list(shape)}, which has to be whole blocks")
        return lines

    def merged(self, name: str, weight: NDArray) -> NDArray:
        """The matrix in place of the base's, in the base's dtype, in which it is computed."""
        parts = {part: np.asarray(x).astype(weight.dtype) for part, x in self.parts[name].items()}
        return merged_matrix(self.kind, parts, self.scales[name], weight)

    def as_lora(self, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
        """The same as LoRA, of the same rank; of the kinds that only add to a matrix.

        Args:
          shapes: as in `check_base`, which this adapter has passed.

        Raises:
          AdapterError: of kind dora or bat.
        """
        if self.kind == "lora":
            return self
        if self.kind == "rslora":
            return dataclasses.replace(self, kind="lora")
        if self.kind != "miss":
            raise AdapterError(
                f"kind = {self.kind!r}: does not only add to a matrix, so it cannot be mixed or weighted with others "
                "unmerged; merge it into its base (rwkv merge)"
            )
        parts = {name: _miss_as_lora(of, shapes[f"{name}.weight"][1]) for name, of in self.parts.items()}
        return dataclasses.replace(self, kind="lora", parts=parts)


def merged_matrix(kind: AdapterKind, parts: Parts, scale: float, weight: NDArray) -> NDArray:
    """W' of the table above, of a base W [out, in], in the dtype of all arguments."""
    if kind == "miss":
        return weight + _tiled(parts["miss_block"], weight.shape[1])
    if kind == "bat":
        return _merged_bat(parts, weight)
    changed = weight + weight.dtype.type(scale) * (parts["lora_B"] @ parts["lora_A"])
    if kind == "dora":
        norm = np.linalg.norm(changed, axis=1, keepdims=True)
        magnitude = parts["lora_magnitude_vector"][:, None]
        return np.divide(magnitude, norm, out=np.ones_like(norm), where=norm != 0) * changed
    return changed


def _merged_bat(parts: Parts, weight: NDArray) -> NDArray:
    (name, blocks), *_ = parts.items()
    by_input = name == "disha"
    rank = blocks.shape[-1]
    grid = rearrange(weight, "(a p) (b q) -> a b p q", p=rank, q=rank)
    blocks = blocks[None] if by_input else blocks[:, None]
    return rearrange(grid + grid @ blocks + blocks, "a b p q -> (a p) (b q)")


def _tiled(block: NDArray, num_inputs: int) -> NDArray:
    """D [r, out] -> [out, in]: column i is row i % r of D."""
    return block[np.arange(num_inputs) % len(block)].T


def _miss_as_lora(parts: Parts, num_inputs: int) -> Parts:
    """A has one 1 in each column: it sums the inputs of each remainder modulo r."""
    block = parts["miss_block"]
    sums = np.arange(len(block))[:, None] == np.arange(num_inputs) % len(block)
    return {"lora_A": sums.astype(block.dtype), "lora_B": block.T}


def rank_of(parts: Parts) -> int:
    """r of the parts of a matrix."""
    first = parts["lora_A"] if "lora_A" in parts else next(iter(parts.values()))
    return first.shape[-1] if first.ndim == 3 else first.shape[0]


def pissa_as_lora(parts: Parts, initial: Parts) -> Parts:
    """LoRA of twice the rank, of factor 1: W - B0 A0 + B A = W + [B, -B0] [A; A0].

    Args:
      parts: lora_A, lora_B as trained.
      initial: the same as they were before training, taken out of the base.
    """
    return {
        "lora_A": np.concatenate([parts["lora_A"], initial["lora_A"]]),
        "lora_B": np.concatenate([parts["lora_B"], -initial["lora_B"]], axis=1),
    }


def combined(adapters: Sequence[Adapter], weights: Sequence[float], shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The weighted sum of several adapters that only add to matrices, as one LoRA of their ranks together.

    Args:
      shapes: as in `Adapter.as_lora`.

    Raises:
      AdapterError: a kind that does more than add, or parameters trained in full.
    """
    if list(weights) == [1]:
        return adapters[0]
    for adapter in adapters:
        if adapter.replaced:
            raise AdapterError(
                f"{next(iter(adapter.replaced))}: was trained in full, which is not weighted or added up unmerged; "
                "merge the adapters into their base (rwkv merge)"
            )
    each = [adapter.as_lora(shapes) for adapter in adapters]
    parts: dict[str, Parts] = {}
    for name in dict.fromkeys(name for adapter in each for name in adapter.parts):
        own = [(adapter, weight) for adapter, weight in zip(each, weights, strict=True) if name in adapter.parts]
        factors = [weight * adapter.scales[name] for adapter, weight in own]
        halves = [adapter.parts[name] for adapter, _ in own]
        parts[name] = {
            "lora_A": np.concatenate([np.asarray(half["lora_A"], np.float64) for half in halves]),
            "lora_B": np.concatenate(
                [s * np.asarray(half["lora_B"], np.float64) for s, half in zip(factors, halves, strict=True)], axis=1
            ),
        }
    return Adapter("lora", parts, dict.fromkeys(parts, 1.0))


def _wrong_parts(kind: AdapterKind, name: str, parts: Parts) -> list[str]:
    """What is missing from the parts of a matrix, or has other axes than its kind."""
    known = {part: 3 for part in _BAT if part in parts} or {_BAT[0]: 3} if kind == "bat" else _NUM_AXES[kind]
    lines = [f"{name}: {part} is missing" for part in known if part not in parts]
    lines += [f"{name}: {part} is not of kind {kind}" for part in parts if part not in known]
    for part, x in parts.items():
        if part in known and (x.ndim != known[part] or 0 in x.shape):
            lines.append(f"{name}.{part} is {list(x.shape)}, must have {known[part]} axes")
    if kind == "bat" and len(known) > 1:
        lines.append(f"{name}: has blocks by inputs and by outputs; it must be one of them")
    return lines


def _raise(lines: Sequence[str], first: str) -> None:
    if lines:
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        raise AdapterError("\n  ".join([first, *(line[:300] for line in lines[:_LISTED]), *more]))
