"""`rwkv chat`: messages, commands, what interrupts a reply, and a conversation through pipes."""

from __future__ import annotations

import dataclasses
import io
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.chat.formats import G1, WORLD
from rwkv_jax.cli import chat as chat_module
from rwkv_jax.cli.chat import HELP, ChatLoop
from rwkv_jax.cli.speed import Speed
from rwkv_jax.inference.chat.dialogue import Dialogue
from rwkv_jax.inference.engine.requests import NotFiniteError
from rwkv_jax.inference.sampling.params import SamplingParams
from tests.cli.commands import Command
from tests.inference.fake_engine import FakeEngine


def new_chat(seed: int = 0, max_tokens: int = 6, **options: Any) -> ChatLoop:
    return ChatLoop(
        Dialogue(FakeEngine(), WORLD), {"max_tokens": max_tokens, "sampling": SamplingParams()}, seed, **options
    )


def answers(chat: ChatLoop, *lines: str) -> list[str]:
    return ["".join(chat.answer(line)) for line in lines]


def test_messages_are_answered_with_a_seed_each() -> None:
    chat = new_chat(seed=2**32 - 1)
    replies = answers(chat, "hello", "more")
    expected, dialogue = [], Dialogue(FakeEngine(), WORLD)
    for message, seed in (("hello", 2**32 - 1), ("more", 0)):
        expected.append("".join(dialogue.reply(message, max_tokens=6, sampling=SamplingParams(), seed=seed)) + "\n")
    assert replies == expected
    assert chat.dialogue.num_tokens == dialogue.num_tokens


def test_empty_lines_are_no_messages() -> None:
    chat = new_chat()
    assert answers(chat, "", "  ") == ["", ""]
    assert chat.dialogue.num_tokens == 0


def test_retry_takes_the_reply_back_and_draws_another() -> None:
    chat = new_chat()
    _, first = answers(chat, "a", "b")
    num_tokens = chat.dialogue.num_tokens
    (second,) = answers(chat, "/retry")
    assert second != first
    assert chat.dialogue.last_message == "b"
    assert answers(chat, "/undo", "/undo") == ["taken back: b\n", "taken back: a\n"]
    assert chat.dialogue.num_tokens == 0 < num_tokens
    assert answers(chat, "/retry")[0].startswith("! undo: there is no turn to take back")
    assert answers(chat, "/save x") == ["! x: there is nothing to save: no reply has been kept\n"]


def test_a_retry_that_fails_keeps_the_reply() -> None:
    chat = new_chat()
    answers(chat, "a")
    num_tokens = chat.dialogue.num_tokens
    chat._arguments["fails_after"] = 2
    with pytest.raises(RuntimeError, match="the device is gone"):
        answers(chat, "/retry")
    assert (chat.dialogue.num_tokens, chat.dialogue.last_message) == (num_tokens, "a")


@pytest.mark.parametrize("pieces", [["o", "ne"], [], [""]])
def test_a_reply_that_is_not_finite_ends_alone(monkeypatch: pytest.MonkeyPatch, pieces: list[str]) -> None:
    def say(message: str, **arguments: Any) -> Generator[str]:
        yield from pieces
        raise NotFiniteError("the model's logits are not finite: its weights are broken")

    chat = new_chat()
    answers(chat, "a")
    num_tokens = chat.dialogue.num_tokens
    with monkeypatch.context() as broken:
        broken.setattr(chat.dialogue, "reply", say)
        shown = "one\n" if pieces == ["o", "ne"] else ""
        assert answers(chat, "b") == [f"{shown}! the model's logits are not finite: its weights are broken\n"]
    assert (chat.dialogue.num_tokens, chat.dialogue.last_message) == (num_tokens, "a")
    assert len(answers(chat, "c")[0]) > 1


def test_forks_have_names() -> None:
    chat = new_chat()
    answers(chat, "a")
    before = chat.dialogue.num_tokens
    assert answers(chat, "/fork other") == ["other is a copy of this conversation; you are still in main\n"]
    answers(chat, "b")
    after = chat.dialogue.num_tokens
    assert after > before
    assert answers(chat, "/switch  other") == [f"in other, {before} tokens long\n"]
    answers(chat, "c", "d")
    assert answers(chat, "/switch main") == [f"in main, {after} tokens long\n"]
    assert chat.dialogue.last_message == "b"


