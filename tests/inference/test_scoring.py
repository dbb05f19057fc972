"""Scores of given tokens: groups of logits, pairs of texts, and the engine against one parallel pass of the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.inference import Engine, NotFiniteError, Score
from rwkv_jax.inference.engine import scoring
from rwkv_jax.inference.engine.job import UnreadScores
from rwkv_jax.inference.engine.news import News
from rwkv_jax.inference.engine.prompts import build_score_requests
from rwkv_jax.inference.engine.slot_arrays import SlotArrays
from tests.inference.models import (
    CONFIGS,
    GREEDY,
    IDS,
    LONG_IDS,
    VOCAB_SIZE,
    Stepped,
    log_softmax,
    prompts,
    quick_engine,
    random_model,
    whole_logits,
)

CONFIG = CONFIGS["7"]

# The device's part


@pytest.mark.parametrize("group", [1, 7, 64])
def test_groups_of_logits_are_scored_as_one(float64: None, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Ragged rows, of which one is empty: whatever the group, of each token by the logits before it."""
    draws = np.random.default_rng(0)
    rows, length, width, vocab = 3, 9, 4, 11
    hidden, head = draws.normal(size=(rows, length, width)), draws.normal(size=(vocab, width))
    before, tokens = draws.normal(size=(rows, vocab)), draws.integers(0, vocab, (rows, length)).astype(np.int32)
    lengths = np.array([9, 0, 4], np.int32)
    monkeypatch.setattr(scoring, "_MAX_LOGITS", group * vocab)
    score = jax.jit(functools.partial(scoring.score_tokens, lambda x: x @ head.T), static_argnums=4)
    found = score(hidden, before, tokens, lengths, 3)
    logits = np.concatenate([before[:, None], hidden[:, :-1] @ head.T], axis=1)
    expected = log_softmax(logits)
    for row, size in enumerate(lengths):
        own = np.arange(size)
        np.testing.assert_allclose(found.logprobs[row, :size], expected[row, own, tokens[row, :size]], atol=1e-12)
        np.testing.assert_array_equal(
            found.is_argmax[row, :size], logits[row, :size].argmax(axis=-1) == tokens[row, :size]
        )
        best = np.argsort(-expected[row, :size], axis=-1)[:, :3]
        np.testing.assert_array_equal(found.top_tokens[row, :size], best)
        np.testing.assert_allclose(
            found.top_logprobs[row, :size], np.take_along_axis(expected[row, :size], best, axis=-1), atol=1e-12
        )


# Texts to tokens


def encode(text: str, *, begins: bool) -> list[int]:
    """Bytes, of which `ab` is one token, 200."""
    assert not begins
    return [200 if character == "\1" else ord(character) for character in text.replace("ab", "\1")]


