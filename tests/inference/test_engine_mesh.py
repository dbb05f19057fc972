"""On several devices the engine writes what it writes on one."""

from __future__ import annotations

import pytest

from tests.fake_devices import run_on_fake_devices


@pytest.mark.parametrize(
    ("generation", "shapes"),
    [
        pytest.param("7", ["2x1x2"], marks=pytest.mark.long),
        pytest.param("7", ["4x1x1", "1x4x1", "2x2x1", "1x2x2"], marks=pytest.mark.long),
        pytest.param("4", ["2x1x2"], marks=pytest.mark.long),
        pytest.param("6", ["2x1x2"], marks=pytest.mark.long),
    ],
)
def test_on_a_mesh_the_same_is_written(generation: str, shapes: list[str]) -> None:
    """Meshes are data x fsdp x tensor; the slots lie on all their devices, split over data and fsdp."""
    report = run_on_fake_devices(4, "tests.inference.on_mesh", generation, *shapes)
    for shape in shapes:
        assert report[shape] == report["one"]
        data, fsdp, _ = map(int, shape.split("x"))
        assert report[f"devices of {shape}"] == [4]
        assert report[f"rows of {shape}"] == [4 // (data * fsdp)]
