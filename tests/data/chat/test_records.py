"""Records of every form become the same conversations; what is wrong with one is said with file, line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.chat.messages import Message
from rwkv_jax.config import ConfigError, DataConfig, StepConfig, TrainConfig
from rwkv_jax.data.chat.records import read_conversation, recognize
from rwkv_jax.data.chat.source import ChatCounts, ReadChat, read_chats
from rwkv_jax.data.tokenizers import ByteTokenizer

SYSTEM, ASKED, ANSWERED = "Be brief.", "What is 1+1?", "It is 2."
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}

SAME: dict[str, dict[str, Any]] = {
    "messages": {
        "id": 7,
        "messages": [
            {"role": "system", "content": SYSTEM, "name": None},
            {"role": "user", "content": [{"type": "text", "text": ASKED}]},
            {"role": "assistant", "content": ANSWERED, "tool_calls": None, "weight": 1},
        ],
    },
    "sharegpt": {
        "system": SYSTEM,
        "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}],
    },
    "alpaca": {"system": SYSTEM, "instruction": ASKED, "input": "", "output": ANSWERED},
    "completion": {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASKED}],
        "completion": [{"role": "assistant", "content": ANSWERED}],
    },
}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def chats(source: str | Path, chat: Any = "auto", **fields: Any) -> list[ReadChat]:
    data = DataConfig(source=str(source), chat=chat, tokenizer="bytes", **fields)
    return list(read_chats(data, ByteTokenizer(257), ChatCounts()))


@pytest.mark.parametrize("form", SAME)
def test_every_form_is_recognized_and_says_the_same(form: Any) -> None:
    assert recognize(SAME[form]) == form
    conversation = read_conversation(SAME[form], form)
    assert conversation.messages == (
        Message("system", SYSTEM),
        Message("user", ASKED),
        Message("assistant", ANSWERED),
    )
    assert conversation.replies == (2,)


def test_instructions_may_have_input_and_history_and_prompts_may_be_texts() -> None:
    record = {"instruction": "Add.", "input": "1 1", "output": "2", "history": [["Hi", "Hello"]]}
    found = read_conversation(record, "alpaca")
    assert [message.content for message in found.messages] == ["Hi", "Hello", "Add.\n1 1", "2"]
    assert found.replies == (1, 3)
    texts = read_conversation({"prompt": "a", "completion": "b"}, "completion")
    assert texts.messages == (Message("user", "a"), Message("assistant", "b"))


def test_reasoning_and_calls_in_all_the_ways_in_which_they_are_kept() -> None:
    """Arguments as JSON text and as an object, reasoning by both names, a call and its result in ShareGPT."""
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "reasoning": "hm", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "reasoning_content": "so", "content": "2"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    found = read_conversation({"messages": messages, "tools": tools}, "messages")
    assert [message.reasoning for message in found.messages] == ["", "hm", "", "so"]
    assert found.messages[1].tool_calls[0].arguments == '{"a":1}'
    assert found.tools == tuple(tools)
    turns = [
        {"from": "human", "value": "1+1"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ]
    other = read_conversation({"conversations": turns, "tools": json.dumps(tools)}, "sharegpt")
    assert (other.messages[1].tool_calls, other.tools) == (found.messages[1].tool_calls, found.tools)
    assert other.replies == found.replies == (1, 3)


def test_replies_without_weight_do_not_count_and_nobody_learns_of_what_follows_the_last() -> None:
    reply = {"role": "assistant", "content": "no"}
    messages = [
        {"role": "user", "content": "a"},
        {**reply, "weight": 0},
        {"role": "user", "content": "b"},
        reply,
        {"role": "user", "content": "thanks"},
    ]
    found = read_conversation({"messages": messages}, "messages")
    assert (found.replies, len(found.messages), found.left_out) == ((3,), 4, 1)
    prompts = {"prompt": messages[:3], "completion": [reply]}
    assert read_conversation({**prompts, "prompt": [messages[0], reply, messages[2]]}, "completion").replies == (3,)


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"messages": [USER, {"role": "asistant", "content": "b"}]}, r"messages\[1\]: role = 'asistant'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"messages\[1\]: content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\]: content is empty"),
        ({"messages": [USER]}, "no message is the assistant's"),
        ({"messages": []}, "must be a list with at least one message"),
        ({"messages": "a"}, "messages: must be a list, not str"),
        ({"messages": [USER, USER, {"role": "assistant", "content": "b"}]}, r"messages\[1\]: is the second in a row"),
        ({"messages": [USER, {"role": "assistant", "content": "b", "wait": 1}]}, r"messages\[1\]: has no field wait"),
        ({"messages": [USER, {"role": "assistant", "content": "b", "weight": 2}]}, r"messages\[1\].weight = 2"),
        ({"messages": [USER, {"role": "assistant", "content": "b", "weight": 0}]}, "counts \\(weight 0\\)"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [USER, {"role": "assistant", "content": "b"}], "tools": [1]}, r"tools\[0\]: must be an object"),
        ({"conversations": [{"from": "humam", "value": "a"}]}, r"conversations\[0\].from = 'humam': no such role"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\].value: must be a string, not int"),
        (
            {"system": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
            r"conversations\[1\]: content is empty",
        ),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, r"conversations\[0\].value: .* JSON"),
        ({"instruction": "a", "output": ""}, "output: content is empty"),
        ({"instruction": "a", "output": ["b"]}, "output: must be a string, not list"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history\[0\]: must be a pair"),
        ({"prompt": "a", "completion": ""}, "completion: content is empty"),
        ({"prompt": "a", "completion": ["b"]}, "prompt: must be a list, not str"),
        ({"question": "a", "answer": "b"}, "those of no form .*messages: messages; sharegpt: conversations"),
        ({"messages": [USER], "conversations": []}, r"has those of \['messages', 'sharegpt'\]"),
        ("[1]", "is not a JSON object but list"),
        ('{"messages": [{"ro', "is not JSON"),
    ],
)
def test_what_is_wrong_with_a_record(tmp_path: Path, record: Any, error: str) -> None:
    """It stands in line 2, behind a good one of its form."""
    fields = record if isinstance(record, dict) else {}
    first = next((SAME[form] for form, field in FIELDS.items() if field in fields), SAME["messages"])
    source = write(tmp_path / "chats.jsonl", first, record)
    with pytest.raises(ConfigError, match=rf"chats.jsonl.*line 2.*{error}"):
        chats(source)


FIELDS = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction", "completion": "prompt"}


def test_forms_are_not_mixed(tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", SAME["messages"], SAME["alpaca"])
    with pytest.raises(ConfigError, match=r"line 2: is of the form alpaca, and .*line 1 of messages"):
        chats(source)
    with pytest.raises(ConfigError, match=r"line 1: output: is missing; a record of the form alpaca has") as error:
        chats(write(tmp_path / "other.jsonl", {"instruction": "a"}), "alpaca")
    assert "instruction, output" in str(error.value)


def test_files_are_compressed_lie_in_folders_and_are_arrays_or_tables(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [SAME["sharegpt"], {"conversations": SAME["sharegpt"]["conversations"]}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(records[1]) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("What this is.")
    lines: list[str] = []
    data = DataConfig(source=str(tmp_path), chat="auto", tokenizer="bytes")
    found = list(read_chats(data, ByteTokenizer(257), ChatCounts(), lines.append))
    assert [chat.place.removeprefix(f"{tmp_path}/") for chat in found] == [
        "a.json: line 2",
        "a.json: line 15",
        "b.jsonl.gz: line 1",
        "c.parquet: row 0",
        "c.parquet: row 1",
    ]
    assert found[0].conversation == found[3].conversation
    assert found[1].conversation == found[2].conversation == found[4].conversation
    assert lines == ["left out 1 of 4 files that hold no records"]


@pytest.mark.parametrize(
    ("name", "error"),
    [("text.txt", "has no records of chats; give files of .jsonl"), ("missing.jsonl", "there is no such file")],
)
def test_sources_without_records(tmp_path: Path, name: str, error: str) -> None:
    (tmp_path / "text.txt").write_text("User: a")
    with pytest.raises(ConfigError, match=error):
        chats(tmp_path / name)


def test_text_sources_point_to_chats(tmp_path: Path) -> None:
    from rwkv_jax.data.text.sources import read_documents

    source = write(tmp_path / "chats.jsonl", SAME["messages"])
    with pytest.raises(ConfigError, match=r"or data\.chat to auto if these are chats"):
        list(read_documents(DataConfig(source=source)))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tokenizer": None}, "data.tokenizer = None: chats do not train one"),
        ({"source": "synthetic:mqar", "tokenizer": None}, "data.source"),
        ({"source": "python-stdlib"}, "data.source = 'python-stdlib': name the file"),
        ({"order": "official"}, "data.order"),
        ({"chat": "openai"}, "data.chat = 'openai': must be auto, messages, sharegpt, alpaca"),
        ({"chat_loss": "user"}, "data.chat_loss = 'user': must be assistant, last or all"),
    ],
)
def test_what_a_config_of_chats_cannot_be(fields: dict[str, Any], error: str) -> None:
    base: dict[str, Any] = {"source": "x", "chat": "auto", "tokenizer": "world"}
    with pytest.raises(ConfigError, match=error):
        DataConfig(**base | fields)


def test_options_of_chats_are_refused_where_none_are_read() -> None:
    for name, value in (("chat_loss", "last"), ("chat_rows", "apart"), ("chat_too_long", "drop")):
        given: dict[str, Any] = {name: value}
        with pytest.raises(
            ConfigError, match=rf"^data\.{name} = '{value}': is of chats, and none are read; set data\.chat"
        ):
            DataConfig(**given)
    data = DataConfig(source="pairs.jsonl", tokenizer="world", chat_format="world")
    with pytest.raises(ConfigError, match=r"^data\.chat_format = 'world': no chats are read; set data\.chat"):
        TrainConfig(data=data)
    TrainConfig(data=data, training=StepConfig(objective="orpo"))
