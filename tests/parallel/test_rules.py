"""The table of what is split over what: every parameter has its place, and what cannot be split is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from rwkv_jax.config import ConfigError, ModelConfig, student_of
from rwkv_jax.models import abstract_model, model_type
from rwkv_jax.parallel.mesh import AXES
from rwkv_jax.parallel.rules import RULES, check_divisible, check_model, parameter_specs
from rwkv_jax.parallel.sharded_model import shard_model
from rwkv_jax.weights.official import official_names

GENERATIONS = ("4", "5.0", "5.1", "5.2", "6", "7")


def mesh(**sizes: int) -> Any:
    return AbstractMesh(tuple(sizes.get(name, 1) for name in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def small(generation: Any, vocab_size: int = 96) -> ModelConfig:
    return ModelConfig(generation, vocab_size=vocab_size, num_layers=3, width=64, head_dim=8)


def specs_of(config: ModelConfig) -> dict[str, PartitionSpec]:
    params = abstract_model(config)[1]
    specs = parameter_specs(model_type(config), params)
    flat = jax.tree.leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return {official_names(path, config.num_layers)[0]: spec for path, spec in flat}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_matrix_is_scattered_and_every_spec_fits(generation: str) -> None:
    config = small(generation)
    params = abstract_model(config)[1]
    specs = jax.tree.leaves(parameter_specs(model_type(config), params), is_leaf=lambda x: isinstance(x, PartitionSpec))
    for (path, x), spec in zip(jax.tree.leaves_with_path(params), specs, strict=True):
        assert len(spec) <= x.ndim
        names = [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
        own = x.shape[1:] if path[0].key == "blocks" else x.shape
        is_matrix = len([size for size in own if size > 1]) >= 2 and x.size > 1000
        assert ("fsdp" in names) == is_matrix, path


def test_the_table_is_megatrons() -> None:
    specs = specs_of(small("7"))
    assert specs["blocks.0.att.key.weight"] == PartitionSpec("tensor", "fsdp")
    assert specs["blocks.0.att.output.weight"] == PartitionSpec("fsdp", "tensor")
    assert specs["blocks.1.ffn.key.weight"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["blocks.1.ffn.value.weight"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["blocks.0.att.w2"] == PartitionSpec(None, ("tensor", "fsdp"))
    assert specs["emb.weight"] == specs["head.weight"] == PartitionSpec("tensor", "fsdp")
    assert specs["blocks.0.att.r_k"] == PartitionSpec("tensor", None)
    assert specs["blocks.0.att.x_r"] == PartitionSpec(None, None, None)


def test_two_axes_over_one_mesh_axis_are_a_collision() -> None:
    with pytest.raises(ConfigError, match=r"^w: its axes heads and ffn would both .* mesh axis 'tensor'"):
        RULES.spec(("heads", "ffn"), "w")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ffn": ()}, "vocab .* heads .* ffn .* gate .* the same one mesh axis"),
        ({"vocab": ("data",)}, "the same one mesh axis"),
        ({"embed": ("data",)}, r"embed \('data',\) must be \('fsdp',\) or \(\)"),
        ({"rows": ("data",)}, r"rows \('data',\) be split over it too"),
        ({"low_rank_heads": ("tensor",)}, r"low_rank_heads .* must be \('tensor', 'fsdp'\)"),
        ({"time": ("data",)}, "must not share mesh axes"),
    ],
)
def test_rules_that_the_model_does_not_understand_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^rules: .*{message}"):
        dataclasses.replace(RULES, **changed)


def test_rules_on_a_mesh_leave_out_axes_of_one_device() -> None:
    rules = RULES.on(mesh(data=2, tensor=4))
    assert (rules.rows, rules.embed, rules.heads, rules.low_rank_heads) == (("data",), (), ("tensor",), ("tensor",))


def test_sizes_that_do_not_divide_are_named_with_the_nearest_that_do() -> None:
    with pytest.raises(
        ConfigError,
        match=r"p: size 50277 of axis 0 of \[50277, 8\] is no multiple of parallel.tensor = 4; .* 50276 and 50280",
    ):
        check_divisible((50277, 8), PartitionSpec("tensor", None), mesh(tensor=4), "p")
    check_divisible((50280, 8), PartitionSpec("tensor", None), mesh(tensor=4), "p")
    with pytest.raises(ConfigError, match=r"parallel.tensor = 4 x parallel.fsdp = 4.*: 64 and 80"):
        check_divisible((8, 72), PartitionSpec(None, ("tensor", "fsdp")), mesh(tensor=4, fsdp=4), "p")


def check(config: ModelConfig, **sizes: int) -> None:
    heads = config.num_heads if config.spec.has_heads else None
    check_model(model_type(config), abstract_model(config)[1], heads, mesh(**sizes))


def test_a_model_that_a_mesh_cannot_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tensor = 3: must divide the model's 8 heads; .* 1, 2, 4, 8"):
        check(small("7"), tensor=3)
    with pytest.raises(ConfigError, match=r"parallel.tensor = 2: must divide model.vocab_size = 97; the next .* 98"):
        check(small("7", vocab_size=97), tensor=2)
    with pytest.raises(ConfigError, match=r"^blocks.att.key.weight: size 64 of axis 2"):
        check(small("4"), fsdp=5)
    for generation in GENERATIONS:
        check(small(generation), data=3, fsdp=4, tensor=2, sequence=5)


def test_heads_that_queries_share_are_split_only_where_there_is_attention() -> None:
    llama = ModelConfig(architecture="llama", vocab_size=96, num_layers=3, width=64, head_dim=8, kv_heads=2)
    for config in (llama, student_of(llama, (0, 2))):
        with pytest.raises(ConfigError, match=r"parallel.tensor = 4: must divide the model's 2 heads"):
            shard_model(config, abstract_model(config)[1], mesh(tensor=4))
    converted = student_of(llama)
    assert shard_model(converted, abstract_model(converted)[1], mesh(tensor=4)).axes.tensor == "tensor"
