"""Requests are checked by themselves, and chunks joined to completions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine.requests import Chunk, Request, join
from rwkv_jax.inference.state.snapshot import Snapshot

START = Snapshot((), np.zeros(9, np.float32), num_tokens=90)  # pyright: ignore[reportArgumentType]


def request(fields: dict[str, Any]) -> Request:
    asked: dict[str, Any] = {"max_tokens": 5, **fields}
    return Request(**asked)


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": (0, 9)},
        {"ids": (np.int32(3), np.int64(4)), "max_tokens": np.int64(5), "seed": np.uint32(7)},
        {"ids": (), "state": START},
        {"ids": (1,), "max_tokens": 0},
        {"ids": (1,), "seed": 2**32 - 1, "top_logprobs": 10},
        {"ids": (1,), "guidance_scale": 0, "negative_ids": (2,)},
        {"ids": (1,) * 90, "max_tokens": 10},
    ],
)
def test_what_can_be_run(fields: dict[str, Any]) -> None:
    request(fields).check(10, 100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": ()}, "prompt: is empty; give at least one token"),
        ({"ids": (), "state": START, "max_tokens": 0}, "prompt: is empty, and no tokens are asked for; give tokens"),
        ({"ids": (10,)}, "prompt: token id 10 must lie from 0 to V - 1 = 9"),
        ({"ids": (1, -5)}, "prompt: token id -5 must lie from 0 to V - 1 = 9"),
        ({"ids": (1.0,)}, "prompt: must be integers, token ids; 1.0 is float"),
        ({"ids": (1,), "stop_ids": frozenset([99])}, "stop_ids: token id 99 must lie"),
        ({"ids": (1,), "stop": ("a", "")}, "stop string 1 = '': must be a string with at least one character"),
        ({"ids": (1,), "guidance_scale": 2.0, "negative_ids": (10,)}, "negative_prompt: token id 10 must lie"),
        (
            {"ids": (1,), "guidance_scale": 2.0},
            "guidance_scale = 2.0 and a negative prompt of 0 tokens: guidance needs both",
        ),
        (
            {"ids": (1,), "negative_ids": (2,)},
            "guidance_scale = 1.0 and a negative prompt of 1 tokens: guidance needs both",
        ),
        *(
            (
                {"ids": (1,), "guidance_scale": value, "negative_ids": (2,)},
                f"guidance_scale = {value!r}: must be a number",
            )
            for value in (float("nan"), float("inf"), -(10**7), 10**400, "2")
        ),
        ({"ids": (1,), "top_logprobs": 11}, "top_logprobs = 11: must be a whole number, from 0 to 10"),
        ({"ids": (1,), "top_logprobs": -1}, "top_logprobs = -1: must be a whole number, from 0 to 10"),
        (
            {"ids": (1,), "guidance_scale": 2.0, "negative_ids": (2,), "state": START},
            "guidance_scale = 2.0: is for single texts",
        ),
        (
            {"ids": (1,), "guidance_scale": 2.0, "negative_ids": (2,), "return_state": True},
            "guidance_scale = 2.0: is for single texts",
        ),
        ({"ids": (1,), "sampling": None}, "sampling = None: must be a Sampling"),
        ({"ids": (1,), "client_id": 5}, "client_id = 5: must be a string"),
        ({"ids": (1,) * 91, "max_tokens": 10}, "max_tokens = 10 after 91 tokens: this model's state holds 100"),
        ({"ids": (1,), "state": START, "max_tokens": 10}, "max_tokens = 10 after 91 tokens: this model's state holds"),
        (
            {"ids": (1,), "guidance_scale": 2.0, "negative_ids": (2,) * 95, "max_tokens": 6},
            "max_tokens = 6 after 95 tokens: this model's state holds 100",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        request(fields).check(10, 100)


def test_no_more_likeliest_tokens_than_are_kept() -> None:
    request({"ids": (1,), "top_logprobs": 20}).check(256, None)
    with pytest.raises(ConfigError, match=r"^top_logprobs = 21: must be a whole number, from 0 to 20$"):
        request({"ids": (1,), "top_logprobs": 21}).check(256, None)


def test_without_a_capacity_any_length_will_do() -> None:
    Request(ids=(1,), max_tokens=10**9).check(10, None)


def test_chunks_are_joined() -> None:
    top = ((3, -0.5), (4, -1.5))
    chunks = [
        Chunk(2, "a", (3,), (-0.5,), (top,)),
        Chunk(2, "", (5,), (-2.5,), (top,)),
        Chunk(2, "b", (), (), (), "stop", 0),
    ]
    completion = join(chunks, 1, 7)
    assert (completion.text, completion.ids, completion.logprobs) == ("ab", (3, 5), (-0.5, -2.5))
    assert (completion.top_logprobs, completion.finish_reason, completion.stop) == ((top, top), "stop", 0)
    assert (completion.index, completion.num_prompt_tokens) == (1, 7)
    assert completion.mean_logprob == -1.5
    assert join(chunks[2:], 1, 7).mean_logprob == 0
    assert completion.score == -1.5
    with pytest.raises(ValueError, match="the last chunk does not end a text"):
        join(chunks[:2], 0, 7)


@pytest.mark.parametrize("ids", [(), (5,)], ids=["no tokens", "those of a stop string"])
def test_a_text_that_says_nothing_has_the_lowest_score(ids: tuple[int, ...]) -> None:
    empty = join([Chunk(0, "", ids, (-0.1,) * len(ids), finish_reason="stop", stop="a")], 0, 1)
    other = join([Chunk(0, "b", (6,), (-100.0,), finish_reason="length")], 0, 1)
    assert empty.score < other.score == -100
