"""The engine says what the model says: for every generation, prompt by prompt or in batches, guided, ranked, biased."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.engine.requests import Completion
from rwkv_jax.inference.engine.slot_arrays import SlotArrays
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import StateError
from rwkv_jax.models.decoding import unstacked
from tests.golden import QUICK
from tests.inference.models import (
    CONFIGS,
    GREEDY,
    VOCAB_SIZE,
    arrays,
    assert_same,
    log_softmax,
    prompts,
    quick_engine,
    random_model,
    what_was_read,
    whole_logits,
)
from tests.inference.operations import Operations

CONFIG = CONFIGS["7"]
PROMPTS = ("a", "def f(x):\n    return", "é日本", "one prompt that is longer than what is read of it at once")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return quick_engine(random_model(CONFIG))


@pytest.fixture(scope="module")
def forgetful() -> Engine:
    """Without a store of prefixes: what is read again is read."""
    return quick_engine(random_model(CONFIG), prefix_bytes=0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each call of the prefill program has read."""
    counts: list[int] = []
    prefill = SlotArrays.prefill

    def counted(self: SlotArrays, pieces: Any, *arguments: Any, **named: Any) -> None:
        counts.append(sum(size for _, size in pieces))
        prefill(self, pieces, *arguments, **named)

    monkeypatch.setattr(SlotArrays, "prefill", counted)
    return counts


def ids_of(engine: Engine, prompt: str) -> list[int]:
    return engine.encode(prompt, begins=True)


# The model's own words


@pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=() if name in ("4", "7") else pytest.mark.long) for name in CONFIGS]
)
def test_reading_and_writing_equal_one_parallel_pass(float64: None, generation: str) -> None:
    """Prompts in pieces, then bursts: states to the last bits of float64, seen in the logits of one token more."""
    config = dataclasses.replace(CONFIGS[generation], dtype="float64")
    # Pieces of two lengths are held against the parallel pass further below.
    engine = quick_engine(random_model(config), num_slots=1, prefix_bytes=0, prefill_length=8, short_prefill_length=8)
    ids = next(prompts(3, 1, 1)) + tuple(range(60, 99))
    completion = engine.generate(ids, max_tokens=11, sampling=GREEDY)
    text = ids + completion.ids
    expected = whole_logits(config, text)
    assert completion.ids == tuple(expected[len(ids) - 1 : -1].argmax(axis=-1).tolist())

    graphdef, params = nnx.split(engine.model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def one_more(params: Any, state: Any, token: Any) -> Any:
        rows = jax.tree.map(lambda x: x[None], state)
        return nnx.merge(graphdef, params)(token[None, None], rows)[0][0, 0]

    snapshot = None
    for start, end in ((0, 1), (1, 18), (18, 21), (21, len(ids)), (len(ids), len(text) - 1)):
        if end < len(text) - 1:
            snapshot = engine.prefill(snapshot, text[start:end])
        else:
            with engine.stream(
                "", state=snapshot, return_state=True, sampling=GREEDY, max_tokens=end - start
            ) as stream:
                list(stream)
            snapshot = stream.snapshot
        assert snapshot is not None
        assert snapshot.num_tokens == end
        # Logits are kept in float32, states in the model's own.
        np.testing.assert_allclose(snapshot.logits, expected[end - 1], rtol=1e-6, atol=1e-6)
        found = one_more(params, snapshot.state, np.int32(text[end]))
        np.testing.assert_allclose(found, expected[end], rtol=0, atol=1e-11)


@pytest.mark.long  # compiled as users do
@pytest.mark.parametrize("generation", CONFIGS)
def test_512_tokens_are_the_likeliest_of_one_parallel_pass(generation: str) -> None:
    config = CONFIGS[generation]
    options = EngineOptions(num_slots=1, prefill_length=64, short_prefill_length=8, prefix_bytes=0)
    engine = Engine(random_model(config), ByteTokenizer(VOCAB_SIZE), options)
    (ids,) = prompts(5, 1, 1)
    completion = engine.generate(ids, max_tokens=512, sampling=GREEDY, stop_ids=())
    text = ids + completion.ids
    expected = whole_logits(config, text, room=640, quick=False)
    assert completion.ids == tuple(expected[len(ids) - 1 : -1].argmax(axis=-1).tolist())
    assert len(completion.ids) == 512


@pytest.mark.parametrize(
    "generation", ["7", *(pytest.param(other, marks=pytest.mark.long) for other in ("4", "6", "transformer"))]
)
def test_layers_of_their_own_are_the_same_model(float64: None, generation: str) -> None:
    config = dataclasses.replace(CONFIGS[generation], dtype="float64")
    model = random_model(config)
    tokens = jnp.array([next(prompts(1, 1, 1)) * 3 + (4, 5, 6), (7, 8, 9, 7, 7, 9)], jnp.int32)

    def call(model: Any) -> Any:
        graphdef, params = nnx.split(model)

        def run(params: Any, tokens: Any) -> Any:
            model = nnx.merge(graphdef, params)
            first, state = model.residual_stream(tokens[:, :4])
            second, state = model.residual_stream(tokens[:, 4:], state)
            logits, state = model(tokens, state)
            return first, second, logits, state

        return jax.jit(run, compiler_options=QUICK)(params, tokens)

    *stacked, state = call(model)
    *own, states = call(unstacked(model))
    for x, y in zip(own, stacked, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)
    assert len(states) == 2
    for layer, own_state in enumerate(states):
        for x, y in zip(jax.tree.leaves(own_state), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(x, y[layer], rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match=r"^state: is none of .*model\.initial_state"):
        model.hidden(tokens, states)
    with pytest.raises(ValueError, match=r"^state: is none of .*model\.initial_state"):
        unstacked(model).hidden(tokens, state)
    assert unstacked(own_model := unstacked(model)) is own_model


# Prompts


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.5, top_p=0.9), SamplingParams.rwkv()])
def test_a_batch_of_ragged_prompts_is_each_alone(engine: Engine, sampling: SamplingParams) -> None:
    together = engine.generate(PROMPTS * 2, max_tokens=13, sampling=sampling, seed=range(8))
    for i, (prompt, found) in enumerate(zip(PROMPTS * 2, together, strict=True)):
        alone = engine.generate(prompt, max_tokens=13, sampling=sampling, seed=i)
        assert found.ids == alone.ids
        assert found.text == alone.text
        assert (found.index, found.num_prompt_tokens) == (i, len(ids_of(engine, prompt)))
        np.testing.assert_allclose(found.logprobs, alone.logprobs, rtol=0, atol=1e-4)


