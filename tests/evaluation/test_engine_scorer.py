"""Requests by an engine: the model's own numbers in their order, and what several requests share is read once."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation import engine_scorer
from rwkv_jax.evaluation.encoding import Pair, rolling_windows
from rwkv_jax.evaluation.engine_scorer import EngineScorer, options_for, shared_prefixes
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, Rolling
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.weights.pretrained import find_tokenizer, from_pretrained
from rwkv_jax.weights.sources import find_weights
from tests.golden import GOLDEN_DIR
from tests.inference.models import CONFIGS, log_softmax, quick_engine, random_model, whole_logits

CONFIG = CONFIGS["7"]


@pytest.fixture(scope="module")
def engine(programs_on_disk: None) -> Iterator[Engine]:
    with quick_engine(random_model(CONFIG)) as engine:
        yield engine


def read_by(engine: Engine, pairs: list[Pair]) -> int:
    """Tokens that the engine reads for these pairs."""
    before = engine.stats().prompt_tokens
    EngineScorer(engine).score_ids(pairs)
    return engine.stats().prompt_tokens - before


def by_one_pass(context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[float, bool]:
    logits = whole_logits(CONFIG, (*context, *continuation))[len(context) - 1 : -1]
    own = log_softmax(logits)[np.arange(len(continuation)), list(continuation)]
    return float(own.sum()), bool((logits.argmax(axis=-1) == continuation).all())


def test_requests_get_the_models_numbers_in_their_order(engine: Engine) -> None:
    requests = [
        Loglikelihood("The cat sat on the ", "mat"),  # the blank moves over
        Loglikelihood("", "An"),
        Loglikelihood("The cat sat on the", " mat"),  # so that this is the same
        Loglikelihood("The cat sat", " on"),
        Loglikelihood((7, 8), (9, 250, 3)),
    ]
    heard = {}
    found = EngineScorer(engine).loglikelihood(requests, lambda i, result: heard.update({i: result}))
    assert [heard[i] for i in range(len(requests))] == found
    assert found[0] == found[2]
    expected = [
        by_one_pass(tuple(b"\0The cat sat on the"), tuple(b" mat")),
        by_one_pass((0,), tuple(b"An")),
        by_one_pass((0, *b"The cat sat"), tuple(b" on")),
        by_one_pass((0, 7, 8), (9, 250, 3)),
    ]
    for result, (logprob, is_greedy) in zip([found[0], found[1], *found[3:]], expected, strict=True):
        assert result.logprob == pytest.approx(logprob, abs=1e-4)
        assert result.is_greedy == is_greedy
    (bare,) = EngineScorer(engine, begin=False).loglikelihood(requests[-1:])
    assert bare.logprob == pytest.approx(by_one_pass((7, 8), (9, 250, 3))[0], abs=1e-4)


def test_a_greedy_continuation_is_known_as_one(engine: Engine) -> None:
    ids = tuple(engine.generate([5, 6], max_tokens=4, sampling="greedy", stop_ids=()).ids)
    wrong = (*ids[:-1], (ids[-1] + 1) % CONFIG.vocab_size)
    found = EngineScorer(engine, begin=False).loglikelihood([Loglikelihood((5, 6), ids), Loglikelihood((5, 6), wrong)])
    assert [result.is_greedy for result in found] == [True, False]


def test_a_context_is_read_once_and_so_is_a_long_beginning_of_several(engine: Engine) -> None:
    draws = random.Random(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draws.randrange(1, CONFIG.vocab_size) for _ in range(length))

    examples, num_questions, num_endings = ids(40), 9, 4
    pairs = [
        Pair(context, ids(3))
        for context in [(*examples, question, *ids(20)) for question in range(1, num_questions + 1)]
        for _ in range(num_endings)
    ]
    assert read_by(engine, pairs) == 40 + 21 * num_questions + 3 * len(pairs)
    assert read_by(engine, pairs) == 3 * len(pairs)  # contexts are still there
    alone = [Pair(ids(25), ids(2)) for _ in range(3)]
    assert read_by(engine, alone) == 3 * 27


@pytest.mark.parametrize("prefix_bytes", [0, 2000, 12_000])
def test_results_do_not_depend_on_what_is_cached(engine: Engine, prefix_bytes: int) -> None:
    """Without a cache, with one too small for a state, and with one for a few."""
    assert 2000 < engine.state_bytes < 4000
    pairs = [Pair((*range(1, 30), i), (i, 77 + j)) for i in range(1, 12) for j in range(2)]
    expected = [result.logprob for result in EngineScorer(engine).score_ids(pairs)]
    with quick_engine(random_model(CONFIG), prefix_bytes=prefix_bytes) as other:
        found = [result.logprob for result in EngineScorer(other).score_ids(pairs)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_whole_texts_in_one_piece_or_in_windows(engine: Engine) -> None:
    texts = [Rolling("A text of thirty-one characters"), Rolling(""), Rolling((3, 4))]
    heard = {}
    found = EngineScorer(engine).rolling(texts, lambda i, value: heard.update({i: value}))
    assert heard == dict(enumerate(found))
    assert found[1] == 0
    ids = tuple(str(texts[0].text).encode())
    assert found[0] == pytest.approx(by_one_pass((0,), ids)[0], abs=1e-4)
    assert found[2] == pytest.approx(by_one_pass((0,), (3, 4))[0], abs=1e-4)
    cut = EngineScorer(engine, window=12).rolling(texts)
    assert cut[0] == pytest.approx(sum(by_one_pass(*pair)[0] for pair in rolling_windows(ids, (0,), 12)), abs=1e-4)
    assert abs(cut[0] - found[0]) > 0.01


@pytest.mark.parametrize(
    ("rounds", "tokens", "kept", "sizes"),
    [(1, 1000, 100, [4, 4, 1]), (100, 12, 100, [4, 3, 2]), (100, 1000, 1, [3, 3, 3]), (100, 1000, 100, [9])],
)
def test_results_come_in_parts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, rounds: int, tokens: int, kept: int, sizes: list[int]
) -> None:
    """By the number of requests, of tokens and of contexts, whichever is reached first."""
    monkeypatch.setattr(engine_scorer, "_ROUNDS", rounds)
    monkeypatch.setattr(engine_scorer, "_MAX_TOKENS", tokens)
    monkeypatch.setattr(EngineScorer, "_num_kept", kept)
    pairs = [Pair((0, i % 3), (i, 1, 2)) for i in range(9)]
    parts = list(EngineScorer(engine)._parts(pairs))
    assert [pairs[i] for part in parts for i in part] == sorted(pairs)
    assert [len(part) for part in parts] == sizes


def test_answers_end_where_each_request_says(engine: Engine) -> None:
    whole = engine.generate("Q: 1?\nA:", max_tokens=12, sampling="greedy", stop_ids=(0,)).text
    middle = whole[5]
    requests = [
        Generate("Q: 1?\nA:", (), 12),
        Generate("Q: 1?\nA:", (middle, ""), 12),
        Generate("Q: 1?\nA:", (), 3),
        Generate("", ("\n",), 2),
    ]
    heard = {}
    found = EngineScorer(engine).generate(requests, lambda i, text: heard.update({i: text}))
    assert heard == dict(enumerate(found))
    assert found[:2] == [whole, whole[: whole.index(middle)]]
    assert whole.startswith(found[2].rstrip("\ufffd"))
    assert found[3] == engine.generate([0], max_tokens=2, sampling="greedy", stop=["\n"]).text


def test_a_limited_context_loses_its_beginning_and_that_is_counted() -> None:
    config = dataclasses.replace(CONFIGS["transformer"], context_length=24)
    with quick_engine(random_model(config), prefix_bytes=0) as engine:
        scorer = EngineScorer(engine)
        assert scorer.window == 23
        long, last = tuple(range(1, 60)), tuple(range(40, 60))
        requests = [Loglikelihood(long, (7, 8, 9, 10)), Loglikelihood((1, 2), (3,))]
        cut, kept = scorer.loglikelihood(requests)
        assert [scorer.is_truncated(each) for each in requests] == [True, False]
        assert [scorer.is_truncated(Generate((1, 2), (), most)) for most in (21, 22)] == [False, True]
        assert not scorer.is_truncated(Rolling(long))
        (expected,) = EngineScorer(engine, begin=False).loglikelihood([Loglikelihood(last, (7, 8, 9, 10))])
        assert cut.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert kept.logprob < 0
        for window in (0, 24):
            with pytest.raises(ConfigError, match=f"window = {window}: must be a whole number, from 1 to 23"):
                EngineScorer(engine, window=window)


@pytest.mark.parametrize("seed", range(20))
def test_beginnings_to_read_ahead_save_what_they_should(seed: int) -> None:
    """Against reading each context by itself, beyond the longest beginning that was read before it."""
    draws = random.Random(seed)
    contexts = sorted({tuple(draws.choices((1, 2), k=draws.randint(1, 9))) for _ in range(draws.randint(1, 40))})
    min_saved, min_length = draws.randint(1, 12), draws.randint(1, 3)
    found = shared_prefixes(contexts, min_saved, min_length)
    assert len(set(found)) == len(found)
    for place, prefix in enumerate(found):
        sharers = sum(context[: len(prefix)] == prefix for context in contexts)
        known = max((len(other) for other in found[:place] if prefix[: len(other)] == other), default=0)
        assert len(prefix) >= min_length
        assert (sharers - 1) * (len(prefix) - known) >= min_saved
        assert not any(other[: len(prefix)] == prefix for other in found[:place])
    # None is left out: no beginning that is worth it branches off, or ends, beyond those that were found.
    for a, b in itertools.pairwise(contexts):
        length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        sharers = sum(context[:length] == a[:length] for context in contexts)
        known = max(
            (len(other) for other in found if a[: len(other)] == other[:length] and len(other) <= length), default=0
        )
        assert length < min_length or (sharers - 1) * (length - known) < min_saved


def test_an_engine_for_evaluations_can_keep_what_it_shares() -> None:
    options = options_for(random_model(CONFIG), 12, tune="never")
    assert (options.num_slots, options.short_prefill_length, options.tune) == (12, 32, "never")
    with quick_engine(random_model(CONFIG)) as engine:
        assert options.prefix_bytes >= 48 * engine.state_bytes


@pytest.mark.parametrize(("case", "begin", "beginning"), [("llama3", (276,), (276,)), ("qwen3", (), (276,))])
def test_what_is_scored_begins_as_the_models_texts_do(
    case: str, begin: tuple[int, ...], beginning: tuple[int, ...], programs_on_disk: None
) -> None:
    """A Llama's behind its first token, which is not its end of text; a Qwen's text begins with its own tokens."""
    folder = GOLDEN_DIR / "llama" / case
    model = from_pretrained(folder, dtype="float32")
    tokenizer = find_tokenizer(find_weights(folder), model.config.vocab_size)
    assert tokenizer is not None
    assert (tokenizer.begin, tokenizer.beginning) == (begin, beginning)
    one, two = tuple(tokenizer.encode("a cat")), tuple(tokenizer.encode(" sat"))
    with Engine(model, tokenizer, options_for(model, 1)) as engine:
        scorer = EngineScorer(engine)
        asked = [Pair((*begin, *one), two), Pair(beginning, two), Pair(beginning, one)]
        expected = [result.logprob for result in scorer.score_ids(asked)]
        found = [result.logprob for result in scorer.loglikelihood([Loglikelihood(x, " sat") for x in ("a cat", "")])]
        assert [*found, *scorer.rolling([Rolling("a cat")])] == expected
        scores = [*engine.score(["a cat", ""], [" sat", " sat"]), *engine.score("a cat")]
        assert [score.logprob for score in scores] == expected
        answer = engine.generate([*begin, *one], max_tokens=4, sampling="greedy")
        assert scorer.generate([Generate("a cat", (), 4)]) == [answer.text]
