"""Compiles the Pallas kernels for an H100 and for TPUs on a machine that has neither, and reads what came of it.

XLA's GPU and TPU compilers need the description of a device and not the device. Registers and spills are NVIDIA's
assembler's own count, for the code that XLA hands to the driver; nothing here says how fast a kernel is.
Needs what constraints/devices-3.11.txt lists.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend import core as jex

from rwkv_jax.plan.devices import DEVICES, TPU_ENVIRONMENT, cuda_target
from rwkv_kernels.ops.wkv7.cases import MODEL_CONSTANTS
from rwkv_kernels.ops.wkv7.output_pallas_triton import wkv7_output_pallas_triton
from rwkv_kernels.ops.wkv7.pallas_mosaic_gpu import wkv7_pallas_mosaic_gpu
from rwkv_kernels.ops.wkv7.step import STEP
from rwkv_kernels.ops.wkv7.step_pallas_triton import wkv7_step_pallas_triton
from rwkv_kernels.pallas.triton_split import warps_of_products
from rwkv_kernels.precision import Precision
from rwkv_kernels.testing.cases import Shape

OPERATORS = ("wkv4", "wkv5", "wkv6", "wkv7")
TRITON = (*OPERATORS, "wkv5_split", "wkv6_split", "wkv7_split")
"""What there is for NVIDIA through Triton: the kernels of each operator, and those of `pallas_triton_split`."""
TILES = "wkv7_tiles"
"""The kernels of `pallas_mosaic_gpu`."""
TPU = (*OPERATORS, "wkv7_split")
"""For TPUs: the kernels of each operator, and those of `pallas_mosaic_tpu_split`."""
KERNELS = ("forward", "forward, storing", "backward")
SPLIT_KERNELS = (
    "factors",
    "factors, storing",
    "states",
    "outputs",
    "outputs, storing",
    "cotangents",
    "gradients",
    "gradients of values",
    "gradients of keys",
)
"""The last two take the place of `gradients` where heads are larger than 64."""
STORING = {"factors, storing": "factors_with_inverse", "outputs, storing": "outputs_with_scores"}
"""What the names of kernels end in that also write what the backward pass starts from."""
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
SHAPE = Shape(8, 4096, 64, 64, 64)
"""Heads of a model of 7B; sizes are strides and bounds of loops to a kernel, and registers depend on them a little."""
TPU_SHAPE = Shape(2, 4096, 16, 64, 64)
"""Within the memory of every TPU, and mostly too large for the chip's own, where the compiler would put arrays."""

GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""TPU generations, and a slice of each that has whole hosts."""

Direction = Literal["forward", "gradient"]
"""One kernel, or the two of a forward pass that stores states and of the backward pass."""


@dataclasses.dataclass(frozen=True)
class TritonResources:
    """What a kernel takes on an H100."""

    kernel: str
    """forward, `forward, storing` (the states that the backward pass starts from), backward, or of `SPLIT_KERNELS`."""
    registers: int
    """A thread's, of 255."""
    spill_stores: int
    """Bytes a thread; loads likewise."""
    spill_loads: int
    shared_memory: int
    """Bytes a program."""
    wgmma: int
    """Tensor-core instructions of a warp group in the kernel's text, loops counted once."""
    mma_sync: int
    """Tensor-core instructions of a warp."""
    bytes: int
    """Of all its arguments and results, a token and head: what it moves if it moves each once."""


@dataclasses.dataclass(frozen=True)
class TpuResources:
    """What a kernel takes on a TPU."""

    kernel: str
    vmem: int
    """Bytes of on-chip memory."""
    bundles: int
    """VLIW instructions of a program, a chunk of a few heads; it has no loops. A core issues at most one a cycle."""


def is_available() -> bool:
    """Whether the compilers are installed."""
    return all(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "libtpu")) and _ptxas() is not None


_LISTINGS = tempfile.TemporaryDirectory(prefix="llo")
"""Where the TPU compiler leaves what it says of programs; libtpu reads the name once, when it is loaded."""
_LISTING = "final_hlo-static-per-bundle-utilization"


def prepare() -> None:
    """Keeps JAX on the CPU, and tells libtpu not to look for a TPU. To be called before JAX is used."""
    listings = f"--xla_jf_dump_to={_LISTINGS.name} --xla_jf_dump_llo_text=true"
    flags = f"{listings} --xla_jf_dump_llo_pass_label_regex={_LISTING}"
    os.environ.update(TPU_ENVIRONMENT, LIBTPU_INIT_ARGS=flags)
    jax.config.update("jax_platforms", "cpu")


