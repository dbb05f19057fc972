"""Requests and their tokens: what continues what, and results in their places."""

from __future__ import annotations

import itertools

import pytest

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.evaluation.encoding import Pair, cut_at_stops, encode_pair, rolling_windows
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, LoglikelihoodResult, Rolling, answer


class Syllables:
    """Merges "ab" to one token, as a tokenizer with long entries does."""

    begin = beginning = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.replace("ab", "\x01").encode())


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    pair = encode_pair(ByteTokenizer(256), "ab \n", " c")
    assert pair == (tuple(b"\0ab"), tuple(b" \n c"))
    assert encode_pair(ByteTokenizer(256), "ab ", "c", begin=False) == (tuple(b"ab"), tuple(b" c"))


@pytest.mark.parametrize("begin", [False, True])
def test_an_empty_context_is_the_start_of_a_text(begin: bool) -> None:
    assert encode_pair(ByteTokenizer(257), "", "ab", begin=begin) == ((256,), (97, 98))
    assert encode_pair(ByteTokenizer(257), "  ", "ab", begin=begin) == ((256,), tuple(b"  ab"))
    assert encode_pair(ByteTokenizer(257), (), (7,), begin=begin) == ((256,), (7,))


def test_a_continuation_has_the_tokens_beyond_those_of_the_context() -> None:
    assert encode_pair(Syllables(), "xa", "cd", begin=False) == (tuple(b"xa"), tuple(b"cd"))
    # "xab" has two tokens, as "xa" has, so that nothing would be left.
    assert encode_pair(Syllables(), "xa", "b", begin=False) == (tuple(b"xa"), tuple(b"b"))
    assert encode_pair(Syllables(), "xa", "bc", begin=False) == (tuple(b"xa"), tuple(b"c"))


def test_ids_are_used_unchanged_and_mixtures_refused() -> None:
    assert encode_pair(Syllables(), (5, 32), (9,)) == ((0, 5, 32), (9,))
    with pytest.raises(TypeError, match="two texts, or token ids both"):
        encode_pair(Syllables(), "a", (9,))
    with pytest.raises(ValueError, match="nothing to score"):
        encode_pair(Syllables(), (9,), ())


@pytest.mark.parametrize(("length", "window"), list(itertools.product((0, 1, 2, 7, 8, 9, 23), (1, 2, 8, 100, None))))
def test_windows_predict_every_token_once_from_what_precedes_it(length: int, window: int | None) -> None:
    ids = list(range(1, length + 1))
    pairs = rolling_windows(ids, (0,), window)
    assert [token for pair in pairs for token in pair.continuation] == ids
    for context, continuation in pairs:
        assert [*context, *continuation] == [0, *ids][continuation[0] - len(context) : continuation[-1] + 1]
        assert window is None or len(context) + len(continuation) - 1 <= window
    if window is None:
        assert len(pairs) == (length > 0)
    elif length > window:
        assert {len(context) + len(continuation) - 1 for context, continuation in pairs} == {window}
        assert [len(context) for context, _ in pairs[:-1]] == [1] * (len(pairs) - 1)


def test_an_answer_ends_before_the_first_stop() -> None:
    assert cut_at_stops("so 4.\n\nQuestion: b", ("Question:", "\n\n", "")) == "so 4."
    assert cut_at_stops("so 4.", ("Question:",)) == "so 4."
    assert cut_at_stops("so 4.", ()) == "so 4."


class Echo:
    """Answers with what it was asked, backwards."""

    def loglikelihood(self, requests, report=None):
        for i, request in reversed(list(enumerate(requests))):
            if report is not None:
                report(i, request.continuation)
        return [LoglikelihoodResult(-len(request.continuation), True) for request in requests]

    def rolling(self, requests, report=None):
        for i, request in enumerate(requests):
            if report is not None:
                report(i, request.text)
        return [float(len(request.text)) for request in requests]

    def generate(self, requests, report=None):
        return [request.context for request in requests]


def test_results_of_all_kinds_come_in_the_order_of_the_requests() -> None:
    requests = [Rolling("abc"), Loglikelihood("a", "bc"), Generate("x", ()), Rolling("z"), Loglikelihood("a", "b")]
    heard = []
    results = answer(Echo(), requests, lambda i, result: heard.append((i, result)))
    assert results == [3.0, (-2, True), "x", 1.0, (-1, True)]
    assert heard == [(4, "b"), (1, "bc"), (0, "abc"), (3, "z")]
    assert answer(Echo(), []) == []
    assert isinstance(encode_pair(ByteTokenizer(257), "a", "b"), Pair)