def test_states_are_saved_and_loaded(tmp_path: Path) -> None:
    chat, path = new_chat(), tmp_path / "a state.safetensors"
    answers(chat, "a")
    assert answers(chat, f"/save {path}") == [f"saved to {path}\n"]
    assert answers(chat, f"/save {path}")[0].startswith(f"! {path}")
    other = new_chat(seed=7)
    (loaded,) = answers(other, f"/load {path}")
    assert loaded == f"loaded {path}, {other.dialogue.num_tokens} tokens long\n"
    assert other.dialogue.num_tokens > 0
    assert answers(other, "/reset") == ["a new conversation\n"]
    assert other.dialogue.num_tokens == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/dance", "/dance: there is no such command; /help lists them"),
        ("/fork", "/fork: needs a name behind it"),
        ("/save ", "/save: needs a name behind it"),
        ("/undo 2", "/undo: takes nothing behind it, not '2'"),
        ("/fork main", "/fork main: there is a conversation of that name; take another"),
        ("/switch b", "/switch b: there is none of that name; there are main"),
        ("/load nowhere", "nowhere"),
        ("/save somewhere", "somewhere: there is nothing to save: no reply has been kept"),
        ("/undo", "undo: there is no turn to take back"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(line: str, message: str) -> None:
    chat = new_chat()
    (said,) = answers(chat, line)
    assert said.startswith(f"! {message}")
    assert said.endswith("\n")
    assert not chat.is_over
    assert len(answers(chat, "hello")[0]) > 1


def test_help_names_every_command() -> None:
    chat = new_chat()
    assert answers(chat, "/help") == [f"{HELP}\n"]
    commands = {line.split()[0] for line in HELP.splitlines() if line.startswith("/")}
    assert all(HELP.count(f"{command} ") == 1 for command in commands)
    for command in commands - {"/quit"}:
        assert "no such command" not in answers(chat, command)[0]
    for thinking in ("none", "open", "closed", "empty"):
        new = ChatLoop(Dialogue(FakeEngine(), dataclasses.replace(G1, thinking=thinking)), {})
        assert answers(new, "/thoughts") == ["none\n"]
    assert not chat.is_over
    assert answers(chat, "/quit") == [""]
    assert chat.is_over


def test_speed_counts_the_tokens_of_each_reply() -> None:
    told: list[Speed] = []
    chat = new_chat(tell_speed=told.append)
    answers(chat, "a", "/help", "b")
    assert [str(speed).partition(" ")[0] for speed in told] == ["6", "6"]


def test_closing_an_answer_ends_the_reply_where_it_is() -> None:
    chat = new_chat(max_tokens=50)
    pieces = chat.answer("a")
    for _ in range(3):
        next(pieces)
    pieces.close()
    assert chat.dialogue.num_tokens == 1 + len("User: a\n\nAssistant:") + 3
    assert len(answers(chat, "b")[0]) > 1


class Interrupted(ChatLoop):
    """Is interrupted in its first reply."""

    def __init__(self, times: int) -> None:
        super().__init__(Dialogue(FakeEngine(), WORLD), {})
        self.times, self.ended = times, False

    def answer(self, line: str) -> Generator[str]:
        if line == "again":
            yield "answered\n"
            return
        try:
            yield "o"
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
            yield "ne"
            yield " two"
        finally:
            self.ended = True


def test_an_interrupt_ends_the_reply_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nagain\n"))
    chat = Interrupted(times=1)
    chat_module.converse(chat)
    assert capsys.readouterr().out == "one\nanswered\n"
    assert chat.ended
    assert signal.getsignal(signal.SIGINT) == before


def test_two_interrupts_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nagain\n"))
    with pytest.raises(KeyboardInterrupt):
        chat_module.converse(Interrupted(times=2))
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("lines", [[None, None], [None, "again", None, None]])
def test_two_interrupts_in_a_row_at_the_prompt_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str | None]
) -> None:
    coming = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(coming)
        if line is None:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(chat_module, "_read_line", read_line)
    with pytest.raises(KeyboardInterrupt):
        chat_module.converse(Interrupted(times=0))
    assert next(coming, "none left") == "none left"
    printed = capsys.readouterr().out
    assert printed.count("answered") == lines.count("again")
    assert printed.count("\nCtrl-C again, or /quit, ends the chat.\n") == 1 + lines.count("again")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Repeating(ChatLoop):
    """Says what it was told."""

    def __init__(self) -> None:
        super().__init__(Dialogue(FakeEngine(), WORLD), {})

    def answer(self, line: str) -> Generator[str]:
        yield f"{line!r}\n"