def _ptxas() -> Path | None:
    """NVIDIA's assembler from its Python package."""
    package = importlib.util.find_spec("nvidia")
    for folder in (package and package.submodule_search_locations) or ():
        if (found := Path(folder, "cu13", "bin", "ptxas")).exists():
            return found
    return None


@functools.cache
def _sharding(device: str) -> jax.sharding.SingleDeviceSharding:
    """Places arrays on a device that is not there: `h100` or a TPU generation."""
    if device == "h100":
        target = cuda_target(DEVICES["h100"])
        described = topologies.get_topology_desc("h100", platform="cuda", target_config=target, topology="1x1x1")
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=GENERATIONS[device])
    return jax.sharding.SingleDeviceSharding(described.devices[0])


def on_h100(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array on an H100 that is not there."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding("h100"))


def _arguments(operator: str, shape: Shape, dtype: Any, sharding: Any) -> tuple[Any, ...]:
    """Arguments of an operator's implementations in order, the state included."""

    def array(*sizes: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    if operator == "wkv4":
        channels = shape.heads * shape.key_dim
        per_channel, over_time = array(channels), array(shape.batch, shape.time, channels)
        state = (array(shape.batch, channels, dtype=jnp.float32),) * 3
        return per_channel, per_channel, over_time, over_time, state
    axes = importlib.import_module(f"rwkv_kernels.ops.{operator[:4]}.api").OPERATOR.axes
    sizes = dict(zip("BTHNM", shape, strict=True))
    inputs = (array(*(sizes[letter] for letter in letters.split())) for letters in axes.values())
    return *inputs, array(*(sizes[letter] for letter in "BHMN"), dtype=jnp.float32)


def implementation(operator: str, backend: str) -> Callable[..., Any]:
    """An operator's function for `pallas_triton` or `pallas_mosaic_tpu`, which does not ask what machine it is on."""
    if operator == TILES:
        return wkv7_pallas_mosaic_gpu
    operator, form = operator[:4], operator[4:]
    module = backend if operator == "wkv4" else "pallas"
    return getattr(importlib.import_module(f"rwkv_kernels.ops.{operator}.{module}"), f"{operator}_{backend}{form}")


def _trace(
    device: str,
    operator: str,
    direction: Direction,
    dtype: str,
    precision: Precision,
    shape: Shape,
    segments: bool,
    options: dict[str, Any],
) -> Any:
    run = implementation(operator, "pallas_triton" if device == "h100" else "pallas_mosaic_tpu")
    if "precision" in inspect.signature(run).parameters:
        options = options | {"precision": precision}

    def forward(segments: Any, *arguments: Any) -> Any:
        return run(*arguments, segments=segments, **options)

    def gradient(segments: Any, *arguments: Any) -> Any:
        outputs, pull_back = jax.vjp(functools.partial(forward, segments), *arguments)
        return pull_back(outputs)

    sharding = _sharding(device)
    ids = jax.ShapeDtypeStruct((shape.batch, shape.time), jnp.int32, sharding=sharding) if segments else None
    return jax.jit({"forward": forward, "gradient": gradient}[direction]).trace(
        ids, *_arguments(operator, shape, DTYPES[dtype], sharding)
    )


def _label(direction: Direction, name: str) -> str:
    if ("split" in name or "tiles" in name) and "ward" not in name:  # one loop on a TPU has forward and backward
        names = {STORING.get(part, part.replace(" ", "_")): part for part in SPLIT_KERNELS}
        return names[re.sub("wkv[567]_(split|tiles)_", "", name)]
    if direction == "forward":
        return "forward"
    return "backward" if "backward" in name else "forward, storing"


def compile_triton(
    operator: str,
    direction: Direction,
    dtype: str = "bfloat16",
    precision: Precision = "full",
    *,
    shape: Shape = SHAPE,
    segments: bool = False,
    **options: Any,
) -> list[TritonResources]:
    """An operator's `pallas_triton` kernels, or those of `TILES`, compiled for an H100; options as implementations'."""
    traced = _trace("h100", operator, direction, dtype, precision, shape, segments, options)
    token_heads = shape.batch * shape.time * shape.heads
    found = _read_kernels(traced, operator, functools.partial(_label, direction), token_heads)
    return sorted(found, key=lambda found: (*KERNELS, *SPLIT_KERNELS).index(found.kernel))


def compile_step(dtype: str = "bfloat16", head_dim: int = 64, batch: int = 64) -> TritonResources:
    """The kernel of `wkv7_step` compiled for an H100, with value residual and lengths, in a model of width 2048.

    Parameters are float32, whatever the dtype of the other inputs; bytes are a row's and head's.
    """
    heads = 2048 // head_dim

    def array(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return on_h100(jax.ShapeDtypeStruct(sizes, dtype))

    constants: dict[str, Any] = {**MODEL_CONSTANTS}

    def run(lengths: Any, inputs: Any, state: Any) -> Any:
        return wkv7_step_pallas_triton(inputs, state, **constants, lengths=lengths)

    sizes = {"B": batch, "H": heads, "N": head_dim}
    inputs = {
        name: array(*map(sizes.__getitem__, axes.split()), dtype=DTYPES[dtype] if "B" in axes else jnp.float32)
        for name, axes in STEP.axes.items()
    }
    state = array(batch, heads, head_dim, head_dim)
    traced = jax.jit(run).trace(array(batch, dtype=jnp.int32), inputs, state)
    (found,) = _read_kernels(traced, "wkv7_step", lambda name: "step", batch * heads)
    return found


def compile_output(
    dtype: str = "bfloat16", head_dim: int = 64, batch: int = 8, time: int = 4096
) -> list[TritonResources]:
    """The kernels of `wkv7_output`, forward and backward, compiled for an H100, in a model of width 4096."""
    heads = 4096 // head_dim
    over_time = on_h100(jax.ShapeDtypeStruct((batch, time, heads, head_dim), DTYPES[dtype]))
    parameter = on_h100(jax.ShapeDtypeStruct((heads, head_dim), jnp.float32))

    def run(*arrays: Any) -> Any:
        o, pull_back = jax.vjp(functools.partial(wkv7_output_pallas_triton, epsilon=1e-5), *arrays)
        return o, pull_back(o)

    traced = jax.jit(run).trace(*[over_time] * 5, *[parameter] * 3)
    found = _read_kernels(traced, "wkv7_output", lambda name: name.rpartition("_")[2], batch * time * heads)
    return sorted(found, key=lambda found: KERNELS.index(found.kernel))


def _read_kernels(traced: Any, part: str, label: Callable[[str], str], token_heads: int) -> list[TritonResources]:
    """Compiles a program for an H100, and reads what became of the kernels with `part` in their names."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        traced.lower().compile(compiler_options={"xla_dump_to": folder})
        moved = dict(_bytes_of_kernels(traced.jaxpr))
        launches = "".join(path.read_text(encoding="utf-8") for path in Path(folder).glob("*thunk_sequence.txt"))
        shared = {
            found["name"]: int(found["bytes"])
            for found in re.finditer(r"(?P<name>\S+) +grid: .*shared_memory: (?P<bytes>\d+) bytes", launches)
        }
        shared |= {f"{name}{_MOSAIC}": size for name, size in _shared_memory(traced.jaxpr)}
        found = [
            _read_ptx(path, name, label(own), shared[name], moved[own] // token_heads)
            for path in Path(folder).glob("*.ptx")
            for name in re.findall(rf"\.visible \.entry (\w*{part}\w*)", path.read_text(encoding="utf-8"))
            for own in [name.removesuffix(_MOSAIC)]
        ]
    for name, arrays in _mosaic_kernels(traced.jaxpr):
        for kernel in found:
            if kernel.kernel == label(name):
                _KEPT[name, arrays] = kernel
                break
        else:
            found.append(_KEPT[name, arrays])
    return found


_MOSAIC = "_mosaic_gpu_kernel"
"""What Mosaic GPU adds to a kernel's name."""

_KEPT: dict[tuple[str, str], TritonResources] = {}
"""Mosaic GPU's kernels, by name and types of their arrays: a process compiles each once."""


def _mosaic_kernels(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Name and types of the arrays of every Mosaic GPU kernel in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "mpmd_map":
            yield equation.params["name"], str([x.aval for x in (*equation.invars, *equation.outvars)])
        else:
            for inner in jex.jaxprs_in_params(equation.params):
                yield from _mosaic_kernels(inner)


def _shared_memory(jaxpr: Any, name: str | None = None) -> Iterator[tuple[str, int]]:
    """Name and bytes of shared memory of every Mosaic GPU kernel in a program, or in one of that name; no barriers."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "mpmd_map":
            name = equation.params["name"]
        inner = list(jex.jaxprs_in_params(equation.params))
        if name is not None and equation.primitive.name == "run_scoped":
            arrays: list[Any] = [x.aval for x in inner[0].invars if "smem" in str(x.aval).lower()]
            if size := sum(x.size * x.dtype.itemsize for x in arrays if x.dtype == jnp.bfloat16):
                yield name, size
        else:
            for each in inner:
                yield from _shared_memory(each, name)


def _bytes_of_kernels(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """Name and bytes of arguments and results of every kernel in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("pallas_call", "mpmd_map"):
            arrays = (x.aval for x in (*equation.invars, *equation.outvars))
            yield equation.params["name"], sum(x.size * x.dtype.itemsize for x in arrays)
        else:
            for inner in jex.jaxprs_in_params(equation.params):
                yield from _bytes_of_kernels(inner)


def _read_ptx(path: Path, name: str, label: str, shared_memory: int, moved: int) -> TritonResources:
    """Assembles a file that XLA wrote, and reads what the assembler says of one of its kernels."""
    command = [str(_ptxas()), "-arch=sm_90a", "-v", str(path), "-o", os.devnull]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    own = said[said.index(f"'{name}'") :]
    (text,) = re.findall(
        rf"\.visible \.entry {name}\(.*?^\}}", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )

    def number(pattern: str) -> int:
        found = re.search(pattern, own)
        assert found, f"ptxas says nothing like {pattern!r}"
        return int(found[1])

    return TritonResources(
        kernel=label,
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared_memory=shared_memory,
        wgmma=text.count("wgmma.mma_async"),
        mma_sync=text.count("mma.sync."),
        bytes=moved,
    )


def compile_tpu(
    generation: str,
    operator: str,
    direction: Direction,
    dtype: str = "bfloat16",
    precision: Precision = "full",
    *,
    shape: Shape = TPU_SHAPE,
    segments: bool = False,
    **options: Any,
) -> list[TpuResources]:
    """An operator's `pallas_mosaic_tpu` kernels compiled for a TPU generation."""
    before = set(Path(_LISTINGS.name).iterdir())
    compiled = _trace(generation, operator, direction, dtype, precision, shape, segments, options).lower().compile()
    listings = set(Path(_LISTINGS.name).iterdir()) - before
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    found = (TpuResources(_label(direction, _name(x)), _vmem(x), _bundles(listings, _name(x))) for x in calls)
    return sorted(found, key=lambda x: x.kernel)


def _name(line: str) -> str:
    """Of a kernel's call in a compiled program."""
    return line.split("=", 1)[0].removeprefix("  ROOT").strip().removeprefix("%")


def _bundles(listings: set[Path], name: str) -> int:
    """Bundles of a kernel, a line each after a heading."""
    (listing,) = (path for path in listings if f"-{name}-" in path.name and _LISTING in path.name)
    return len(listing.read_text(encoding="utf-8").split("UTILIZATION:")[1].strip().splitlines())


def _vmem(line: str) -> int:
    """Bytes of VMEM, memory space 1, that a kernel's call uses."""
    found = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
    return int(found[1]) if found else 0


def settings(operator: str, backend: str, name: str = "forward", key_dim: int = SHAPE.key_dim) -> str:
    """Sizes and warps that are shipped, in words; `name` is a kernel's, as in `TritonResources`."""
    parameters = inspect.signature(implementation(operator, backend)).parameters
    if "kernel" not in parameters:
        found = parameters.values()
        shown = ((x.name.removeprefix("num_").removesuffix("_size"), x.default) for x in found)
        return ", ".join(f"{name} {default}" for name, default in shown if type(default) is int)
    kernel = parameters["kernel"].default
    warps = kernel.num_warps_backward if name.startswith(("backward", "gradients")) else kernel.num_warps
    of_one_product = "outputs" if operator == "wkv7_split" else "factors"
    if name in ("states", "cotangents", of_one_product):
        warps = warps_of_products(key_dim)
    if operator == TILES:
        return f"chunk {kernel.chunk_size}, warpgroups 2"
    rest = f"warps {warps}" if backend == "pallas_triton" else f"heads {kernel.heads}"
    return f"chunk {kernel.chunk_size}, {rest}"
