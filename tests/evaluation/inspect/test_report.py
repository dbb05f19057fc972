"""Everything of one text: numbers for JSON, pictures, a table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.inspect import CausalTrace, draw_trace, record
from rwkv_jax.evaluation.inspect.layers import beginning
from rwkv_jax.evaluation.inspect.report import as_json, as_table, draw, inspect_text
from tests.evaluation.inspect.looked_into import TOKENS, small_model

PIECES = ["$", "b\n", "é", "日", "e", "f"]


@pytest.mark.parametrize("name", ["4", pytest.param("transformer", marks=pytest.mark.long)])
def test_a_text_is_measured_drawn_and_written(name: str, tmp_path: Path) -> None:
    found = inspect_text(small_model(name), TOKENS[1].tolist(), map_tokens=4)
    assert found.shares.shape == (2, 4, 4)
    np.testing.assert_allclose(found.shares.sum(axis=-1), 1)
    assert found.mean_distance.shape == (2, 32 if name == "4" else 4)
    assert (found.half_lives is None) == (found.states is None) == (name == "transformer")
    lines = as_table(found).splitlines()
    assert len(lines) == 3
    assert ("half-life" in lines[0]) == (name == "4")
    draw(found, tmp_path, PIECES)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"attention.png"} | ({"half_lives.png", "states.png"} if name == "4" else set())
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    numbers = json.loads(json.dumps(as_json(found), allow_nan=False))
    np.testing.assert_allclose(numbers["shares"], found.shares, atol=1e-6)


@pytest.mark.parametrize("name", ["4", pytest.param("transformer", marks=pytest.mark.long)])
def test_the_beginning_of_a_recording_is_that_of_the_texts(name: str) -> None:
    whole, part = (record(small_model(name), tokens)[1] for tokens in (TOKENS, TOKENS[:, :3]))
    cut = beginning(whole, 3)
    np.testing.assert_allclose(cut.output, part.output, atol=1e-12)
    assert cut.inputs.keys() == part.inputs.keys()
    for key, value in cut.inputs.items():
        np.testing.assert_allclose(value, part.inputs[key], atol=1e-12)


def test_what_json_lacks_becomes_null() -> None:
    value = {"a": np.array([math.inf, 1 / 3]), "b": (np.int32(2), None), "c": CausalTrace(1, 0.5, math.nan, np.eye(1))}
    answer = {"answer": 1, "clean": 0.5, "corrupted": None, "restored": [[1.0]]}
    assert as_json(value) == {"a": [None, 0.333333], "b": [2, None], "c": answer}


def test_a_trace_is_drawn_by_the_kind_of_its_file(tmp_path: Path) -> None:
    trace = CausalTrace(1, 0.5, 0.1, np.full((2, 6), 0.2))
    path = draw_trace(trace, tmp_path / "trace.svg", pieces=PIECES)
    assert "<svg" in path.read_text()
    with pytest.raises(ConfigError, match=r"must end with .png, .svg, .pdf"):
        draw_trace(trace, tmp_path / "trace.txt")
