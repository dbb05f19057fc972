"""Conversations: what is read in each turn, what a reply leaves behind, and taking turns back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax.chat.formats import G1, RAVEN, WORLD
from rwkv_jax.chat.jinja_template import JinjaTemplate
from rwkv_jax.config import ConfigError
from rwkv_jax.inference.chat.dialogue import MAX_UNDO_TURNS, Dialogue
from rwkv_jax.inference.engine.requests import Chunk
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.session import Prompt
from rwkv_jax.inference.state.snapshot import Snapshot, StateError
from tests.inference.fake_engine import FakeEngine

ARGUMENTS: dict[str, Any] = {"max_tokens": 6, "sampling": SamplingParams()}


class ScriptedEngine(FakeEngine):
    """Reads as the fake engine does, notes what it reads, and says what it is told to say."""

    def __init__(self, *replies: str | list[int], model: int = 0) -> None:
        super().__init__(model)
        self.replies = list(replies)
        self.prompts: list[str] = []

    def prefill(self, snapshot: Snapshot | None, prompt: Prompt, *, adapter: str | None = None) -> Snapshot:
        if not isinstance(prompt, str) and len(prompt) > 1:
            self.prompts.append(self.tokenizer.decode(prompt))
        elif isinstance(prompt, str):
            self.prompts.append(prompt)
        return super().prefill(snapshot, prompt, adapter=adapter)

    def stream(self, prompt: Prompt, **arguments: Any) -> Any:
        if not self.replies:
            return super().stream(prompt, **arguments)
        reply = self.replies.pop(0)
        ids = self.tokenizer.encode(reply) if isinstance(reply, str) else reply
        return ScriptedStream(self, ids, **arguments)


class ScriptedStream:
    num_prompt_tokens = (0,)

    def __init__(
        self,
        engine: ScriptedEngine,
        ids: Sequence[int],
        *,
        state: Snapshot,
        stop: Sequence[str],
        stop_ids: Sequence[int],
        max_tokens: int,
        **_: Any,
    ) -> None:
        self._engine, self.snapshot = engine, state
        self._chunks = self._write(ids, stop, stop_ids, max_tokens)

    def _write(
        self, ids: Sequence[int], stops: Sequence[str], stop_ids: Sequence[int], max_tokens: int
    ) -> Iterator[Chunk]:
        # Nothing is shown before it is clear what ends the text, as where a stop string may have begun.
        said, held = "", ""
        for count, token in enumerate(ids, start=1):
            self.snapshot = FakeEngine.prefill(self._engine, self.snapshot, [token])
            if token in stop_ids:
                yield Chunk(0, held, (), (), (), "stop", token)
                return
            held += self._engine.tokenizer.decode([token])
            said += self._engine.tokenizer.decode([token])
            stop = next((stop for stop in stops if said.endswith(stop)), None)
            if stop is not None:
                yield Chunk(0, held.removesuffix(stop), (token,), (0.0,), (), "stop", stop)
                return
            if count == max_tokens:
                yield Chunk(0, held, (token,), (0.0,), (), "length")
                return
            shown, held = ("", held) if any(stop.startswith(held) for stop in stops) else (held, "")
            yield Chunk(0, shown, (token,), (0.0,))

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def cancel(self) -> None:
        self._chunks = iter(())


def say(dialogue: Dialogue, message: str, seed: int = 0, **changes: Any) -> str:
    return "".join(dialogue.reply(message, seed=seed, **(ARGUMENTS | changes)))


def standing(dialogue: Dialogue) -> tuple[int, np.ndarray | None]:
    snapshot = dialogue._position.snapshot
    return dialogue.num_tokens, None if snapshot is None else np.asarray(snapshot.state[0].att_shift)


def assert_stands_behind(dialogue: Dialogue, engine: FakeEngine, text: str) -> None:
    expected = FakeEngine.prefill(engine, None, text)
    num_tokens, state = standing(dialogue)
    assert num_tokens == expected.num_tokens
    np.testing.assert_array_equal(state, expected.state[0].att_shift)


def test_each_turn_reads_only_its_new_text() -> None:
    engine = ScriptedEngine(" one\n\nUser:", " two", " three\n\n")
    dialogue = Dialogue(engine, WORLD, system="be brief")
    assert say(dialogue, "a\n\nb ", max_tokens=99) == "one"
    assert say(dialogue, "c", max_tokens=4) == "two"
    assert say(dialogue, "d", max_tokens=8) == "three"
    assert engine.prompts == [
        "System: be brief\n\nUser: a\nb\n\nAssistant:",
        " c\n\nAssistant:",  # the stop string has been read
        "\n\nUser: d\n\nAssistant:",
    ]
    said = " one\n\nUser: c\n\nAssistant: two\n\nUser: d\n\nAssistant: three\n\n"
    assert_stands_behind(dialogue, engine, engine.prompts[0] + said)


def test_the_end_of_text_token_is_no_part_of_a_conversation() -> None:
    engine = ScriptedEngine([*b" one", 256], [256], " two")
    dialogue = Dialogue(engine, RAVEN)
    assert say(dialogue, "a", max_tokens=99) == "one"
    assert_stands_behind(dialogue, engine, "Bob: a\n\nAlice: one")
    assert say(dialogue, "b", max_tokens=99) == ""
    assert_stands_behind(dialogue, engine, "Bob: a\n\nAlice: one\n\nBob: b\n\nAlice:")
    assert say(dialogue, "c", max_tokens=4) == "two"
    assert engine.prompts[-1] == "\n\nBob: c\n\nAlice:"


def test_any_of_the_tokens_that_end_texts_ends_a_reply() -> None:
    """As those of a Llama, whose turns end with another token than its documents."""
    engine = ScriptedEngine([*b" one", 255, *b" more"], " two")
    engine.tokenizer.ends = frozenset({255, 256})
    dialogue = Dialogue(engine, RAVEN)
    assert say(dialogue, "a", max_tokens=99) == "one"
    assert_stands_behind(dialogue, engine, "Bob: a\n\nAlice: one")
    assert say(dialogue, "b", max_tokens=4) == "two"
    assert engine.prompts[-1] == "\n\nBob: b\n\nAlice:"


def test_a_reply_that_is_cut_short_stays_as_far_as_it_was_given_out() -> None:
    engine = ScriptedEngine(" one\n\ntwo", " three")
    dialogue = Dialogue(engine, WORLD)
    pieces = dialogue.reply("a", **ARGUMENTS)
    assert [next(pieces) for _ in range(4)] == ["", "o", "n", "e"]
    pieces.close()
    assert_stands_behind(dialogue, engine, "User: a\n\nAssistant: one")
    assert say(dialogue, "b") == "three"
    assert engine.prompts[-1] == "\n\nUser: b\n\nAssistant:"


def test_a_reply_that_nobody_begins_to_read_was_never_asked_for() -> None:
    engine = ScriptedEngine(" one")
    dialogue = Dialogue(engine, WORLD)
    dialogue.reply("a", **ARGUMENTS).close()
    assert (dialogue.num_tokens, dialogue.last_message, engine.prompts) == (0, None, [])


def test_thoughts_are_not_part_of_the_answer() -> None:
    reply = "> hm, well\n</think>\n so it is "
    dialogue = Dialogue(ScriptedEngine(reply), dataclasses.replace(G1, thinking="think"))
    pieces = list(dialogue.reply("a", max_tokens=len(reply), sampling=SamplingParams()))
    assert "".join(pieces) == " so it is"
    assert len(pieces) == len(reply)
    assert dialogue.thoughts == "hm, well"


BLOCKS = """\
{%- for message in messages %}{{ "<" ~ message.role ~ ">" ~ message.content ~ "\n" }}{% endfor -%}
{%- if add_generation_prompt %}{{ "<assistant>" ~ ("<think" if thinking else "") }}{% endif -%}
"""


def test_a_template_that_writes_all_messages_reads_what_is_new(tmp_path: Path) -> None:
    engine = ScriptedEngine("one\n<user>", "two", [*b"three", 256], "")
    dialogue = Dialogue(engine, JinjaTemplate(BLOCKS), system="be brief")
    assert say(dialogue, "a", max_tokens=99) == "one"
    assert say(dialogue, "b", max_tokens=3) == "two"
    text = "<system>be brief\n<user>a\n<assistant>one\n<user>b\n<assistant>"
    assert_stands_behind(dialogue, engine, text + "two")
    assert engine.prompts == ["<system>be brief\n<user>a\n<assistant>", "one\n<user>b\n<assistant>"]
    dialogue.save(tmp_path / "state.safetensors")
    say(dialogue, "c", max_tokens=99)
    assert_stands_behind(dialogue, engine, text + "two\n<user>c\n<assistant>three")
    assert (dialogue.undo(), dialogue.undo()) == ("c", "b")
    other_engine = ScriptedEngine("four")
    other = Dialogue(other_engine, JinjaTemplate(BLOCKS), system="be brief")
    other.load(tmp_path / "state.safetensors")
    assert_stands_behind(other, engine, text + "two\n")
    assert say(other, "d", max_tokens=4) == "four"
    assert_stands_behind(other, engine, text + "two\n<user>d\n<assistant>four")
    dialogue.reset()
    assert dialogue.num_tokens == 0


def test_a_template_that_leaves_thoughts_out_reads_the_conversation_without_them() -> None:
    engine = ScriptedEngine("> hm</think>one", "> so</think>")
    dialogue = Dialogue(engine, JinjaTemplate(BLOCKS), thinking="open")
    assert say(dialogue, "a", max_tokens=15) == "one"
    assert dialogue.thoughts == "hm"
    say(dialogue, "b", max_tokens=12)
    assert engine.prompts[-1] == "<user>a\n<assistant>one\n<user>b\n<assistant><think"
    assert_stands_behind(dialogue, engine, engine.prompts[-1] + "> so</think>")
    with pytest.raises(ConfigError, match=r"thinking = 'think'"):
        Dialogue(engine, JinjaTemplate(BLOCKS), thinking="think")


def test_undo_goes_back_turn_by_turn() -> None:
    dialogue = Dialogue(FakeEngine(), WORLD)
    places = []
    for message in "abc":
        places.append(standing(dialogue))
        say(dialogue, message)
    for message, place in zip("cba", places[::-1], strict=True):
        assert dialogue.last_message == message
        assert dialogue.undo() == message
        np.testing.assert_equal(standing(dialogue), place)
    with pytest.raises(ConfigError, match=f"no turn to take back; the last {MAX_UNDO_TURNS} are kept"):
        dialogue.undo()


def test_old_turns_are_not_kept() -> None:
    dialogue = Dialogue(FakeEngine(), WORLD)
    for turn in range(MAX_UNDO_TURNS + 3):
        say(dialogue, f"message {turn}", max_tokens=1)
    for _ in range(MAX_UNDO_TURNS):
        dialogue.undo()
    assert dialogue.last_message == "message 2"
    with pytest.raises(ConfigError, match="no turn to take back"):
        dialogue.undo()


def test_forks_go_their_own_ways() -> None:
    engine = FakeEngine()
    dialogue = Dialogue(engine, WORLD)
    say(dialogue, "a")
    place, other = standing(dialogue), dialogue.fork()
    assert say(other, "b", seed=1)
    assert say(other, "c", seed=1)
    np.testing.assert_equal(standing(dialogue), place)
    reply = say(dialogue, "b", seed=1)
    other.undo()
    assert other.undo() == "b"
    assert say(other, "b", seed=1) == reply
    np.testing.assert_equal(standing(other), standing(dialogue))
    dialogue.reset()
    assert (dialogue.num_tokens, dialogue.last_message) == (0, None)
    assert other.num_tokens > 0


@pytest.mark.parametrize("reply", [" one\n\nUser:", " one", " one\n", [*b" one", 256]], ids=str)
def test_a_saved_conversation_goes_on_with_its_last_turn_closed(reply: str | list[int], tmp_path: Path) -> None:
    engine = ScriptedEngine(reply)
    dialogue = Dialogue(engine, WORLD)
    say(dialogue, "a", max_tokens=len(reply))
    place = standing(dialogue)
    dialogue.save(tmp_path / "state.safetensors")
    np.testing.assert_equal(standing(dialogue), place)
    other_engine = ScriptedEngine()
    other = Dialogue(other_engine, WORLD)
    other.load(tmp_path / "state.safetensors")
    assert_stands_behind(other, engine, "User: a\n\nAssistant: one\n\n")
    other.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "state.safetensors").read_bytes()
    say(other, "b")
    assert other_engine.prompts == ["User: b\n\nAssistant:"]
    other.undo()
    with pytest.raises(ConfigError, match="there is no turn to take back"):
        other.undo()


def test_errors_change_nothing(tmp_path: Path) -> None:
    engine = FakeEngine()
    dialogue = Dialogue(engine, WORLD)
    with pytest.raises(ConfigError, match="there is nothing to save"):
        dialogue.save(tmp_path / "state")
    say(dialogue, "a")
    dialogue.save(tmp_path / "state")
    place = standing(dialogue)
    with pytest.raises(ConfigError, match="message = ' ': is empty"):
        say(dialogue, " ")
    with pytest.raises(RuntimeError, match="the device is gone"):
        say(dialogue, "b", fails_after=2)
    with pytest.raises(ConfigError, match="exists"):
        dialogue.save(tmp_path / "state")
    with pytest.raises(StateError):
        Dialogue(FakeEngine(model=1), WORLD).load(tmp_path / "state")
    with pytest.raises(ConfigError, match="nowhere"):
        dialogue.load(tmp_path / "nowhere")
    np.testing.assert_equal(standing(dialogue), place)
    assert dialogue.last_message == "a"


def test_a_format_without_system_messages() -> None:
    with pytest.raises(ConfigError, match="this chat format has no system message"):
        Dialogue(FakeEngine(), RAVEN, system="be brief")