@pytest.mark.parametrize(
    ("lines", "piped", "typed"),
    [
        (
            "one\\\ntwo\\\n\nthree\n",
            "'one\\ntwo\\n'\n'three'\n",
            "> ... ... 'one\\ntwo\\n'\n> 'three'\n> \n",
        ),
        ("one\\\n", "'one'\n", "> ... 'one'\n> \n"),
        ("a\\b\n", "'a\\\\b'\n", "> 'a\\\\b'\n> \n"),
        ("", "", "> \n"),
    ],
)
def test_a_backslash_at_its_end_continues_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, piped: str, typed: str
) -> None:
    for stdin, printed in ((io.StringIO(lines), piped), (Terminal(lines), typed)):
        monkeypatch.setattr(sys, "stdin", stdin)
        chat_module.converse(Repeating())
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize(("pieces", "times"), [(["", "", "yes", "", "!"], 1), (["yes", "", "!"], 0), ([], 0)])
def test_thinking_is_told_once_and_only_where_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch, pieces: list[str], times: int
) -> None:
    told: list[str] = []
    chat = new_chat(tell_thinking=lambda: told.append("thinking"))
    monkeypatch.setattr(chat.dialogue, "reply", lambda message, **arguments: (piece for piece in pieces))
    answers(chat, "a")
    assert len(told) == times


@pytest.mark.parametrize(("thinking", "is_told"), [("think a bit", True), ("closed", False)])
def test_a_chat_with_thoughts_says_that_the_model_thinks(
    rwkv: Command, run_dir: Path, thinking: str, is_told: bool
) -> None:
    printed = rwkv("chat", run_dir, "--tokens", 3, "--thinking", thinking, "--verbose", stdin="hello\n")
    assert printed.err.startswith("[thinking ...]\n[3 tokens, ") == is_told
    assert "thinking ..." not in rwkv("chat", run_dir, "--tokens", 3, "--thinking", thinking, stdin="hello\n").err


def test_a_message_that_is_no_text_is_shown_without_what_is_around_it() -> None:
    chat = new_chat()
    (said,) = answers(chat, "caf\udce9")
    assert said == "! message 'caf\\udce9': is not UTF-8; convert it, or set the terminal to UTF-8\n"
    assert len(answers(chat, "hello")[0]) > 1


def test_a_conversation_through_pipes(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    flags = ("chat", run_dir, "--tokens", 8, "--template", "raven", "--temperature", 0, "--verbose")
    state = tmp_path / "state.safetensors"
    printed = rwkv(*flags, stdin=f"hello\n/undo\nhello\n/save {state}\n/quit\nnever read\n")
    first, second = printed.out.removesuffix(f"saved to {state}\n").split("taken back: hello\n")
    assert first == second  # greedy
    assert printed.err.count(" tokens/s; the first took ") == 2
    assert rwkv(*flags, stdin=f"/load {state}").out.startswith(f"loaded {state}, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--top-p", "2"], "--top-p 2.0"),
        (["--template", "raven", "--system", "be brief"], "--system 'be brief': this chat format has no system"),
        (["--system", " "], "--system ' ': is empty"),
        (["--template", "vicuna"], "--template 'vicuna': is none of g1, world, raven, pile-qa, and no file"),
        (["--template", "world", "--thinking", "open"], "--thinking 'open': this chat format has none"),
        (["--system", "caf\udce9"], r"--system 'caf\udce9': is not UTF-8; convert it"),
        ([], "nowhere: no such file or folder"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_named_before_weights_are_looked_for(
    rwkv: Command, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        rwkv("chat", "nowhere", *arguments)
    assert str(exit_.value.code).startswith(f"rwkv: {message}")
