"""`rwkv data` shows what of chats counts and what is cut, and refuses what a run would refuse."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cli.commands import Command

CHATS = [
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "It is 2"},
        ]
    },
    {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye " * 20}]},
    {"messages": [{"role": "user", "content": "a" * 90}, {"role": "assistant", "content": "b"}]},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return path


def test_shows_what_counts_in_brackets(rwkv: Command, source: Path) -> None:
    printed = rwkv("data", "show", source, "--tokenizer", "bytes", "--num", 1).out
    assert printed == (
        f"--- {source}: line 1: 59 tokens, 16 count ---\n"
        "User: Hi\n\nAssistant:[[ Hello<end>]]\n\nUser: 1+1?\n\nAssistant:[[ It is 2<end>]]\n"
    )
    last = rwkv("data", "show", source, "--tokenizer", "bytes", "--num", 1, "--chat-loss", "last").out
    assert "Assistant: Hello\n\nUser: 1+1?\n\nAssistant:[[ It is 2<end>]]" in last
    everything = rwkv("data", "show", source, "--tokenizer", "bytes", "--num", 1, "--chat-loss", "all").out
    assert "---\n[[User: Hi\n\nAssistant: Hello\n\nUser: 1+1?\n\nAssistant: It is 2<end>]]\n" in everything
    raven = rwkv("data", "show", source, "--num", 1, "--chat-format", "raven").out
    assert "Bob: Hi\n\nAlice:[[ Hello<end>]]\n\nBob: 1+1?" in raven


def test_shows_what_is_cut(rwkv: Command, source: Path) -> None:
    flags = ("--tokenizer", "bytes", "--sequence-length", 50)
    printed = rwkv("data", "show", source, *flags).out.splitlines()
    assert printed[0].endswith("59 tokens, 16 count, too long: 9 tokens are cut, 7 count of what is left ---")
    assert "Assistant:{{cut:  It is 2<end>}}" in printed
    assert printed[8].endswith("too long: 52 tokens are cut, 29 count of what is left ---")
    assert printed[12].endswith("too long: left out ---")
    assert printed[13].startswith("{{cut: User: aaa")
    dropped = rwkv("data", "show", source, *flags, "--chat-too-long", "drop").out
    assert dropped.count("too long: left out") == 3


def test_a_terminal_gets_colors(rwkv: Command, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "Assistant:\x1b[32m Hello<end>\x1b[0m\n\nUser" in rwkv("data", "show", source, "--num", 1).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "Assistant:[[ Hello<end>]]" in rwkv("data", "show", source, "--num", 1).out


def test_counts_all_of_them(rwkv: Command, source: Path) -> None:
    printed = rwkv("data", "stats", source, "--tokenizer", "bytes", "--sequence-length", 70).out
    assert "3 chats, 272 tokens, the longest 111; training: 2 chats, 129 tokens, of which 65 count" in printed
    assert (
        "longer than --sequence-length = 70: 2 of 3 chats; 1 left out, 1 cut at their end, which lost 32 tokens"
        in printed
    )
    assert "50% 102" in printed


@pytest.mark.parametrize(
    ("line", "flags", "error"),
    [
        ('{"messages": [{"role": "bot", "content": "a"}]}', (), "line 4: messages[0]: role = 'bot': must be one of"),
        ('{"messages": []', (), "line 4 is not JSON"),
        ('{"text": "a"}', (), "line 4: fields ['text'] are those of no form"),
        ("", ("--chat", "alpaca"), "line 1: instruction: is missing"),
        ("", ("--chat-format", "vicuna"), "'vicuna': is none of g1, world, raven, pile-qa"),
        ("", ("--num", "0"), "--num 0: must be at least 1"),
    ],
)
def test_what_a_run_would_refuse(rwkv: Command, source: Path, line: str, flags: tuple[object, ...], error: str) -> None:
    with source.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match=re.escape(error)):
        rwkv("data", "show", source, *("--tokenizer", "bytes", "--num", "9", *flags))