def test_few_prompts_do_not_have_all_slots_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an engine with more slots than one call reads of: some together, then the last few one by one."""
    wide = quick_engine(random_model(CONFIG), num_slots=10, batch_sizes=(10,), prefix_bytes=0)
    shapes: list[tuple[bool, int]] = []
    prefill = SlotArrays.prefill

    def recorded(self: SlotArrays, pieces: Any, length: int, *, alone: bool, wants_logits: bool) -> None:
        shapes.append((alone, length))
        prefill(self, pieces, length, alone=alone, wants_logits=wants_logits)

    monkeypatch.setattr(SlotArrays, "prefill", recorded)
    texts = list(prompts(11, 12, 12))
    together = wide.generate(texts, max_tokens=5, sampling=GREEDY)
    assert set(shapes) == {(False, 4), (True, 4)}
    for ids, found in zip(texts, together, strict=True):
        assert found.ids == engine.generate(ids, max_tokens=5, sampling=GREEDY).ids


def test_a_text_begins_with_the_end_of_one_and_ids_are_taken_as_they_are(engine: Engine) -> None:
    as_ids = [[0, *prompt.encode()] for prompt in PROMPTS]
    found = engine.generate(PROMPTS, max_tokens=5, sampling=GREEDY)
    as_arrays: Any = [np.array(ids) for ids in as_ids]
    for same in (as_ids, as_arrays):
        assert [each.ids for each in engine.generate(same, max_tokens=5, sampling=GREEDY)] == [x.ids for x in found]
    one = engine.generate(as_arrays[1], max_tokens=5, sampling=GREEDY)
    assert isinstance(one, Completion)
    assert one.ids == found[1].ids
    without = engine.generate(as_ids[1][1:], max_tokens=5, sampling=GREEDY)
    assert without.num_prompt_tokens == len(as_ids[1]) - 1


def test_nothing_may_be_asked_for(engine: Engine) -> None:
    """The prompt is read then, and its end reported."""
    completion = engine.generate("abc", max_tokens=0)
    assert (completion.text, completion.ids, completion.finish_reason) == ("", (), "length")
    stream = engine.stream("abc", max_tokens=0, return_state=True)
    assert [chunk.finish_reason for chunk in stream] == ["length"]
    assert_same(stream.snapshot, engine.prefill(None, "abc"))


def test_a_state_of_another_model_is_refused(engine: Engine) -> None:
    own = engine.prefill(None, "a")
    other = quick_engine(random_model(CONFIGS["4"])).prefill(None, "a")
    strangers = (
        dataclasses.replace(own, state=other.state),
        dataclasses.replace(own, state=own.state[:1]),
        dataclasses.replace(own, logits=own.logits[:-1]),
        dataclasses.replace(own, owner="another"),
    )
    for stranger in strangers:
        with pytest.raises(StateError, match=r"^state: is of another model than this RWKV-7 of 2 x 16"):
            engine.stream("a", state=stranger)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer: it has 257 tokens where the model has 256"):
        Engine(random_model(CONFIG), ByteTokenizer(257))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots = 0: must be a whole number, not less than 1"),
        ({"max_queue": 0}, "max_queue = 0: must be a whole number, not less than 1"),
        ({"short_prefill_length": 600}, "short_prefill_length = 600: must not exceed prefill_length = 512"),
        ({"batch_sizes": (1, 2)}, r"batch_sizes = \(1, 2\): must have num_slots = 8, too"),
        ({"batch_sizes": (0, 8)}, "batch_sizes = 0: must be a whole number, from 1 to 8"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        EngineOptions(**options)


def test_a_transformer_has_no_more_room_than_its_state() -> None:
    config: ModelConfig = dataclasses.replace(CONFIGS["transformer"], context_length=24)
    engine = quick_engine(random_model(config), num_slots=1)
    with pytest.raises(ConfigError, match=r"^max_tokens = 5 after 20 tokens: this model's state holds 24; ask for"):
        engine.stream(range(1, 21), max_tokens=5)


# What is chosen


def test_logprobs_and_top_logprobs_are_the_models(engine: Engine) -> None:
    ids = ids_of(engine, PROMPTS[1])
    found = engine.generate(PROMPTS[1], max_tokens=9, seed=4, top_logprobs=5)
    values = log_softmax(whole_logits(CONFIG, ids + list(found.ids)))[len(ids) - 1 : -1]
    np.testing.assert_allclose(found.logprobs, values[np.arange(len(found.ids)), list(found.ids)], rtol=0, atol=1e-4)
    for top, expected in zip(found.top_logprobs, values, strict=True):
        likeliest = np.argsort(-expected, kind="stable")[:5]
        assert [token for token, _ in top] == likeliest.tolist()
        np.testing.assert_allclose([value for _, value in top], expected[likeliest], rtol=0, atol=1e-4)
    without = engine.generate(PROMPTS[1], max_tokens=9, seed=4)
    assert (without.ids, without.top_logprobs) == (found.ids, ())


def test_the_best_of_several_has_the_greatest_mean_log_probability(engine: Engine, reads: list[int]) -> None:
    prompt = "a prompt of nobody else, read once"
    hot = SamplingParams(temperature=2.0)
    best = engine.generate([prompt, "b"], best_of=3, max_tokens=8, sampling=hot, seed=7)
    assert sum(reads) == len(ids_of(engine, prompt)) + 3 * len(ids_of(engine, "b"))  # that one is too short to keep
    for i, each in enumerate((prompt, "b")):
        seeds = range(7 + 3 * i, 10 + 3 * i)
        single = [engine.generate(each, max_tokens=8, sampling=hot, seed=seed) for seed in seeds]
        assert len({one.ids for one in single}) == 3
        expected = max(single, key=lambda one: float(np.mean(one.logprobs)))
        assert (best[i].ids, best[i].index) == (expected.ids, i)


def test_guidance_steers_away_from_another_text(engine: Engine) -> None:
    prompt, unguided, factor = "the good", "bad, bad", 2.5
    found = engine.generate(
        prompt, max_tokens=8, sampling=GREEDY, guidance_scale=factor, negative_prompt=unguided, top_logprobs=3
    )
    own, other = ids_of(engine, prompt), ids_of(engine, unguided)
    for token, value, top in zip(found.ids, found.logprobs, found.top_logprobs, strict=True):
        logits, away = (whole_logits(CONFIG, ids)[-1].astype(np.float64) for ids in (own, other))
        steered = factor * logits + (1 - factor) * away
        assert token == steered.argmax() == top[0][0]
        np.testing.assert_allclose(value, log_softmax(steered)[token], rtol=0, atol=1e-3)
        own, other = [*own, token], [*other, token]
    plain = engine.generate(prompt, max_tokens=8, sampling=GREEDY)
    assert plain.ids != found.ids
    together = engine.generate(
        [prompt, prompt], max_tokens=8, sampling=GREEDY, guidance_scale=factor, negative_prompt=unguided
    )
    assert [each.ids for each in together] == [found.ids] * 2


def test_biases_and_bans_of_a_row_are_its_own(engine: Engine) -> None:
    plain = engine.generate("a", max_tokens=6, sampling=GREEDY)
    samplings = [
        SamplingParams.greedy(logit_bias={65: 1e4}),
        SamplingParams.greedy(banned=tuple(set(range(VOCAB_SIZE)) - {66, 67})),
        GREEDY,
        SamplingParams(banned=(plain.ids[0],), temperature=0.0),
    ]
    found = engine.generate(["a"] * 4, max_tokens=6, sampling=samplings)
    assert found[0].text == "AAAAAA"
    assert set(found[1].text) <= {"B", "C"}
    assert found[2].ids == plain.ids
    assert plain.ids[0] not in found[3].ids


def test_a_seed_says_what_is_drawn(engine: Engine) -> None:
    first = engine.generate(["a", "a", "a"], max_tokens=8, seed=5)
    assert [each.ids for each in first] == [engine.generate("a", max_tokens=8, seed=5 + i).ids for i in range(3)]
    assert len({each.ids for each in first}) == 3
    same = engine.generate(["a", "a"], max_tokens=8, seed=[6, 6])
    assert same[0].ids == same[1].ids == first[1].ids
    assert engine.generate("a", max_tokens=8, seed=np.int64(6)).ids  # pyright: ignore[reportCallIssue, reportArgumentType] == first[1].ids


def test_a_text_does_not_depend_on_where_bursts_end(engine: Engine) -> None:
    """Going on from its own state a text draws what it would have drawn."""
    whole = engine.generate("a", max_tokens=11, seed=3, stop_ids=())
    snapshot, ids = engine.prefill(None, "a"), ()
    for count in (1, 5, 2, 3):
        stream = engine.stream("", state=snapshot, return_state=True, max_tokens=count, seed=3, stop_ids=())
        ids += what_was_read(list(stream))
        snapshot = stream.snapshot
    assert ids == whole.ids


# Prompts that begin alike


def test_a_shared_beginning_is_read_once(engine: Engine, forgetful: Engine, reads: list[int]) -> None:
    beginning = "what all of these prompts begin with, "
    expected = [forgetful.generate(beginning + end, max_tokens=7, sampling=GREEDY).ids for end in "xyz"]
    reads.clear()

    engine.prefill(None, beginning)
    assert sum(reads) == len(ids_of(engine, beginning))
    for end, ids in zip("xyz", expected, strict=True):
        reads.clear()
        assert engine.generate(beginning + end, max_tokens=7, sampling=GREEDY).ids == ids
        assert sum(reads) == 1
    reads.clear()
    assert engine.generate(beginning + "x", max_tokens=7, sampling=GREEDY).ids == expected[0]
    assert sum(reads) == 0


def test_prompts_that_part_leave_the_state_where_they_do(engine: Engine, forgetful: Engine, reads: list[int]) -> None:
    """The first two read all of their prompts, the second keeping what they share; the third reads its own end."""
    shared = list(range(60, 130))
    for i, end in enumerate(([200] * 9, [201] * 9, [202] * 9)):
        reads.clear()
        found = engine.generate([*shared, *end], max_tokens=5, sampling=GREEDY)
        assert sum(reads) == (len(end) if i == 2 else len(shared) + len(end))
        assert found.ids == forgetful.generate([*shared, *end], max_tokens=5, sampling=GREEDY).ids


def test_equal_prompts_that_come_together_are_read_once(engine: Engine, reads: list[int]) -> None:
    prompt = "six equal prompts, which come together"
    found = engine.generate([prompt] * 6 + [prompt + "!"], max_tokens=5, sampling=GREEDY)
    assert sum(reads) == len(ids_of(engine, prompt)) + 1
    assert len({each.ids for each in found[:6]}) == 1


def test_the_end_of_a_prompt_is_read_by_pieces_of_every_kind(engine: Engine) -> None:
    """Lengths around those of the pieces, whose states are the same."""
    text = next(iter(prompts(9, 1, 1))) + tuple(range(1, 70))
    for length in (1, 3, 4, 5, 15, 16, 17, 20, 32, 33, 36, 37, 48):
        expected = whole_logits(CONFIG, text[:length])[-1]
        np.testing.assert_allclose(engine.prefill(None, text[:length]).logits, expected, rtol=0, atol=1e-4)


# Conversations


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.long)])
def test_random_operations_on_sessions_equal_plain_runs(forgetful: Engine, tmp_path: Path, count: int) -> None:
    counts = Operations(forgetful, VOCAB_SIZE, tmp_path, seed=count, same=assert_same).run(count)
    assert len(counts) == 11


def test_named_conversations_go_on(engine: Engine) -> None:
    first = engine.generate("Hello.", conversation="x", max_tokens=5, sampling=GREEDY)
    engine.generate("Another.", conversation="y", max_tokens=5, sampling=GREEDY)
    second = engine.generate(" And?", conversation="x", max_tokens=5, sampling=GREEDY)
    ids = (*ids_of(engine, "Hello."), *what_was_read(first), *b" And?")
    assert second.ids == engine.generate(ids, max_tokens=5, sampling=GREEDY).ids
    assert engine.conversation("x").num_tokens == len(ids) + len(what_was_read(second))
    with pytest.raises(ConfigError, match=r"^conversation = 'x': continues with one prompt and one continuation"):
        engine.generate(["a", "b"], conversation="x")  # pyright: ignore[reportArgumentType]


def test_bytes_of_a_conversation_count_however_it_goes_on(engine: Engine) -> None:
    before = engine.sessions.nbytes
    list(engine.conversation("streamed").stream("Hello.", max_tokens=3))
    size = engine.sessions.nbytes - before
    assert size == engine.conversation("streamed").nbytes > 0
    engine.conversation("streamed").mark("here")
    engine.conversation("streamed").append("More.")
    assert engine.sessions.nbytes - before == engine.conversation("streamed").nbytes == 2 * size
    engine.sessions.pop("streamed")


def test_conversations_have_so_many_bytes_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(x.nbytes for x in arrays(engine.prefill(None, "a")))
    monkeypatch.setattr(engine, "sessions", type(engine.sessions)(5 * size // 2))
    for name in "abc":
        engine.generate("Hello", conversation=name, max_tokens=1)
    assert len(engine.sessions) == 2
    assert engine.sessions.nbytes == 2 * size
    assert engine.conversation("a").num_tokens == 0
    assert engine.conversation("c").num_tokens == 7
