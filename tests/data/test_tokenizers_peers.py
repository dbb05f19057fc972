"""transformers reads what we write, tokenizer and chat template, with our ids, texts and masks: `make test-peers`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_jax.chat.formats import G1
from rwkv_jax.chat.template import Thinking
from rwkv_jax.data.tokenizers import WorldTokenizer, write_hugging_face_tokenizer
from tests.data.test_tokenizers_word_piece import HARD, blocks
from tests.inference.test_g1_jinja import TOOLS, conversations

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"
PROGRAM = ROOT / "tests" / "data" / "transformers_oracle.py"

WORLD = WorldTokenizer()
SWITCHES: dict[Thinking, dict[str, Any]] = {
    "none": {},
    "open": {"enable_thinking": True},
    "think": {"enable_thinking": True, "reasoning_effort": "medium"},
    "think a lot": {"reasoning_effort": "high"},
    "empty": {"enable_thinking": False},
}


def drawn(count: int) -> list[dict[str, Any]]:
    """Conversations, with what our format makes of them."""
    chats: list[dict[str, Any]] = []

    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        messages=conversations(),
        tools=st.none() | st.lists(st.sampled_from(TOOLS), min_size=1, max_size=3),
        thinking=st.sampled_from([*SWITCHES]),
    )
    def draw(messages: list[dict[str, Any]], tools: Any, thinking: Thinking) -> None:
        finished = messages[:-1] or [messages[-1], {"role": "assistant", "content": "Yes."}]
        pieces = G1.pieces(finished, tools=tools, tool_choice="auto")
        encoded = [(token, piece.reply is not None) for piece in pieces for token in WORLD.encode(piece.text)]
        chats.append(
            {
                "messages": messages,
                "finished": finished,
                "tools": tools,
                "variables": SWITCHES[thinking],
                "text": G1.render(messages, tools=tools, tool_choice="auto", thinking=thinking),
                "ids": [token for token, _ in encoded],
                "mask": [int(counts) for _, counts in encoded],
            }
        )

    draw()
    return chats


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    assert PEER.is_file(), "make test-peers sets up the environment that this needs"
    write_hugging_face_tokenizer(WORLD, tmp_path / "world")
    texts = [*HARD.values(), *blocks()]
    chats = drawn(300)
    ids = [WORLD.encode(text) for text in texts]
    (tmp_path / "questions").write_text(json.dumps({"texts": texts, "ids": ids, "chats": chats}))
    command = [PEER, PROGRAM, tmp_path / "world", tmp_path / "questions", tmp_path / "answers"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "answers").read_text())
    assert told["padded"] == [[0, 0, *WORLD.encode("a")], WORLD.encode("a b c")]
    assert told["ids"] == ids
    assert told["decoded"] == texts
    for chat, answer in zip(chats, told["chats"], strict=True):
        assert answer == {name: chat[name] for name in ("ids", "mask", "text")}
