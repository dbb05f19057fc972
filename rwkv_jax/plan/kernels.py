"""Costs of the WKV operators' kernels, by formulas: a program's text has a kernel's arrays, but not its products.

A kernel's name is the operator's and its direction: `wkv7_forward`, `wkv7_forward_saving_states` (where a backward pass
follows) and `wkv7_backward`. N is the size of keys, M that of values, C the steps of a chunk.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import rwkv_kernels
from rwkv_jax.plan.program import Computation, Instruction, Module

KERNELS, TPU_KERNELS = "pallas_triton", "pallas_mosaic_tpu"
CHUNKS: Mapping[str, Mapping[str, int]] = {
    KERNELS: {"wkv4": 8, "wkv5": 16, "wkv6": 16, "wkv7": 16},
    TPU_KERNELS: {"wkv5": 64, "wkv6": 64, "wkv7": 64},
}
"""Tokens for which a kernel stores one state, as shipped; a chunk, but for RWKV-4."""
FORWARD, BACKWARD = "forward_saving_states", "backward"

PASSES = {"full": 6, "default": 3, "fast": 1}
"""Passes of a tensor core with bfloat16 operands that a product takes at each precision, at most: v and dy that are
bfloat16 take fewer."""
PASSES_OF_SUMS = 3
"""Of sums of logarithms, at any precision."""


class Sizes(NamedTuple):
    """Sizes of a head, and of a chunk or block of tokens for which a kernel stores one state."""

    key_dim: int
    value_dim: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """One kernel's work for a token of a head, without what rows and heads need once, such as their initial state."""

    bytes: float
    """Read and written in device memory."""
    products: float = 0.0
    """FLOPs of matrix products, a multiply-add being 2, at the operator's precision."""
    sums: float = 0.0
    """FLOPs of sums of logarithms, which are matrix products too."""

    def bfloat16_flops(self, precision: str) -> float:
        """FLOPs of tensor cores with bfloat16 operands."""
        return PASSES[precision] * self.products + PASSES_OF_SUMS * self.sums


class _Products(NamedTuple):
    """Products for a chunk of a head, counted by kind; each is a multiply-add of N M C, C C N and so on."""

    nmc: float = 0
    ccn: float = 0
    ccm: float = 0
    ccc: float = 0
    sums: float = 0
    """Of kind C C N."""

    def flops(self, sizes: Sizes) -> tuple[float, float]:
        """FLOPs a token, of products and of sums."""
        N, M, C = sizes
        return 2 * (self.nmc * N * M + self.ccn * C * N + self.ccm * C * M + self.ccc * C**2), 2 * self.sums * C * N


def _doublings(sizes: Sizes) -> int:
    return sizes.chunk.bit_length() - 1


def _wkv7(direction: str, sizes: Sizes) -> _Products:
    """Reads and writes of the state, four scores and their four uses, and the inverse by doubling (chunk.py).

    Going back, what y alone needs is not computed again, and every product has two derivatives.
    """
    inverse = 2 * (_doublings(sizes) - 1)
    if direction == BACKWARD:
        return _Products(nmc=3 + 8, ccn=4 + 8, ccm=2 + 8, ccc=inverse + 2, sums=2)
    return _Products(nmc=4, ccn=4, ccm=4, ccc=inverse, sums=1)


def _decayed_attention(direction: str, sizes: Sizes) -> _Products:
    """RWKV-6: scores and their sums of decays once for each doubling, a read and a write of the state."""
    levels = _doublings(sizes)
    if direction == BACKWARD:
        return _Products(nmc=4, ccn=3 * levels, ccm=2, sums=2 * (levels + 1))
    return _Products(nmc=2, ccn=levels, ccm=1, sums=levels + 1)


def _fixed_decays(direction: str, sizes: Sizes) -> _Products:
    """RWKV-5, whose sums of decays are the same in every chunk: only their derivatives are left in the loop."""
    return _decayed_attention(direction, sizes)._replace(sums=_doublings(sizes) + 1 if direction == BACKWARD else 0)


def _no_products(direction: str, sizes: Sizes) -> _Products:
    """RWKV-4, whose heads are single channels."""
    del direction, sizes
    return _Products()


_PRODUCTS: Mapping[str, Callable[[str, Sizes], _Products]] = {
    "wkv4": _no_products,
    "wkv5": _fixed_decays,
    "wkv6": _decayed_attention,
    "wkv7": _wkv7,
}


def _bytes(operator: str, direction: str, sizes: Sizes, item_bytes: Mapping[str, int]) -> float:
    """Inputs once, and results in their dtypes.

    States are float32, at the start of every chunk: [M, N], or three numbers a channel.
    """
    axes = rwkv_kernels.OPERATORS[operator].axes
    elements = {name: sizes.value_dim if "M" in axis else sizes.key_dim for name, axis in axes.items() if "T" in axis}
    inputs = sum(count * item_bytes[name] for name, count in elements.items())
    state = 4 * (3 if operator == "wkv4" else sizes.key_dim * sizes.value_dim) / sizes.chunk
    y = sizes.value_dim * item_bytes["v"]
    if direction == BACKWARD:
        return inputs + y + state + inputs
    return inputs + y + (state if direction == FORWARD else 0)


def kernel_cost(operator: str, direction: str, sizes: Sizes, item_bytes: Mapping[str, int]) -> KernelCost:
    """The cost of one of an operator's kernels.

    Args:
      operator: wkv4, wkv5, wkv6 or wkv7.
      direction: forward, forward_saving_states or backward.
      item_bytes: of an element of each input over time.
    """
    products, sums = _PRODUCTS[operator](direction, sizes).flops(sizes)
    return KernelCost(_bytes(operator, direction, sizes, item_bytes), products, sums)


_CALL = re.compile(r"\b(wkv[4-7])_(forward_saving_states|forward|backward)\b")
_OTHER = re.compile(r"\bwkv[4-7]_\w+")
_WITHOUT_PRODUCTS = re.compile(r"\bwkv7_(output_forward|output_backward|step)\b")


def bfloat16_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of a call of one of our kernels at precision `full`; 0 for any other instruction."""
    found = _CALL.search(f"{instruction.name} {instruction.attributes}")
    if instruction.opcode != "custom-call" or found is None or found[1] == "wkv4":
        return 0
    arrays = computation.operand_arrays(instruction)
    value_dim, key_dim = arrays[-1].dims[-2:]  # the state, or its cotangent
    implementation = TPU_KERNELS if "tpu_custom_call" in instruction.attributes else KERNELS
    sizes = Sizes(key_dim, value_dim, CHUNKS[implementation][found[1]])
    products, sums = _PRODUCTS[found[1]](found[2], sizes).flops(sizes)
    token_heads = arrays[0].size // arrays[0].dims[-1]
    return round(token_heads * (PASSES["full"] * products + PASSES_OF_SUMS * sums))


def uncounted_kernels(module: Module) -> tuple[str, ...]:
    """Names of the program's kernels whose products no formula here counts."""
    found = {}
    for _, instruction, _ in module.running():
        text = f"{instruction.name} {instruction.attributes}"
        if instruction.opcode == "custom-call" and not (_CALL.search(text) or _WITHOUT_PRODUCTS.search(text)):
            found |= dict.fromkeys(_OTHER.findall(text)[:1])
    return tuple(found)
