"""Requests that an engine must refuse, and what it must say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.requests import QueueFullError
from rwkv_jax.inference.sampling.params import SamplingParams
from tests.inference.models import GREEDY, VOCAB_SIZE

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prompts that come once": ({"prompts": (text for text in ("a", "b"))}, "^prompts = <generator"),
    "bytes": ({"prompts": b"abc"}, "^prompts = b'abc': must be a text"),
    "bytes among others": ({"prompts": ["a", b"b"]}, "^prompt 1 = b'b': must be a text"),
    "a set": ({"prompts": {1, 2}}, "^prompts = {1, 2}: must be a text"),
    "huge guidance": (
        {"guidance_scale": 1e300, "negative_prompt": "x"},
        "^guidance_scale = 1e.300: must be a number of at most",
    ),
    "ids by name": ({"ids": (1,)}, "^ids: no such argument"),
    "copies": ({"copies": 2}, "^copies: no such argument"),
    "a true seed": ({"seed": True}, "^seed = True: must be a sequence"),
    "nothing": ({"prompts": []}, "^prompts: there are none"),
    "no prompt": ({"prompts": None}, "^prompts = None: must be a text, a sequence of token ids"),
    "a number": ({"prompts": 3}, "^prompts = 3: must be a text, a sequence of token ids"),
    "an empty text": ({"prompts": ""}, "^prompt = '': is empty"),
    "an empty text among others": ({"prompts": ["a", ""]}, "^prompt = '': is empty"),
    "empty ids among others": ({"prompts": [[1], []]}, "^prompt 1: is empty; give at least one token"),
    "ids that are none": ({"prompts": ["a", 7]}, "^prompt 1 = 7: must be a sequence"),
    "no UTF-8": ({"prompts": "\ud800"}, "is not UTF-8"),
    "an id beyond V": ({"prompts": [1, 256]}, "^prompt: token id 256 must lie from 0 to V - 1 = 255"),
    "a negative id": ({"prompts": [1, -1]}, "^prompt: token id -1 must lie from 0"),
    "a huge id": ({"prompts": [1, 2**70]}, f"^prompt: token id {2**70} must lie from 0"),
    "floats": ({"prompts": [1.0, 2.0]}, "^prompt: must be integers, token ids; 1.0 is float"),
    "bools": ({"prompts": [True]}, "^prompt: must be integers, token ids; True is bool"),
    "nested ids": ({"prompts": [[[1, 2]]]}, r"^prompt: must be integers, token ids; \[1, 2\] is list"),
    "a negative number of tokens": ({"max_tokens": -1}, "^max_tokens = -1: must be a whole number, not less than 0"),
    "half a token": ({"max_tokens": 2.5}, "^max_tokens = 2.5: must be a whole number"),
    "tokens in words": ({"max_tokens": "five"}, "^max_tokens = 'five': must be a whole number"),
    "a negative seed": ({"seed": -1}, "^seed = -1: must be a whole number, from 0 to 4294967295"),
    "a huge seed": ({"seed": 2**32}, "^seed = 4294967296: must be a whole number"),
    "seeds for others": ({"seed": [1, 2, 3]}, "^seed: 3 for 1 prompts"),
    "no seed": ({"seed": None}, "^seed = None: must be a sequence"),
    "a seed in words": ({"seed": ["one"]}, "^seed = 'one': must be a whole number"),
    "too many of the likeliest": ({"top_logprobs": 21}, "^top_logprobs = 21: must be a whole number, from 0 to 20"),
    "half of the likeliest": ({"top_logprobs": 0.5}, "^top_logprobs = 0.5: must be a whole number"),
    "samplings for others": ({"sampling": [GREEDY] * 2}, "^sampling: 2 for 1 prompts"),
    "no sampling": ({"sampling": {"temperature": 1.0}}, "^sampling = 'temperature': must be a Sampling"),
    "an empty stop": ({"stop": ["a", ""]}, "^stop string 1 = '': must be a string with at least one"),
    "a stop in numbers": ({"stop": [5]}, "^stop string 0 = 5: must be a string"),
    "a number for stops": ({"stop": 5}, "^stop = 5: must be a sequence"),
    "a number for stop ids": ({"stop_ids": 5}, "^stop_ids = 5: must be a sequence"),
    "a stop id beyond V": ({"stop_ids": [256]}, "^stop_ids: token id 256 must lie from 0"),
    "guidance alone": (
        {"guidance_scale": 2.0},
        "^guidance_scale = 2.0 and a negative prompt of 0 tokens: guidance needs both",
    ),
    "unguided alone": (
        {"negative_prompt": "x"},
        "^guidance_scale = 1.0 and a negative prompt of 2 tokens: guidance needs both",
    ),
    "infinite guidance": (
        {"guidance_scale": float("inf"), "negative_prompt": "x"},
        "^guidance_scale = inf: must be a number",
    ),
    "guidance in words": (
        {"guidance_scale": "much", "negative_prompt": "x"},
        "^guidance_scale = 'much': must be a number",
    ),
    "unguided beyond V": (
        {"guidance_scale": 2.0, "negative_prompt": [256]},
        "^negative_prompt: token id 256 must lie from 0",
    ),
    "guided and kept": (
        {"guidance_scale": 2.0, "negative_prompt": "x", "return_state": True},
        "^guidance_scale = 2.0: is for single texts",
    ),
    "two texts and one state": (
        {"prompts": ["a", "b"], "return_state": True},
        "^state and return_state are for one text",
    ),
    "no state": ({"state": {"state": 1}}, "^state = .*: must be a Snapshot"),
    "an option that there is not": ({"color": "red", "shape": 2}, "^color, shape: no such argument"),
    "no client": ({"client_id": None}, "^client_id = None: must be a string"),
    "everything banned": ({"sampling": SamplingParams(banned=range(VOCAB_SIZE))}, "leaves no token to choose"),
    "bias beyond V": ({"sampling": SamplingParams(logit_bias={256: 1.0})}, "^logit_bias names id 256"),
}

BAD_SAMPLING: list[dict[str, Any]] = [
    {"temperature": float("nan")},
    {"temperature": -1.0},
    {"top_p": -0.1},
    {"top_k": -1},
    {"min_p": float("nan")},
    {"order": "mine"},
    {"banned": (1,), "logit_bias": {1: 2.0}},
]


def bad_requests(engine: Engine) -> list[Callable[[], None]]:
    """Each asks and checks that it is refused."""

    def ask(method: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            method(**({"prompts": "abc"} | arguments))

    def ask_sampling(settings: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            engine.generate("abc", sampling=SamplingParams(**settings))

    requests: list[Callable[[], None]] = []
    for arguments, message in BAD.values():
        requests += [functools.partial(ask, method, arguments, message) for method in (engine.generate, engine.stream)]
    requests += [functools.partial(ask_sampling, settings) for settings in BAD_SAMPLING]
    for best_of in (0, 1.5):
        message = f"^best_of = {best_of}: must be a whole number, from 1 to 1024"
        requests.append(functools.partial(ask, engine.generate, {"best_of": best_of}, message))

    def overfill() -> None:
        most = engine.options.max_queue
        with pytest.raises(QueueFullError, match=rf"^queue: \d+ texts wait.* {most + 1} more .* = {most}; collect"):
            engine.stream(["a"] * (most + 1))

    return [*requests, overfill]
