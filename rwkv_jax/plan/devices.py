"""The devices that a run can be planned for: what each can do by its data sheet, and slices of them by name."""

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
"""Share of a GPU's memory that JAX takes, and says it has, unless it is told another."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, by its maker's figures: bytes, bytes a second, floating-point operations a second."""

    name: str
    platform: Platform
    memory: int
    """All of it; see `memory_for_jax`."""
    bfloat16: float
    """Matrix products with inputs of 16 bits, dense."""
    float32_default: float
    """Those of float32 with XLA's default precision: TF32 on NVIDIA, one pass of bfloat16 on a TPU."""
    float32_highest: float
    """Those of float32 in full: no tensor cores on NVIDIA, six passes of bfloat16 on a TPU."""
    memory_bandwidth: float
    link_bandwidth: float
    """To devices of the same host (of the same slice, for a TPU), one way, over all links at once."""
    host_bandwidth: float
    """To other hosts, one way, a device's share of its host's network; not used within a TPU slice."""
    devices_per_host: int
    dimensions: int
    """Sizes in the name of a slice."""
    max_devices: int
    """Of one slice; for GPUs and CPUs what a plan of this kind still makes sense for."""

    @property
    def memory_for_jax(self) -> int | None:
        """Bytes that JAX would say such a device has, by which `auto` sizes are chosen; None for CPUs, which do not."""
        shares: Mapping[Platform, float | None] = {"cuda": PREALLOCATED, "tpu": 1.0, "cpu": None}
        share = shares[self.platform]
        return None if share is None else int(share * self.memory)


# NVIDIA: data sheets of H100 SXM, H200 and A100 80GB SXM; NVLink's 900 (600) GB/s are both ways together. A host is
# taken to have one network card of 400 Gb/s (200 for A100) for each GPU, as in DGX and HGX machines. Memory is what
# XLA finds on one. TPU: cloud.google.com/tpu/docs, v4 to v6e; interconnect figures there are both ways together, and a
# chip's share of the data center's network is left out, since a plan is of one slice.
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
    name: str, gibibytes: int, bfloat16: float, bandwidth: float, link: float, dimensions: int, most: int
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
        max_devices=most,
    )


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _H100,
        dataclasses.replace(_H100, name="h200", memory=151_397_597_184, memory_bandwidth=4.8e12),
        _A100,
        _tpu("v4", 32, 275e12, 1.228e12, 300e9, dimensions=3, most=4096),
        _tpu("v5e", 16, 197e12, 0.819e12, 200e9, dimensions=2, most=256),
        _tpu("v5p", 95, 459e12, 2.765e12, 600e9, dimensions=3, most=6144),
        _tpu("v6e", 32, 918e12, 1.640e12, 400e9, dimensions=2, most=256),
        # For tests: round figures of a server's socket, and of no machine in particular.
        Device("cpu", "cpu", 64 << 30, 2e12, 2e12, 2e12, 200e9, 100e9, 100e9, 64, dimensions=1, max_devices=512),
    )
}

_FLAT_SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""Slices of v5e and v6e."""
_SMALL_CUBOIDS = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Slices of v4 and v5p of less than a cube of 4 x 4 x 4; of more, every size is a multiple of 4."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of devices and how they are connected."""

    device: Device
    shape: tuple[int, ...]
    """Hosts and GPUs of each; the torus of a TPU slice; a number of CPU devices."""

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.device.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """A topology from its name: `h100:8x8` (hosts x GPUs of each), `v5p:4x4x8` (the torus), `cpu:8`.

    Raises:
      ConfigError: an unknown device, a shape of another rank, or a slice that does not exist.
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
    """What XLA needs to know of an NVIDIA GPU: GpuTargetConfigProto in its text form."""
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
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a compiler holds no TPU, so several may run at once
}
"""What keeps libtpu from looking for a TPU."""

_COMPILERS: Mapping[Platform, str] = {"cuda": "jax_cuda13_plugin", "tpu": "libtpu"}


def check_compiler(topology: Topology) -> None:
    """Raises ConfigError, with the remedy, where the compiler for a topology's devices is not installed."""
    module = _COMPILERS.get(topology.device.platform)
    if module is not None and importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"topology = '{topology}': the compiler for it, {module}, is not installed (a GPU or TPU is not needed): "
            "pip install -e '.[plan]'"
        )


def prepare_compiler(topology: Topology) -> None:
    """Keeps JAX on the CPU, with as many devices as a plan for CPUs asks for.

    To be called before JAX is first used, in a process of its own: it sets environment variables and JAX's settings.

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
    """The JAX devices of a topology, to compile for and nothing else (for CPUs: those of this process).

    Raises:
      ConfigError: the compiler knows no such slice, or there are fewer CPU devices than the topology has.
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
        # Both cores of a v4 chip as one device, as a program that runs there sees them.
        options = {"chip_config_name": "megacore"} if device.name == "v4" else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{device.name}:{sizes}", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology = '{topology}': its compiler refuses: {error}") from error
