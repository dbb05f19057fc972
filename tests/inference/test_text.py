"""What a text stream shows is the text up to the first stop string, whatever the tokens and however it is cut."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer, Tokenizer, WorldTokenizer
from rwkv_jax.inference.engine.text import TextStream

BYTES = ByteTokenizer()


def brute_force(text: str, stops: Iterable[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, the longest of several, and which it is."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def can_still_stop(text: str, stops: Iterable[str]) -> int:
    """Characters at the end of a text that a stop string begins with."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


class _PieceTokenizer(ByteTokenizer):
    """Tokens of several characters, or of parts of one."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self._pieces = pieces

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token]


def cut(text: str, lengths: list[int]) -> list[bytes]:
    """The text's bytes in pieces of these lengths, over and over."""
    content, pieces = text.encode(), []
    while content:
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(content[:length])
        content = content[length:]
    return pieces


# Few characters, so that stop strings occur, overlap and begin alike; of 1, 2, 3 and 4 bytes.
LETTERS = st.sampled_from("aabbé日👩")
WORDS = st.text(LETTERS, max_size=30)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(WORDS, STOPS, LENGTHS)
def test_equals_the_brute_force_definition(text: str, stops: list[str], lengths: list[int]) -> None:
    pieces = cut(text, lengths)
    expected, which = brute_force(text, stops)
    stream = TextStream(_PieceTokenizer(pieces), stops)
    shown, read = "", b""
    for token, piece in enumerate(pieces):
        was_stopped = stream.stopped is not None
        shown += stream.push(token)
        read += piece
        assert expected.startswith(shown)
        if stream.stopped is None:
            known = read.decode(errors="ignore")
            assert shown == known[: len(known) - can_still_stop(known, stops)]  # nothing is held back without need
        elif not was_stopped:
            assert brute_force(read.decode(errors="ignore"), stops)[1] == stream.stopped
    shown += stream.flush()
    assert (shown, stream.stopped) == (expected, which)


def test_a_stop_string_that_spans_tokens_never_shows_its_beginning() -> None:
    stream = TextStream(BYTES, ["\n\nUser:"])
    pieces = [stream.push(token) for token in b"Hi.\n\nUse"]
    assert pieces == ["H", "i", ".", "", "", "", "", ""]
    assert stream.push(ord("d")) == "\n\nUsed"
    assert "".join(stream.push(token) for token in b"\n\nUser: more") == ""
    assert stream.stopped == "\n\nUser:"
    assert stream.flush() == ""


def test_what_was_held_back_comes_when_nothing_follows() -> None:
    stream = TextStream(BYTES, ["stop"])
    assert "".join(stream.push(token) for token in b"a sto") == "a "
    assert stream.flush() == "sto"
    assert stream.flush() == ""
    assert stream.stopped is None


def test_half_a_character_comes_as_a_replacement_at_the_end_and_may_complete_a_stop_string() -> None:
    half = "é".encode()[0]
    stream = TextStream(BYTES)
    assert stream.push(half) + stream.flush() == "\ufffd"
    stopping = TextStream(BYTES, ["a\ufffd"])
    assert stopping.push(ord("a")) + stopping.push(half) + stopping.flush() == ""
    assert stopping.stopped == "a\ufffd"


@pytest.mark.parametrize("tokenizer", [BYTES, WorldTokenizer()], ids=["bytes", "world"])
def test_without_stop_strings_the_text_is_what_the_tokenizer_decodes(tokenizer: Tokenizer) -> None:
    text = "def f(x):\n\n    return '日本 👩\u200d👧 é'\n"
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(shown) + stream.flush() == text


def test_the_stop_string_that_is_complete_first_ends_the_text_and_then_the_longest() -> None:
    def shown(text: str, *stops: str) -> tuple[str, str | None]:
        stream = TextStream(BYTES, stops)
        return "".join(stream.push(token) for token in text.encode()) + stream.flush(), stream.stopped

    assert shown("xabcd", "abcd", "bc") == ("xa", "bc")
    assert shown("xabc", "bc", "abc") == ("x", "abc")
    assert shown("xab", "a", "ab") == ("x", "a")
    assert shown("aab", "ab", "aac") == ("a", "ab")


def test_time_is_linear_in_the_text() -> None:
    """A text that is nothing but the beginning of a stop string, over and over, is the worst case."""

    def seconds(length: int) -> float:
        stream = TextStream(BYTES, ["a" * 400 + "b"])
        begin = time.process_time()
        for _ in range(length):
            stream.push(97)
        return time.process_time() - begin

    seconds(1000)
    assert min(seconds(20_000) for _ in range(3)) < 30 * min(seconds(2000) for _ in range(3))


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        (["a", ""], "stop string 1 = ''"),
        ("stop", r"such as \['stop'\]"),
        ([3], "stop string 0 = 3"),
        ([b"a"], "stop string 0 = b'a'"),
        ([None], "stop string 0 = None"),
        (["a", "\udcff"], r"stop string 1 = '\\udcff': is not UTF-8"),
    ],
)
def test_stop_strings_that_cannot_work_are_named(stops: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextStream(BYTES, stops)
