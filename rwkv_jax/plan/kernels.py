"""What each kernel multiplies, reads and writes: the text of a program has a kernel's arrays, but not its products.

To add a kernel, declare its work in `_FAMILIES`, and for an operator's implementation its chunks in `CHUNKS` and its
kernels' order in `STAGES`. N is the size of keys, M that of values, C the steps of a chunk.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import rwkv_kernels
from rwkv_jax.plan.program import Array, Computation, Instruction, Module
from rwkv_kernels.pallas.driver import padded_size

KERNELS, SPLIT_KERNELS, TILE_KERNELS = "pallas_triton", "pallas_triton_split", "pallas_mosaic_gpu"
TPU_KERNELS, TPU_SPLIT_KERNELS = "pallas_mosaic_tpu", "pallas_mosaic_tpu_split"
CHUNKS: Mapping[str, Mapping[str, int]] = {
    KERNELS: {"wkv4": 8, "wkv5": 16, "wkv6": 16, "wkv7": 16},
    SPLIT_KERNELS: {"wkv5": 32, "wkv6": 32, "wkv7": 32},
    TILE_KERNELS: {"wkv7": 64},
    TPU_KERNELS: {"wkv5": 64, "wkv6": 64, "wkv7": 64},
    TPU_SPLIT_KERNELS: {"wkv7": 64},
}
"""Steps of a chunk, by implementation and operator, as shipped; of RWKV-4, steps for which one state is stored."""

_SMALLEST_HEADS: Mapping[str, int] = {KERNELS: 16, SPLIT_KERNELS: 16, TILE_KERNELS: 64}
"""Heads are padded to a power of two of at least this; those of other implementations are not."""


BLOCK = 64
"""Keys or values of a program of the split kernels' gradients, of which larger heads have several in two kernels."""


class Stages(NamedTuple):
    """The kernels that run one after the other, named after their family."""

    forward: tuple[str, ...]
    """Where a backward pass follows."""
    backward: tuple[str, ...]


_ONE_LOOP = Stages(("forward_saving_states",), ("backward",))
STAGES: Mapping[str, Mapping[str, Stages]] = {
    KERNELS: dict.fromkeys(CHUNKS[KERNELS], _ONE_LOOP) | {"wkv4": Stages(("forward",), ("backward",))},
    SPLIT_KERNELS: {
        "wkv5": Stages(("factors", "states", "outputs_with_scores"), ("cotangents", "gradients")),
        "wkv6": Stages(("factors", "states", "outputs_with_scores"), ("cotangents", "gradients")),
        "wkv7": Stages(("factors_with_inverse", "states", "outputs"), ("cotangents", "gradients")),
    },
    TILE_KERNELS: {
        "wkv7": Stages(("factors_with_inverse", "states", "outputs"), ("cotangents", "gradients")),
    },
    TPU_KERNELS: dict.fromkeys(CHUNKS[TPU_KERNELS], _ONE_LOOP),
    TPU_SPLIT_KERNELS: {"wkv7": _ONE_LOOP},
}
"""By implementation and operator."""


