"""What each generation says of itself is so, and nobody else asks which one it is."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

import jax
import pytest

from rwkv_jax.config import GENERATIONS, Architecture, Generation, ModelConfig
from rwkv_jax.config.generations import OTHER_ARCHITECTURES, all_specs
from rwkv_jax.models import model_type
from tests.models.parameters import named_config

ROOT = Path(__file__).parents[2]
PRODUCT = [
    *(ROOT / "rwkv_jax").rglob("*.py"),
    *(ROOT / "kernels").rglob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    ROOT / "train.py",
]
SPEC_TYPES = {type(spec).__name__ for spec in all_specs()}
NAMES = {spec.name for spec in all_specs()} | set(OTHER_ARCHITECTURES)


def test_the_types_list_what_there_is() -> None:
    assert typing.get_args(Generation) == tuple(GENERATIONS)
    assert typing.get_args(Architecture) == ("rwkv", *OTHER_ARCHITECTURES)
    assert [spec.name for spec in all_specs()] == [*GENERATIONS, *OTHER_ARCHITECTURES]


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_state_is_as_the_spec_says(spec: typing.Any, dtype: str) -> None:
    config = named_config(spec.name, num_layers=2, width=48, head_dim=8, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        state = jax.eval_shape(lambda: model_type(config).initial_block_state(config, 5))
    assert [(x.shape, x.dtype.name) for x in jax.tree.leaves(state)] == [
        ((5, *array.shape), array.dtype) for array in spec.state(config)
    ]
    assert all(len(array.axes) == len(array.shape) for array in spec.state(config))


def mentions_generation(node: ast.expr) -> bool:
    """Whether an operand is a generation or an architecture, of whatever it is an attribute."""
    names = {getattr(part, "id", None) or getattr(part, "attr", None) for part in ast.walk(node)}
    return bool(names & {"generation", "architecture", "generations"})


def is_comparison(node: ast.AST) -> bool:
    """Whether a generation is held against a name: ==, in, match, isinstance, or a table that is looked up by it."""
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        return any(mentions_generation(operand) or is_name_of_spec(operand) for operand in operands)
    if isinstance(node, ast.Match):
        return mentions_generation(node.subject)
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "isinstance":
        return any(getattr(argument, "id", None) in SPEC_TYPES for argument in node.args)
    if isinstance(node, ast.Subscript | ast.Call):
        table = node.value if isinstance(node, ast.Subscript) else getattr(node.func, "value", None)
        return isinstance(table, ast.Dict) and any(getattr(key, "value", None) in NAMES for key in table.keys)
    return False


def is_name_of_spec(node: ast.expr) -> bool:
    """spec.name == "7" and the like."""
    return isinstance(node, ast.Attribute) and node.attr == "name" and "spec" in ast.unparse(node.value)


@pytest.mark.parametrize(
    "source",
    [
        'config.generation == "7"',
        'generation in ("5.0", "5.1")',
        'x = 1 if "4" != self.model.generation else 2',
        'config.spec.name == "7"',
        '{"4": 12, "7": 9}.get(config.generation, 5)',
        '{"4": 12, "7": 9}[config.generation]',
        'match config.generation:\n    case "7": pass',
        'config.architecture == "transformer"',
        "isinstance(config.spec, RWKV7Spec)",
    ],
)
def test_the_walk_sees_comparisons(source: str) -> None:
    assert any(map(is_comparison, ast.walk(ast.parse(source))))


def test_no_generation_is_compared_with_a_name() -> None:
    inside = ROOT / "rwkv_jax" / "config" / "generations"
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"  # pyright: ignore[reportAttributeAccessIssue]
        for path in PRODUCT
        if not path.is_relative_to(inside)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if is_comparison(node)
    ]
    # One class has the three forms of RWKV-5.
    own = [
        line
        for line in found
        if re.match(r"rwkv_jax/models/rwkv5\.py:\d+: isinstance\(config\.spec, RWKV5Spec\)", line)
    ]
    assert found == own, "\n".join(found)
    assert len(own) == 1


def test_defaults() -> None:
    assert ModelConfig().generation == "7"
    assert ModelConfig().spec is GENERATIONS["7"]
    assert ModelConfig(architecture="transformer").spec is OTHER_ARCHITECTURES["transformer"]
