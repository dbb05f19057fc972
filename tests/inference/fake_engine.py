"""An engine without a model: a text's state is a hash of all its tokens, so that any slip in what was read shows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.engine.requests import Chunk, Request
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.session import Prompt
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.inference.state.state_file import Identity
from rwkv_jax.models.state import State

VOCAB_SIZE = 257

PASSES_FOR_ANY: Any = object
"""A base class with which a fake passes for the real thing in the eyes of a type checker."""

_LAYERS = 2


class FakeEngine(PASSES_FOR_ANY):
    """Reads, draws and streams as the real one: each token that is drawn is read before anyone sees it."""

    def __init__(self, model: int = 0) -> None:
        self.tokenizer = ByteTokenizer()
        self.model = model
        self.adapters = SimpleNamespace(names=(), find=lambda name: None, owner_of=lambda name: str(model))
        self.streams: list[FakeStream] = []
        self.identity = Identity(
            generation="7",
            model=f"{model:064x}",
            tokenizer=self.tokenizer.fingerprint,
            state=jax.eval_shape(lambda: _snapshot(0, 1).state),
            logits=jax.ShapeDtypeStruct((VOCAB_SIZE,), np.dtype("float32")),
        )

    def encode(self, text: str, *, begins: bool) -> list[int]:
        return [self.tokenizer.end_of_text] * begins + self.tokenizer.encode(text)

    def ids(self, snapshot: Snapshot | None, prompt: Prompt) -> list[int]:
        ids = self.encode(prompt, begins=snapshot is None) if isinstance(prompt, str) and prompt else list(prompt)
        if any(not isinstance(token, int) or not 0 <= token < VOCAB_SIZE for token in ids):
            raise ConfigError(f"prompt: has ids beyond the vocabulary of {VOCAB_SIZE}")
        return [token for token in ids if isinstance(token, int)]

    def identity_of(self, adapter: str | None) -> Identity:
        assert adapter is None
        return self.identity

    def prefill(self, snapshot: Snapshot | None, prompt: Prompt, *, adapter: str | None = None) -> Snapshot:
        assert adapter is None
        ids = self.ids(snapshot, prompt)
        if not ids:
            raise ConfigError("prompt: is empty")
        number, num_tokens = (
            (_first_number(self.model), 0) if snapshot is None else (_number(snapshot), snapshot.num_tokens)
        )
        for token in ids:
            number = (number * 6364136223846793005 + token + 1442695040888963407) % 2**64
            number ^= number >> 29
        return _snapshot(number, num_tokens + len(ids))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int,
        sampling: SamplingParams,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        state: Snapshot | None,
        return_state: bool,
        adapter: str | None = None,
        fails_after: int | None = None,
    ) -> FakeStream:
        assert return_state
        assert adapter is None
        ids = self.ids(state, prompt)
        if not ids and state is None:
            raise ConfigError("prompt: is empty")
        request = Request(tuple(ids), max_tokens, sampling, seed, tuple(stop), frozenset(stop_ids), state=state)
        stream = FakeStream(self, request, fails_after)
        self.streams.append(stream)
        return stream


class FakeStream:
    def __init__(self, engine: FakeEngine, request: Request, fails_after: int | None) -> None:
        self._engine, self._request, self._fails_after = engine, request, fails_after
        self._snapshot = request.state
        self._num_generated = 0
        self._said = bytearray()
        self.has_ended = False

    @property
    def num_prompt_tokens(self) -> tuple[int, ...]:
        return (len(self._request.ids),)

    def __next__(self) -> Chunk:
        if self.has_ended:
            raise StopIteration
        request = self._request
        if self._num_generated == self._fails_after:
            self.has_ended = True
            raise RuntimeError("the device is gone")
        if self._num_generated == 0 and request.ids:
            self._snapshot = self._engine.prefill(request.state, request.ids)
        token = self._draw()
        self._snapshot = self._engine.prefill(self._snapshot, [token])
        self._num_generated += 1
        if token in request.stop_ids:
            self.has_ended = True
            return Chunk(0, "", (), (), (), "stop", token)
        before = len(self._said.decode(errors="ignore"))
        self._said += self._engine.tokenizer.token_bytes(token)
        stop = next((stop for stop in request.stop if self._said.endswith(stop.encode())), None)
        reason = "stop" if stop is not None else "length" if self._num_generated == request.max_tokens else None
        if reason is not None:
            self.has_ended = True
        return Chunk(0, self._said.decode(errors="ignore")[before:], (token,), (-1.0,), (), reason, stop)

    async def __anext__(self) -> Chunk:
        try:
            return next(self)
        except StopIteration:
            raise StopAsyncIteration from None

    def cancel(self) -> None:
        self.has_ended = True

    @property
    def snapshot(self) -> Snapshot | None:
        assert self.has_ended, "only after the end"
        return self._snapshot

    def _draw(self) -> int:
        assert self._snapshot is not None
        scores = np.asarray(self._snapshot.logits)
        if self._request.sampling.temperature == 0:
            return int(scores.argmax())
        noise = np.random.default_rng((self._request.seed, self._num_generated)).gumbel(size=scores.shape)
        return int((scores / self._request.sampling.temperature + noise).argmax())


def _first_number(model: int) -> int:
    return int(np.random.default_rng(model).integers(2**63))


def _snapshot(number: int, num_tokens: int) -> Snapshot:
    """A number's 16-bit digits, which float32 holds exactly, in an order of each array's own."""
    digits = np.array([number >> 16 * i & 0xFFFF for i in range(4)], np.float32)
    layer = State(*map(jax.device_put, (digits, digits[::-1].copy(), digits.reshape(2, 2))), generation="7")
    logits = np.random.default_rng(number).standard_normal(VOCAB_SIZE, np.float32)
    return Snapshot((layer,) * _LAYERS, jax.device_put(logits), num_tokens)


def _number(snapshot: Snapshot) -> int:
    return sum(int(digit) << 16 * i for i, digit in enumerate(np.asarray(snapshot.state[0].att_shift)))