@pytest.mark.parametrize(
    ("context", "continuation", "ids", "scored"),
    [
        ("x", "y", (0, 120), (121,)),
        ("x", "ab", (0, 120), (200,)),
        ("xa", "b", (0, 120, 97), (98,)),  # together they would be x and ab: no token of its own for b
        ("", "xab", (0,), (120, 200)),
        ("x", None, (0,), (120,)),
        ((5, 6), "ab", (5, 6), (200,)),
        ("xa", (98,), (0, 120, 97), (98,)),
        ((), (7, 8), (0,), (7, 8)),
        (np.array([5, 6]), None, (0,), (5, 6)),
    ],
)
def test_a_pair_is_encoded_together_where_the_context_stays(
    context: Any, continuation: Any, ids: tuple[int, ...], scored: tuple[int, ...]
) -> None:
    continuations = None if continuation is None else [continuation]
    (request,) = build_score_requests(encode, (0,), (0,), [context], continuations, top_logprobs=2)
    assert (request.ids, request.scored_ids, request.max_tokens, request.top_logprobs) == (ids, scored, 0, 2)


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        ([], None, "contexts: there are none"),
        (7, None, "must be a text"),
        ("", None, "context 0 = '': is empty"),
        (["a", ""], None, "context 1 = '': is empty"),
        ("a", "", "continuation 0 = '': is empty"),
        (["a"], "b", "one for one, or a list of as many"),
        (["a", "b"], ["c"], "continuations: 1 for 2 contexts"),
        (["a"], [b"x"], "continuation 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(contexts: Any, continuations: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_score_requests(encode, (0,), (0,), contexts, continuations)


# The engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with quick_engine(random_model(CONFIG)) as engine:
        yield engine


def expected_logprobs(config: ModelConfig, ids: Sequence[int], num_scored: int, room: int = 64) -> np.ndarray:
    """[num_scored, V] before each of the last tokens."""
    return log_softmax(whole_logits(config, ids, room=room)[-num_scored - 1 : -1])


def assert_scores(score: Score, expected: np.ndarray, ids: Sequence[int], bound: float) -> None:
    assert score.ids == tuple(ids)
    own = expected[np.arange(len(ids)), list(ids)]
    np.testing.assert_allclose(score.token_logprobs, own, rtol=0, atol=bound)
    assert score.logprob == pytest.approx(own.sum(), rel=0, abs=len(ids) * bound)
    assert score.is_argmax == tuple(expected.argmax(axis=-1) == ids)
    assert score.is_greedy == all(score.is_argmax)


@pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=() if name == "7" else pytest.mark.long) for name in CONFIGS]
)
def test_scores_are_those_of_one_parallel_pass(float64: None, generation: str) -> None:
    """Pieces in a batch, and the first token after a context: to the last bits of float64."""
    config = dataclasses.replace(CONFIGS[generation], dtype="float64")
    # Long pieces, and short ones alone, are held against the parallel pass further below.
    with quick_engine(random_model(config), short_prefill_length=16, batch_invariant=True) as engine:
        texts = [*prompts(1, 5), LONG_IDS]
        sizes = [max(1, len(ids) // 2) for ids in texts]
        for ids, score in zip(texts, engine.score(texts), strict=True):
            assert_scores(score, expected_logprobs(config, (0, *ids), len(ids)), ids, 1e-11)
        contexts = [ids[: len(ids) - size] for ids, size in zip(texts, sizes, strict=True)]
        continuations = [ids[len(ids) - size :] for ids, size in zip(texts, sizes, strict=True)]
        for context, ids, score in zip(contexts, continuations, engine.score(contexts, continuations), strict=True):
            assert_scores(score, expected_logprobs(config, (*(context or (0,)), *ids), len(ids)), ids, 1e-11)
            assert score.top == ()


def test_a_sum_of_512_in_float32(engine: Engine) -> None:
    (ids,) = prompts(2, 1, 1)
    ids = ids + tuple(np.random.default_rng(2).integers(1, VOCAB_SIZE, 511).tolist())
    (score,) = engine.score([ids], top_logprobs=3)
    expected = expected_logprobs(CONFIG, (0, *ids), 512, room=520)
    assert_scores(score, expected, ids, 2e-5)
    assert score.logprob == pytest.approx(expected[np.arange(512), list(ids)].sum(), rel=0, abs=1e-4)


def test_greedy_text_is_greedy(engine: Engine) -> None:
    completion = engine.generate(IDS, max_tokens=20, sampling=GREEDY, stop_ids=(), top_logprobs=3)
    (score,) = engine.score([IDS], [completion.ids], top_logprobs=3)
    assert score.is_greedy
    np.testing.assert_allclose(score.token_logprobs, completion.logprobs, atol=1e-5)
    assert [[token for token, _ in top] for top in score.top] == [
        [token for token, _ in top] for top in completion.top_logprobs
    ]
    (other,) = engine.score([IDS], [(*completion.ids[:-1], completion.ids[-1] ^ 1)], top_logprobs=3)
    assert not other.is_greedy
    assert other.is_argmax == (*[True] * 19, False)


def test_a_context_is_read_once(engine: Engine) -> None:
    context = tuple(range(100, 140))
    before = engine.stats()
    first, *others = engine.score([context] * 6, [(token, 5) for token in range(6)], top_logprobs=3)
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == len(context) + 6 * 2
    assert after.cached_tokens - before.cached_tokens == 5 * len(context)
    (again,) = engine.score([context], [(0, 5)], top_logprobs=3)
    np.testing.assert_allclose(again.token_logprobs, first.token_logprobs, atol=1e-5)
    assert len({score.token_logprobs[0] for score in (first, *others)}) == 6
    # What was scored is no prompt: only the context is kept.
    assert engine.stats().cached_tokens - after.cached_tokens == len(context)


def test_scores_among_other_texts(engine: Engine) -> None:
    """More than there are slots, beside a stream that goes on."""
    texts = list(prompts(7, 12))
    alone = [engine.score([ids], top_logprobs=3)[0] for ids in texts]
    with engine.stream("Hello", max_tokens=64, stop_ids=(), top_logprobs=3, client_id="other") as stream:
        next(stream)
        together = engine.score(texts, top_logprobs=3, client_id="scores")
        assert len(list(stream)) == 63
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other.token_logprobs, one.token_logprobs, atol=1e-5)


def test_a_broken_state_has_no_scores() -> None:
    with quick_engine(random_model(CONFIG)) as engine:
        snapshot = engine.prefill(None, IDS)
        assert engine.prefix_cache is not None
        context = tuple(range(50, 70))
        broken = dataclasses.replace(snapshot, logits=snapshot.logits * np.nan, num_tokens=len(context))
        engine.prefix_cache.put(context, broken)
        with pytest.raises(NotFiniteError):
            engine.score([context, IDS], [IDS, IDS], top_logprobs=3)
        assert len(engine.score([IDS], top_logprobs=3)) == 1


def test_a_device_that_fails_ends_what_is_scored(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no memory")

    before = engine.score([LONG_IDS], top_logprobs=3)
    monkeypatch.setattr(SlotArrays, "score", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.score([IDS, LONG_IDS], top_logprobs=3)
    monkeypatch.undo()
    assert engine.score([LONG_IDS], top_logprobs=3) == before


@pytest.mark.parametrize("how", ["cancelled", "abandoned", "failed", "closed"])
def test_scores_that_are_not_read_yet_can_be_left(how: str) -> None:
    """The text has no slot any more; what the device computes for it is dropped."""
    stepped = Stepped(random_model(CONFIG))
    scheduler = stepped.scheduler
    requests = stepped.admission.score_requests([IDS, IDS], None, top_logprobs=3)
    jobs = stepped.admission.jobs(requests, News())
    scheduler.queue(jobs)
    while not jobs[0].is_only_scored:
        stepped.step()
    assert not jobs[0].is_done
    assert (jobs[0].slots, len(scheduler.slots.free)) == ([], 4)
    if how == "cancelled":
        scheduler.cancel(jobs[0])
    elif how == "closed":
        scheduler.close(RuntimeError("closed"))
        assert [str(job.error) for job in jobs] == ["closed"] * 2
        return
    elif how == "failed":
        scheduler._fail(RuntimeError("failed"))
        assert [str(job.error) for job in jobs] == ["failed"] * 2
    else:
        jobs[0].is_abandoned = True
    stepped.step(3)
    assert all(job.is_done for job in jobs)
    assert (sum(len(part.logprobs) for part in jobs[1].scores) == len(IDS)) is (how != "failed")
    stepped.finish(stepped.queue(IDS, max_tokens=2, top_logprobs=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contexts": [(1, 256)]}, "continuation: token id 256"),
        ({"contexts": [(1, -1)], "continuations": [(3,)]}, "context 0: token id -1"),
        ({"contexts": "a", "top_logprobs": 21}, "top_logprobs = 21"),
        ({"contexts": "a", "client_id": 3}, "client_id = 3"),
        ({"contexts": "\ud800"}, "not UTF-8"),
    ],
)
def test_bad_values_are_refused(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.score(**arguments)


@pytest.mark.parametrize("prompts", [(7, 8, 9), [IDS, LONG_IDS]])
def test_a_device_that_fails_while_scores_are_read_ends_their_texts(
    monkeypatch: pytest.MonkeyPatch, prompts: Any
) -> None:
    engine = quick_engine(random_model(CONFIGS["7"]))
    expected = engine.score(prompts)
    read = UnreadScores.read

    def fails(self: UnreadScores) -> Any:
        monkeypatch.setattr(UnreadScores, "read", read)
        raise OSError("the device is gone")

    monkeypatch.setattr(UnreadScores, "read", fails)
    with pytest.raises(OSError, match="the device is gone"):
        engine.score(prompts)
    assert engine.score(prompts) == expected
