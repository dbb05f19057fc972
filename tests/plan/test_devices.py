"""Names of topologies, what is wrong with some, and what compilers are told of a device."""

from __future__ import annotations

import importlib.util
import re

import jax
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.plan.devices import (
    DEVICES,
    check_compiler,
    cuda_target,
    parse_topology,
    topology_devices,
)


@pytest.mark.parametrize(
    ("text", "shape", "count"),
    [
        ("h100:8x8", (8, 8), 64),
        ("h200:1x8", (1, 8), 8),
        ("a100-80g:2x4", (2, 4), 8),
        ("v5p:8x8x4", (8, 8, 4), 256),
        ("v4:2x2x1", (2, 2, 1), 4),
        ("v5e:16x16", (16, 16), 256),
        ("v6e:2x4", (2, 4), 8),
        ("cpu:8", (8,), 8),
    ],
)
def test_topologies(text: str, shape: tuple[int, ...], count: int) -> None:
    topology = parse_topology(text)
    assert (topology.shape, topology.num_devices, str(topology)) == (shape, count, text)
    assert topology.device is DEVICES[text.partition(":")[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b200:1x8", "no device is called 'b200'; there are h100, h200, a100-80g, v4, v5e, v5p, v6e, cpu"),
        ("", "no device is called ''"),
        ("h100", "after h100: comes HOSTSxGPUS, such as 8x8"),
        ("h100:8", "after h100: comes HOSTSxGPUS"),
        ("h100:8x-1", "after h100: comes HOSTSxGPUS"),
        ("h100:0x8", "after h100: comes HOSTSxGPUS"),
        ("h100:2x16", "16 GPUs a host; a host has at most 8, so name more hosts"),
        ("v5p:4x4", "after v5p: comes a torus of 3 sizes, such as 4x4x4"),
        ("v5p:4x4x6", "sizes are multiples of 4, or the slice is one of 1x2x2"),
        ("v5p:64x64x64", "262144 devices; a plan knows v5p up to 6144"),
        ("v5e:4x4x4", "after v5e: comes a torus of 2 sizes, such as 4x4"),
        ("v5e:3x3", "no such slice; there are 1x1, 2x2"),
        ("v5e:16x32", "512 devices; a plan knows v5e up to 256"),
        ("cpu:eight", "after cpu: comes a number of devices, such as 8"),
        ("cpu:1024", "a plan knows cpu up to 512"),
    ],
)
def test_what_is_no_topology_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse_topology(text)
    assert str(caught.value).startswith(f"topology = {text!r}: ")


@pytest.mark.parametrize(("text", "module"), [("h100:1x8", "jax_cuda13_plugin"), ("v5e:2x2", "libtpu")])
def test_a_missing_compiler_names_the_extra(text: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{module}, is not installed .*\[plan\]"):
        check_compiler(parse_topology(text))


def test_cpus_need_no_compiler_but_as_many_devices() -> None:
    check_compiler(parse_topology("cpu:8"))
    assert topology_devices(parse_topology("cpu:1")) == jax.devices("cpu")[:1]
    with pytest.raises(ConfigError, match="set jax_num_cpu_devices to 512 before JAX is first used"):
        topology_devices(parse_topology("cpu:512"))


@pytest.mark.parametrize(("name", "share"), [("h100", 0.75), ("h200", 0.75), ("v5p", 1.0)])
def test_memory_is_what_jax_would_say_there(name: str, share: float) -> None:
    assert DEVICES[name].memory_for_jax == int(share * DEVICES[name].memory)


def test_a_cpu_says_no_memory() -> None:
    assert DEVICES["cpu"].memory_for_jax is None
    assert not jax.devices("cpu")[0].memory_stats()


def test_every_device_is_told_apart() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.memory > 1 << 33
        assert device.float32_highest <= device.float32_default <= device.bfloat16
        assert device.host_bandwidth <= device.link_bandwidth <= device.memory_bandwidth
    targets = [cuda_target(device) for device in DEVICES.values() if device.platform == "cuda"]
    assert len(set(targets)) == 3
    assert f"device_memory_size: {DEVICES['h200'].memory} " in targets[1]
    assert "major: 8 minor: 0" in targets[2]