def stages_of(implementation: str, operator: str, key_dim: int, value_dim: int) -> Stages:
    """The kernels for heads of a size, padded."""
    stages = STAGES[implementation][operator]
    if implementation != SPLIT_KERNELS or max(key_dim, value_dim) <= BLOCK:
        return stages
    return stages._replace(backward=(*stages.backward[:-1], "gradients_of_values", "gradients_of_keys"))


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

    def product(self, letters: str) -> int:
        """Of the sizes that letters such as `MNC` stand for, K and V for blocks of keys and values; 1 for no letter."""
        blocks = {"K": -(-self.key_dim // BLOCK), "V": -(-self.value_dim // BLOCK)}
        named = {"N": self.key_dim, "M": self.value_dim, "C": self.chunk} | blocks
        return math.prod(named[letter] for letter in letters)


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel's work for a chunk of a head, without what rows and heads need once, such as their initial state."""

    products: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """How many matrix products there are of each size, in multiply-adds: `CCN` is C C N."""
    sums: float = 0
    """Sums of logarithms over steps, which are products of C C N."""
    sums_in: str = ""
    """Blocks in each of which they are computed again: `V`, or none."""
    over_time: str = ""
    """Arrays that are read or written once, in their own dtypes: the operator's, or y and o in v's."""
    float32: str = ""
    """Those of float32: `MN` is [M, N] for each chunk. Digits stand for themselves."""
    float32_bytes: int = 4
    """Of an element of float32, in these and over time."""


Family = Callable[[int], Mapping[str, Work]]
"""Steps of a chunk -> the work of each kernel, by the rest of its name."""

_WKV7 = "r log_w k v a b"


def _doublings(chunk: int) -> int:
    return chunk.bit_length() - 1


def _by_direction(forward: Work, backward: Work) -> Mapping[str, Work]:
    """The kernels that loop over all chunks: states are stored where a backward pass follows."""
    saving = dataclasses.replace(forward, float32="MN")
    return {"forward": forward, "forward_saving_states": saving, "backward": backward}


def _wkv7(chunk: int) -> Mapping[str, Work]:
    """Reads and writes of the state, four scores and their four uses, and the inverse by doubling (chunk.py).

    Going back, what y alone needs is not computed again, and every product has two derivatives.
    """
    inverse = 2 * (_doublings(chunk) - 1)
    forward = {"MNC": 4, "CCN": 4, "CCM": 4, "CCC": inverse}
    backward = {"MNC": 3 + 8, "CCN": 4 + 8, "CCM": 2 + 8, "CCC": inverse + 2}
    return _by_direction(
        Work(forward, sums=1, over_time=f"{_WKV7} y"),
        Work(backward, sums=2, over_time=f"{_WKV7} y {_WKV7}", float32="MN"),
    )


def _wkv7_split(chunk: int) -> dict[str, Work]:
    """The equations of ops/wkv7/split.py, in their order."""
    inverse = 2 * (_doublings(chunk) - 1)
    # Scores a~b~, a~k~, r~b~, r~k~, W and R_b W; A_k V, U, R_b U and R_k V; of Q two and of P one; X.
    products = {"CCN": 6, "CCM": 4, "MNC": 2, "NNC": 1, "CCC": inverse}
    factors = Work(products, sums=1, over_time=_WKV7, float32="NN MN CN CM")
    stages = {
        "factors": factors,
        "factors_with_inverse": dataclasses.replace(factors, float32=f"{factors.float32} CC"),
        "states": Work({"MNN": 1}, float32="NN MN MN"),
        "outputs": Work({"MNC": 1}, over_time="y", float32="CN CM MN"),
        "cotangents": Work({"MNN": 1, "MNC": 1}, over_time="y", float32="NN CN MN"),
        # Of each gradient one product with S or D; scores a~k~, r~b~, r~k~ and the eight of dA and dR with vectors;
        # A_k V, SA, R_b^T dY, dH, A_k^T dH, R_k^T dY and the four of dA and dR.
        "gradients": Work({"MNC": 7, "CCN": 11, "CCM": 10}, sums=2, over_time=f"{_WKV7} y {_WKV7}", float32="CC MN MN"),
        # The same in two: each block of values has the first scores, each block of keys those of dA and dR.
        "gradients_of_values": Work(
            {"MNC": 3, "CCNV": 3, "CCM": 6}, sums=1, sums_in="V", over_time=f"{_WKV7} y v", float32="CC MN MN CM CM"
        ),
        "gradients_of_keys": Work(
            {"MNC": 4, "CCN": 8, "CCMK": 4}, sums=2, over_time=f"{_WKV7} y r log_w k a b", float32="CM CM MN MN"
        ),
    }
    return stages | _by_direction_with_inverse(chunk)


def _by_direction_with_inverse(chunk: int) -> dict[str, Work]:
    """Of a TPU: the loop over all chunks, which keeps X, and back the gradients of chunk_gradients.py and dS."""
    forward, saving, _ = _wkv7(chunk).values()
    return {
        "forward": forward,
        "forward_saving_states": dataclasses.replace(saving, float32="MN CC"),
        "backward": Work({"MNC": 7 + 2, "CCN": 11, "CCM": 10}, sums=2, over_time=f"{_WKV7} y {_WKV7}", float32="MN CC"),
    }


def _wkv7_tiles(chunk: int) -> Mapping[str, Work]:
    """The equations of ops/wkv7/split_tiles.py: those of the split form with R_b and R_k's scores where they are used.

    A float32 is three bfloat16. Masks, which packed rows have for all heads, are in no formula.
    """
    split = _wkv7_split(chunk)
    # From the middle row, from the start and to the end, the latter two again for E and L; back to the steps two.
    sums = {"factors": 5, "factors_with_inverse": 5, "gradients": 5 + 2}
    stages = ("factors", "factors_with_inverse", "states", "outputs", "cotangents", "gradients")
    return {name: dataclasses.replace(split[name], sums=sums.get(name, 0), float32_bytes=6) for name in stages}


def _decayed_attention(inputs: str, fixed: bool) -> Family:
    """RWKV-5 and 6: scores and their sums of decays once for each doubling, a read and a write of the state.

    Of RWKV-5 the sums of decays are the same in every chunk: only their derivatives are left in the loop.
    """

    def family(chunk: int) -> Mapping[str, Work]:
        levels = _doublings(chunk)
        forward = {"MNC": 2, "CCN": levels, "CCM": 1}
        backward = {"MNC": 4, "CCN": 3 * levels, "CCM": 2}
        sums = levels + 1
        return _by_direction(
            Work(forward, sums=0 if fixed else sums, over_time=f"{inputs} y"),
            Work(backward, sums=sums if fixed else 2 * sums, over_time=f"{inputs} y {inputs}", float32="MN"),
        )

    return family


def _decayed_attention_split(decay: str) -> Family:
    """The equations of decayed_attention_split.py, in their order; what is summed again at each use counts again."""

    def family(chunk: int) -> Mapping[str, Work]:
        levels, inputs = _doublings(chunk), f"r {decay} k v"
        # Scores of each level, A V and G S; sums for all levels but the first, and for G.
        outputs = Work({"CCN": levels, "CCM": 1, "MNC": 1}, sums=levels, over_time=f"{inputs} y", float32="MN")
        # A^T dY and K dS; two derivatives of each level's scores, dY V^T, dY S and V dS. Sums for K, in either half;
        # for G, and back from both; of each level but the first for the derivatives, and back from them.
        sums_of_keys = 2 * (levels - 1) + 4
        rows = "N" if decay else "N N"  # of the gradients that all steps share
        return {
            "factors": Work({"MNC": 1}, sums=1, over_time=f"{decay} k v", float32="N MN"),
            "states": Work(float32="N MN MN"),
            "outputs": outputs,
            "outputs_with_scores": dataclasses.replace(outputs, float32="MN CN CC"),
            "cotangents": Work({"MNC": 1}, over_time="y", float32="N CN MN"),
            "gradients": Work(
                {"CCN": 2 * levels, "CCM": 2, "MNC": 3},
                sums=1 + sums_of_keys,
                over_time=f"{inputs} y {inputs}",
                float32=f"CC MN MN {rows}",
            ),
            # The same in two: each block of values has K, each block of keys dY V^T.
            "gradients_of_values": Work(
                {"CCM": 1, "MNC": 1}, sums=1, sums_in="V", over_time=f"{decay} k y v", float32="CC MN"
            ),
            "gradients_of_keys": Work(
                {"CCN": 2 * levels, "CCMK": 1, "MNC": 2},
                sums=sums_of_keys,
                over_time=f"{inputs} y r {decay} k",
                float32=f"MN MN {rows}",
            ),
        }

    return family


def _wkv4(chunk: int) -> Mapping[str, Work]:
    """Heads are single channels, a state is three numbers; forward they are stored where a backward pass follows."""
    del chunk
    return {"forward": Work(over_time="k v y", float32="3"), "backward": Work(over_time="k v y k v", float32="3")}


def _wkv7_output(chunk: int) -> Mapping[str, Work]:
    """Element-wise but for sums over a head's channels."""
    del chunk
    return {"forward": Work(over_time="y r k v g o"), "backward": Work(over_time="y r k v g o y r k v g")}


_FAMILIES: Mapping[str, Family] = {
    "wkv4": _wkv4,
    "wkv5": _decayed_attention("r k v", fixed=True),
    "wkv6": _decayed_attention("r log_w k v", fixed=False),
    "wkv5_split": _decayed_attention_split(""),
    "wkv6_split": _decayed_attention_split("log_w"),
    "wkv7": _wkv7,
    "wkv7_split": _wkv7_split,
    "wkv7_tiles": _wkv7_tiles,
    "wkv7_output": _wkv7_output,
    "wkv7_step": lambda _: {"": Work(over_time="r w k v a g v_first nu o", float32="MN MN")},  # with a value residual
}
"""By what the kernels' names begin with."""

_SINGLE_STEPS = ("wkv7_output", "wkv7_step")
"""Families without chunks: each step's work is its own."""


def work_of(name: str, chunk: int) -> Work | None:
    """The work of a kernel such as `wkv7_split_factors`, with chunks of that size; None if it is not known."""
    for prefix, family in _FAMILIES.items():
        if name == prefix or name.startswith(f"{prefix}_"):
            work = family(chunk).get(name[len(prefix) + 1 :])
            if work is not None:
                return work
    return None


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


def kernel_cost(name: str, sizes: Sizes, item_bytes: Mapping[str, int]) -> KernelCost:
    """The cost of a kernel.

    Args:
      name: such as `wkv7_forward_saving_states` or `wkv7_split_factors`.
      sizes: as padded.
      item_bytes: of an element of each of the operator's inputs over time; y, o and g are as v.

    Raises:
      KeyError: its work is not known.
    """
    work = work_of(name, sizes.chunk)
    if work is None:
        raise KeyError(name)
    chunk = 1 if name.startswith(_SINGLE_STEPS) else sizes.chunk
    axes = rwkv_kernels.OPERATORS[name.split("_")[0]].axes

    def row(array: str) -> int:
        """Bytes of one step of an array over time."""
        size = sizes.value_dim if "M" in axes.get(array, "M") else sizes.key_dim
        item = item_bytes.get(array, item_bytes["v"])
        return size * (work.float32_bytes if item == 4 else item)

    numbers = sum(int(x) if x.isdigit() else sizes.product(x) for x in work.float32.split())
    products = sum(count * sizes.product(letters) for letters, count in work.products.items())
    return KernelCost(
        bytes=sum(map(row, work.over_time.split())) + work.float32_bytes * numbers / chunk,
        products=2 * products / chunk,
        sums=2 * work.sums * sizes.product(f"CCN{work.sums_in}") / chunk,
    )


def family_of(implementation: str, operator: str) -> str:
    """What the names of an implementation's kernels begin with."""
    forms = {SPLIT_KERNELS: "_split", TPU_SPLIT_KERNELS: "_split", TILE_KERNELS: "_tiles"}
    return operator + forms.get(implementation, "")


def sizes_of(implementation: str, operator: str, key_dim: int, value_dim: int) -> Sizes:
    """The sizes that an implementation's kernels have for heads of these."""
    chunk, smallest = CHUNKS[implementation][operator], _SMALLEST_HEADS.get(implementation, 1)
    if operator == "wkv4":
        return Sizes(key_dim, value_dim, chunk)
    return Sizes(padded_size(key_dim, smallest), padded_size(value_dim, smallest), chunk)


def operator_costs(
    implementation: str, operator: str, key_dim: int, value_dim: int, item_bytes: Mapping[str, int]
) -> tuple[tuple[KernelCost, ...], tuple[KernelCost, ...]]:
    """Costs of the kernels that an implementation launches forward, where a backward pass follows, and backward."""
    sizes, family = sizes_of(implementation, operator, key_dim, value_dim), family_of(implementation, operator)
    forward, backward = (
        tuple(kernel_cost(f"{family}_{stage}", sizes, item_bytes) for stage in stages)
        for stages in stages_of(implementation, operator, sizes.key_dim, sizes.value_dim)
    )
    return forward, backward


def map_columns(operator: str, key_dim: int, value_dim: int) -> int:
    """Value columns of the pass that maps a shard's steps, where time is split: RWKV-7 also has as many as keys.

    See `rwkv_kernels.xla.state_passing`.
    """
    return value_dim + key_dim if operator == "wkv7" else value_dim


# In a compiled program

_NAME = re.compile(r"\bwkv[4-7]_\w+")


class Call(NamedTuple):
    """A call of one of our kernels."""

    name: str
    work: Work | None
    """None if it is not known."""
    sizes: Sizes | None
    """None of a kernel that multiplies no matrices, or whose work is not known."""
    num_chunks: float
    """Chunks of all rows and heads; the last may be shorter."""


def find_call(computation: Computation, instruction: Instruction) -> Call | None:
    """The call of a kernel that an instruction is, or None."""
    if instruction.opcode != "custom-call":
        return None
    names = _NAME.findall(f"{instruction.name} {instruction.attributes}")
    if not names:
        return None
    # A scope may be named after the operator, too.
    name = next((x for x in names if work_of(x, 16) is not None), names[0])
    implementation = _implementation(name, on_tpu="tpu_custom_call" in instruction.attributes)
    chunk = CHUNKS[implementation].get(name.split("_")[0], 1)
    work = work_of(name, chunk)
    if work is None or not work.products:
        return Call(name, work, None, 0)
    operands, results = computation.operand_arrays(instruction), instruction.results
    if implementation not in (SPLIT_KERNELS, TILE_KERNELS):
        value_dim, key_dim = operands[-1].dims[-2:]  # the state, or its cotangent
        return Call(name, work, Sizes(key_dim, value_dim, chunk), operands[0].size / operands[0].dims[-1] / chunk)
    if implementation == TILE_KERNELS:  # some array has a tile for each chunk: [planes, B, H, T / C, M, N]
        of_chunks = next(x.dims[1:] for x in (*operands, *results) if len(x.dims) == 6)
    else:
        of_chunks = _of_chunks(name.rpartition("_split_")[2], operands, results).dims
    batch, heads, count, value_dim, key_dim = of_chunks
    return Call(name, work, Sizes(key_dim, value_dim, chunk), batch * heads * count)


def _implementation(name: str, on_tpu: bool) -> str:
    """The implementation that a kernel is of."""
    if on_tpu:
        return TPU_SPLIT_KERNELS if "_split_" in name else TPU_KERNELS
    return SPLIT_KERNELS if "_split_" in name else TILE_KERNELS if "_tiles_" in name else KERNELS


def _of_chunks(stage: str, operands: Sequence[Array], results: Sequence[Array]) -> Array:
    """The array [B, H, T / C, M, N] of a split kernel: the states of all chunks, or what these add to the state."""
    if stage.startswith("factors"):
        return results[1]
    return results[0] if stage in ("states", "cotangents") else operands[-1]


def bfloat16_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of a call of one of our kernels at precision `full`; 0 for any other instruction."""
    call = find_call(computation, instruction)
    if call is None or call.work is None or call.sizes is None:
        return 0
    products = sum(count * call.sizes.product(letters) for letters, count in call.work.products.items())
    sums = call.work.sums * call.sizes.product(f"CCN{call.work.sums_in}")
    return round(2 * call.num_chunks * (PASSES["full"] * products + PASSES_OF_SUMS * sums))


def uncounted_kernels(module: Module) -> tuple[str, ...]:
    """Names of the program's kernels whose products no formula here counts."""
    found = {}
    for computation, instruction, _ in module.running():
        call = find_call(computation, instruction)
        if call is not None and call.work is None:
            found[call.name] = None
    return tuple(found)
