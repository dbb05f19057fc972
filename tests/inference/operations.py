"""Random operations on the sessions of any engine, each held against a plain run over the same tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.requests import Chunk, Completion
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.session import Session, SessionBusyError
from rwkv_jax.inference.state.snapshot import Snapshot

MAX_SESSIONS = 6
LONGEST = 120
"""Tokens after which a text begins anew, so that plain runs stay short."""

PIECES = ("a", "def f(x):\n", " é", "日本", "\n\n", "User: hello", "\U0001f469")


class Comparison(Protocol):
    """Asserts that two states are the same, as far as an engine can make them so."""

    def __call__(self, found: Snapshot, expected: Snapshot, /) -> None: ...


def assert_identical(found: Snapshot, expected: Snapshot) -> None:
    """Bit for bit."""
    assert found.num_tokens == expected.num_tokens
    leaves, expected_leaves = (jax.tree.leaves((snapshot.state, snapshot.logits)) for snapshot in (found, expected))
    for leaf, expected_leaf in zip(leaves, expected_leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected_leaf), strict=True)


def ids_read(said: Chunk | Completion) -> tuple[int, ...]:
    """The tokens behind it that the state has read: a stop token is no part of the text, but of the state."""
    return (*said.ids, said.stop) if isinstance(said.stop, int) else said.ids


@dataclasses.dataclass
class Conversation:
    """A session, and the tokens that it must have read."""

    session: Session
    ids: tuple[int, ...] = ()
    marks: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


class Operations:
    """Does random operations on a few sessions at once and says after each whether the session is what it should be."""

    def __init__(
        self,
        engine: Engine,
        vocab_size: int,
        folder: Path,
        *,
        seed: int = 0,
        same: Comparison = assert_identical,
    ) -> None:
        self.engine, self.vocab_size, self.folder, self.same = engine, vocab_size, folder, same
        self.rng = np.random.default_rng(seed)
        self.conversations = [Conversation(Session(engine))]
        self.counts: Counter[str] = Counter()

    def run(self, num_operations: int) -> Counter[str]:
        """How often each operation was done, by name."""
        chosen: list[Callable[[Conversation], None]] = [
            self.append_text,
            self.append_ids,
            self.generate,
            self.stream_to_the_end,
            self.cancel_a_stream,
            self.fork,
            self.mark,
            self.mark,
            self.rewind,
            self.rewind,
            self.save_and_load,
            self.fail_to_append,
            self.fail_to_stream,
        ]
        for _ in range(num_operations):
            conversation = self.pick(self.conversations)
            if len(conversation.ids) > LONGEST:
                self.conversations.remove(conversation)
                conversation = Conversation(Session(self.engine))
                self.conversations.append(conversation)
            operation = self.pick(chosen)
            operation(conversation)
            self.counts[operation.__name__] += 1
            self.check(conversation)
        for conversation in self.conversations:
            self.check(conversation)
            for name in tuple(conversation.marks):
                self.go_back(conversation, name)
                self.check(conversation)
        return self.counts

    def check(self, conversation: Conversation) -> None:
        """The session against the engine reading all its tokens at once."""
        found = conversation.session.snapshot
        assert conversation.session.num_tokens == len(conversation.ids)
        if found is None:
            assert conversation.ids == ()
        else:
            self.same(found, self.engine.prefill(None, conversation.ids))

    def pick(self, options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def text(self) -> str:
        return "".join(self.pick(PIECES) for _ in range(self.rng.integers(1, 4)))

    def settings(self, conversation: Conversation) -> dict[str, Any]:
        """Of a continuation, with a prompt or, behind what was read, without."""
        stop_ids = tuple(self.rng.integers(self.vocab_size, size=self.vocab_size // 30).tolist())
        return {
            "prompt": self.text() if not conversation.ids or self.rng.integers(2) else "",
            "max_tokens": int(self.rng.integers(1, 12)),
            "sampling": SamplingParams(temperature=self.pick([0.0, 1.0])),
            "seed": int(self.rng.integers(2**31)),
            "stop": self.pick([(), ("a", "\n\n"), ("é",)]),
            "stop_ids": self.pick([(), stop_ids]),
        }

    def prompt_ids(self, conversation: Conversation, prompt: str) -> tuple[int, ...]:
        return tuple(self.engine.encode(prompt, begins=not conversation.ids)) if prompt else ()

    def append_text(self, conversation: Conversation) -> None:
        text = self.text()
        conversation.session.append(text)
        conversation.ids += self.prompt_ids(conversation, text)

    def append_ids(self, conversation: Conversation) -> None:
        ids = tuple(self.rng.integers(self.vocab_size, size=self.rng.integers(1, 20)).tolist())
        conversation.session.append(ids)
        conversation.ids += ids

    def generate(self, conversation: Conversation) -> None:
        settings = self.settings(conversation)
        completion = conversation.session.generate(**settings)
        prompt_ids = self.prompt_ids(conversation, settings["prompt"])
        assert completion.num_prompt_tokens == len(prompt_ids)
        assert 0 < len(ids_read(completion)) <= settings["max_tokens"]
        conversation.ids += (*prompt_ids, *ids_read(completion))

    def stream_to_the_end(self, conversation: Conversation) -> None:
        settings = self.settings(conversation)
        emitted: list[int] = []
        for chunk in conversation.session.stream(**settings):
            emitted += ids_read(chunk)
            if chunk.finish_reason is None:
                with pytest.raises(SessionBusyError):
                    conversation.session.append("b")
        conversation.ids += (*self.prompt_ids(conversation, settings["prompt"]), *emitted)

    def cancel_a_stream(self, conversation: Conversation) -> None:
        settings = self.settings(conversation)
        emitted: list[int] = []
        num_chunks = int(self.rng.integers(0, 12))
        with conversation.session.stream(**settings) as stream:
            for _ in range(num_chunks):
                chunk = next(stream, None)
                emitted += () if chunk is None else ids_read(chunk)
        if num_chunks > 0:  # else nobody has waited for anything, and not even the prompt was read
            conversation.ids += (*self.prompt_ids(conversation, settings["prompt"]), *emitted)

    def fork(self, conversation: Conversation) -> None:
        if len(self.conversations) == MAX_SESSIONS:
            others = [other for other in self.conversations if other is not conversation]
            self.conversations.remove(self.pick(others))
        other = Conversation(conversation.session.fork(), conversation.ids, dict(conversation.marks))
        self.conversations.append(other)
        self.append_ids(other)
        self.check(other)

    def mark(self, conversation: Conversation) -> None:
        name = self.pick(["here", "there", "start"])
        conversation.session.mark(name)
        conversation.marks[name] = conversation.ids

    def rewind(self, conversation: Conversation) -> None:
        if conversation.marks:
            self.go_back(conversation, self.pick(sorted(conversation.marks)))
        else:
            with pytest.raises(ConfigError, match=r"'nowhere'.*none"):
                conversation.session.rewind("nowhere")

    def go_back(self, conversation: Conversation, name: str) -> None:
        conversation.session.rewind(name)
        conversation.ids = conversation.marks[name]

    def save_and_load(self, conversation: Conversation) -> None:
        path = self.folder / f"{self.counts['save_and_load']}.safetensors"
        if conversation.ids:
            conversation.session.save(path)
            conversation.session, conversation.marks = Session.load(self.engine, path), {}
        else:
            with pytest.raises(ConfigError, match="nothing"):
                conversation.session.save(path)
            assert not path.exists()

    def fail_to_append(self, conversation: Conversation) -> None:
        for refused in ("", (), (0, self.vocab_size), (-1,)):
            with pytest.raises(ConfigError):
                conversation.session.append(refused)

    def fail_to_stream(self, conversation: Conversation) -> None:
        settings = self.settings(conversation)
        settings["prompt"] = (0, self.vocab_size)
        with pytest.raises(ConfigError):
            conversation.session.generate(**settings)
