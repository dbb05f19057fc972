"""Groups of devices in the words of XLA, and the mesh axes that they lie along."""

from __future__ import annotations

import pytest

from rwkv_jax.plan.replica_groups import mesh_axes, parse_groups

PAIRS = ((0, 1), (2, 3))
HALVES = ((0, 1, 2, 3), (4, 5, 6, 7))
FOURS = ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}", FOURS),
        ("replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true", FOURS),
        ("replica_groups=[2,2]<=[4], dimensions={0}", PAIRS),
        ("replica_groups=[1,8]<=[8]", (tuple(range(8)),)),
        ("replica_groups={}, to_apply=%add", (tuple(range(8)),)),
        ("source_target_pairs={{0,1},{2,3}}", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%add", PAIRS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, use_global_device_ids=true", HALVES),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", HALVES),
        ("replica_groups=@mesh<a=2,b=1,c=4> {c}, dimensions={0}", HALVES),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}", FOURS),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", FOURS),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", HALVES),
    ],
)
def test_groups_in_every_form(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert parse_groups(f", channel_id=1, {text}", 8) == groups


@pytest.mark.parametrize(
    "text", ["dimensions={0}", "replica_groups=[2,4]<=[8]X", "replica_groups={0,1}", "replica_groups=@other"]
)
def test_groups_of_no_known_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no replica groups of a known form"):
        parse_groups(text, 8)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (PAIRS, ("tensor",)),
        (FOURS, ("fsdp", "sequence")),
        (((0, 4), (1, 5)), ("fsdp",)),
        ((tuple(range(8)),), ("fsdp", "sequence", "tensor")),
        (((0,), (1,)), ()),
        (((0, 2), (2, 0), (4, 6)), ("sequence",)),
    ],
)
def test_mesh_axes_of_groups(groups: tuple[tuple[int, ...], ...], axes: tuple[str, ...]) -> None:
    assert mesh_axes(groups, {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}) == axes
