"""Devices to plan for, with their data-sheet figures, and topologies by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rwkv_jax.config import ConfigError

Platform = Literal["cuda", "tpu", "cpu"]

PREALLOCATED = 0.75
"""Share of a GPU's memory that JAX preallocates by default."""


LAUNCH = 2.3e-6
"""Seconds from one kernel to the next on a GPU, at least, where kernels are launched one by one. Assumed, after others'
figures for an H100 (2.3 to 2.5 us); it was not measured here."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator by its data sheet, in bytes, bytes/s and FLOP/s."""

    name: str
    platform: Platform
    memory: int
    """In all; `memory_for_jax` is what JAX may use of it."""
    bfloat16: float
    """Dense matrix products with 16-bit inputs."""
    float32_default: float
    """Matrix products of float32 at XLA's default precision: TF32 on NVIDIA, one pass of bfloat16 on a TPU."""
    float32_highest: float
    """Matrix products of float32 in full: no tensor cores on NVIDIA, six passes of bfloat16 on a TPU."""
    memory_bandwidth: float
    link_bandwidth: float
    """To devices of the same host (for a TPU, of the same slice), one way, all links together."""
    host_bandwidth: float
    """To other hosts, one way, per device; not used within a TPU slice."""
    devices_per_host: int
    dimensions: int
    """Number of sizes in a topology's name."""
    max_devices: int
    """Of one TPU slice; for GPUs and CPUs, the most that a plan supports."""
    launch: float = 0.0
    """Seconds that an instruction takes at least: `LAUNCH` on GPUs, where each is a kernel to launch."""

    @property
    def peaks(self) -> Mapping[str, float]:
        """FLOP/s of matrix products by `costs.Precision`."""
        return {
            "bfloat16": self.bfloat16,
            "float32 default": self.float32_default,
            "float32 highest": self.float32_highest,
        }

    @property
    def memory_for_jax(self) -> int | None:
        """Bytes that JAX reports for such a device, by which `auto` sizes are chosen; None for CPUs."""
        shares: Mapping[Platform, float | None] = {"cuda": PREALLOCATED, "tpu": 1.0, "cpu": None}
        share = shares[self.platform]
        return None if share is None else int(share * self.memory)


# NVIDIA: data sheets of H100 SXM, H200 and A100 80GB SXM; NVLink's 900 (600) GB/s are for both directions together.
# Hosts are assumed to have one 400 Gb/s network card (200 for A100) per GPU, like DGX and HGX machines. Memory is what
# XLA reports. TPU: cloud.google.com/tpu/docs, v4 to v6e; interconnect figures there are for both directions together.
# The data center network is left out, since a plan is of one slice.
_H100 = Device(
    "h100",
    "cuda",
    memory=84_978_434_048,
    bfloat16=989.4e12,
    float32_default=494.7e12,
    float32_highest=66.9e12,
    memory_bandwidth=3.35232e12,
    link_bandwidth=450e9,
    host_bandwidth=50e9,
    devices_per_host=8,
    dimensions=2,
    max_devices=16384,
    launch=LAUNCH,
)
_A100 = dataclasses.replace(
    _H100,
    name="a100-80g",
    memory=85_100_068_864,
    bfloat16=312e12,
    float32_default=156e12,
    float32_highest=19.5e12,
    memory_bandwidth=2.039e12,
    link_bandwidth=300e9,
    host_bandwidth=25e9,
)


def _tpu(
    name: str, gibibytes: int, bfloat16: float, bandwidth: float, link: float, dimensions: int, max_devices: int
) -> Device:
    return Device(
        name,
        "tpu",
        memory=gibibytes << 30,
        bfloat16=bfloat16,
        float32_default=bfloat16,
        float32_highest=bfloat16 / 6,
        memory_bandwidth=bandwidth,
        link_bandwidth=link,
        host_bandwidth=link,
        devices_per_host=4,
        dimensions=dimensions,
        max_devices=max_devices,
    )


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _H100,
        dataclasses.replace(_H100, name="h200", memory=151_397_597_184, memory_bandwidth=4.8e12),
        _A100,
        _tpu("v4", 32, 275e12, 1.228e12, 300e9, dimensions=3, max_devices=4096),
        _tpu("v5e", 16, 197e12, 0.819e12, 200e9, dimensions=2, max_devices=256),
        _tpu("v5p", 95, 459e12, 2.765e12, 600e9, dimensions=3, max_devices=6144),
        _tpu("v6e", 32, 918e12, 1.640e12, 400e9, dimensions=2, max_devices=256),
        # For tests: round figures for a server CPU, of no particular machine.
        Device("cpu", "cpu", 64 << 30, 2e12, 2e12, 2e12, 200e9, 100e9, 100e9, 64, dimensions=1, max_devices=512),
    )
}

_FLAT_SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""Slices of v5e and v6e."""
_SMALL_CUBOIDS = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Slices of v4 and v5p smaller than 4x4x4; in larger ones every size is a multiple of 4."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices and how they are connected."""

    device: Device
    shape: tuple[int, ...]
    """Hosts and GPUs per host; the torus of a TPU slice; the number of CPU devices."""

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.device.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """Parses `h100:8x8` (hosts x GPUs per host), `v5p:4x4x8` (the torus) or `cpu:8`.

    Raises:
      ConfigError: an unknown device, a wrong number of sizes, or a slice that does not exist.
    """
    name, _, sizes = text.partition(":")
    if name not in DEVICES:
        raise ConfigError(f"topology = {text!r}: no device is called {name!r}; there are {', '.join(DEVICES)}")
    device = DEVICES[name]
    example = {"cuda": "HOSTSxGPUS, such as 8x8", "cpu": "a number of devices, such as 8"}.get(
        device.platform, f"a torus of {device.dimensions} sizes, such as {'x'.join('4' * device.dimensions)}"
    )
    try:
        shape = tuple(map(int, sizes.split("x")))
    except ValueError:
        shape = ()
    if len(shape) != device.dimensions or min(shape) < 1:
        raise ConfigError(f"topology = {text!r}: after {name}: comes {example}")
    problem = _problem(Topology(device, shape))
    if problem is not None:
        raise ConfigError(f"topology = {text!r}: {problem}")
    return Topology(device, shape)


def _problem(topology: Topology) -> str | None:
    device, shape = topology.device, topology.shape
    if topology.num_devices > device.max_devices:
        return f"{topology.num_devices} devices; a plan knows {device.name} up to {device.max_devices}"
    if device.platform == "cuda" and shape[1] > device.devices_per_host:
        return f"{shape[1]} GPUs a host; a host has at most {device.devices_per_host}, so name more hosts"
    ordered = tuple(sorted(shape))
    if device.platform == "tpu" and device.dimensions == 2 and ordered not in _FLAT_SLICES:
        return f"there is no such slice; there are {', '.join(f'{a}x{b}' for a, b in _FLAT_SLICES)}"
    if device.platform == "tpu" and device.dimensions == 3 and ordered not in _SMALL_CUBOIDS:
        wrong = [size for size in shape if size % 4]
        if wrong:
            small = ", ".join("x".join(map(str, slice_)) for slice_ in _SMALL_CUBOIDS)
            return f"there is no such slice; sizes are multiples of 4, or the slice is one of {small}"
    return None


def cuda_target(device: Device) -> str:
    """XLA's description of an NVIDIA GPU: GpuTargetConfigProto as text."""
    is_hopper = device.name in ("h100", "h200")
    shared, optin, cores, floats = (233472, 232448, 132, 128) if is_hopper else (167936, 166912, 108, 64)
    description = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}.get(device.name, "NVIDIA A100-SXM4-80GB")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {floats} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {round(device.memory_bandwidth)}
  l2_cache_size: {52428800 if is_hopper else 41943040} clock_rate_ghz: {1.98 if is_hopper else 1.41}
  device_memory_size: {device.memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {9 if is_hopper else 8} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{description}"
"""


TPU_ENVIRONMENT: Mapping[str, str] = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no TPU, so several processes may
}
"""Environment variables that keep libtpu from looking for a TPU."""

_COMPILERS: Mapping[Platform, str] = {"cuda": "jax_cuda13_plugin", "tpu": "libtpu"}


def check_compiler(topology: Topology) -> None:
    """Raises ConfigError if the compiler for a topology's devices is not installed."""
    module = _COMPILERS.get(topology.device.platform)
    if module is not None and importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"topology = '{topology}': the compiler for it, {module}, is not installed (a GPU or TPU is not needed): "
            "pip install -e '.[plan]'"
        )


def prepare_compiler(topology: Topology) -> None:
    """Keeps JAX on the CPU, with as many CPU devices as the topology has.

    Sets environment variables and JAX's settings: call it before JAX is first used, in a process of its own.

    Raises:
      ConfigError: the compiler is not installed.
    """
    import jax

    check_compiler(topology)
    os.environ.update(TPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    if topology.device.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.num_devices)


def topology_devices(topology: Topology) -> Sequence[Any]:
    """The JAX devices of a topology, only to compile for (for CPUs, those of this process).

    Raises:
      ConfigError: the compiler refuses the topology, or this process has fewer CPU devices.
    """
    import jax
    from jax.experimental import topologies

    device, shape = topology.device, topology.shape
    if device.platform == "cpu":
        present = jax.devices("cpu")
        if len(present) < topology.num_devices:
            raise ConfigError(
                f"topology = '{topology}': this process has {len(present)} CPU devices; set jax_num_cpu_devices to "
                f"{topology.num_devices} before JAX is first used"
            )
        return present[: topology.num_devices]
    sizes = "x".join(map(str, shape))
    try:
        if device.platform == "cuda":
            options = {"target_config": cuda_target(device), "topology": f"1x{sizes}"}
            return topologies.get_topology_desc(device.name, platform="cuda", **options).devices
        # A v4 chip's two cores as one device, as JAX has it there.
        options = {"chip_config_name": "megacore"} if device.name == "v4" else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{device.name}:{sizes}", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology = '{topology}': its compiler refuses: {error}") from error


def unoptimized_on_cpu() -> dict[str, Any]:
    """Compiler options that take compilation for a CPU to a fifth of its time, for what hardly runs.

    Only those that the installed XLA knows, since it refuses others.
    """
    import jax

    # One module of LLVM a program: splitting one for several threads is a sixth of what remains.
    options: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    return options | ({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {})
