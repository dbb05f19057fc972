"""Encoder-decoder: streaming against parallel, masks, decoding against exhaustive search, data, and a short run."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.applications.seq2seq import data
from rwkv_jax.applications.seq2seq import model as seq2seq_model
from rwkv_jax.applications.seq2seq.config import ALPHABET, END, FIRST, NUM_SYMBOLS, START, Seq2Seq, Seq2SeqConfig
from rwkv_jax.applications.seq2seq.decode import Beams, beam_search, greedy, length_penalty
from rwkv_jax.applications.seq2seq.model import Seq2SeqModel
from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    StepConfig,
)
from rwkv_jax.run_folder import identity
from rwkv_jax.training.application import Forward, load_application
from rwkv_jax.training.loop import train

FORMS = ("state_and_attention", "decoder_only")
"""Of which the first has all that state and attention have."""
TINY: dict[str, Any] = {"vocab_size": NUM_SYMBOLS, "num_layers": 2, "width": 16, "head_dim": 8}


def config(run_dir: str = "unused", *, model: dict[str, Any] | None = None, **own: Any) -> Seq2SeqConfig:
    settings = Seq2Seq(**{"task": "reversal", "min_symbols": 2, "max_symbols": 5, "num_examples": 64} | own)
    return Seq2SeqConfig(
        run_dir=run_dir,
        model=ModelConfig(**TINY | (model or {})),
        seq2seq=settings,
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-3, warmup_steps=2),
        training=StepConfig(batch_size=16, sequence_length=sum(settings.sizes), num_steps=6),
        evaluation=EvaluationConfig(every=3, batches=1, sample_prompts=()),
        checkpoint=CheckpointConfig(every=3),
        logging=LoggingConfig(every=1),
    )


def model_with_params(own: Seq2SeqConfig) -> Seq2SeqModel:
    """A model all of whose parameters say something."""
    application, draws = own.load_application(), np.random.default_rng(1)
    shapes = application.abstract[1]
    return application.model(jax.tree.map(lambda x: jnp.asarray(0.4 * draws.normal(size=x.shape), x.dtype), shapes))


read = nnx.jit(Seq2SeqModel.read)
write = nnx.jit(Seq2SeqModel.write)
losses = nnx.jit(lambda model, rows: model.losses(rows, Forward()))
forced = nnx.jit(lambda model, tokens: model.decoder(tokens).logits)
decode = nnx.jit(Seq2SeqModel.decode, static_argnames=("beam_size", "alpha"))


def batch(own: Seq2SeqConfig, count: int = 4) -> data.Batch:
    return jax.tree.map(lambda x: x[:count], data.examples(own.seq2seq, 0)[0].arrays)


@pytest.fixture(scope="module", params=[FORMS[0], pytest.param(FORMS[1], marks=pytest.mark.long)])
def made(request: pytest.FixtureRequest) -> tuple[Seq2SeqConfig, Seq2SeqModel, data.Batch]:
    own = config(form=request.param)
    return own, model_with_params(own), batch(own)


def target_inputs(rows: data.Batch) -> Any:
    return np.concatenate([np.full_like(rows.target[:, :1], START), rows.target[:, :-1]], axis=1)


Made = tuple[Seq2SeqConfig, Seq2SeqModel, data.Batch]


def test_one_token_at_a_time_is_the_whole_target_at_once(made: Made) -> None:
    _, model, rows = made
    tokens = target_inputs(rows)
    known = read(model, rows.source, rows.source_length)
    whole, _ = write(model, jnp.asarray(tokens), known)
    for at in range(tokens.shape[1]):
        logits, known = write(model, tokens[:, at : at + 1], known)
        np.testing.assert_allclose(logits[:, 0], whole[:, at], atol=2e-5)


def test_greedy_decoding_is_right_where_the_forced_one_is(made: Made) -> None:
    """The likeliest token after each right one is right if and only if decoding by itself is."""
    _, model, rows = made
    found = np.asarray(decode(model, rows.source, rows.source_length))
    ends = np.argmax(np.concatenate([found == END, np.ones_like(found[:, :1], bool)], axis=1), axis=1)
    lengths = np.minimum(ends + 1, found.shape[1])
    rows = rows._replace(target=found, target_length=lengths)
    # Where the beginning is never likeliest, which is no token of a target.
    logits, _ = write(model, jnp.asarray(target_inputs(rows)), read(model, rows.source, rows.source_length))
    allowed = np.asarray(logits).copy()
    allowed[..., START] = -np.inf
    counts = np.arange(found.shape[1]) < lengths[:, None]
    np.testing.assert_array_equal(np.where(counts, allowed.argmax(-1), 0), found)


def test_padding_and_other_rows_change_nothing(made: Made) -> None:
    _, model, rows = made
    expected = losses(model, rows)
    assert len(np.unique(np.asarray(expected.loss))) == len(expected.loss)  # sources differ, and are read
    padded = np.arange(rows.source.shape[1])[None] >= rows.source_length[:, None]
    unread = np.arange(rows.target.shape[1])[None] >= rows.target_length[:, None]
    assert padded.any()
    other = rows._replace(source=np.where(padded, 7, rows.source), target=np.where(unread, 9, rows.target))
    found = losses(model, other)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
    one = losses(model, jax.tree.map(lambda x: x[1:2], rows))
    np.testing.assert_allclose(one.loss[0], expected.loss[1], rtol=1e-5)
    changed = losses(model, rows._replace(source=np.where(padded, rows.source, 8)))
    assert np.all(np.abs(changed.loss - expected.loss) > 1e-6)


def test_no_token_sees_later_ones(made: Made) -> None:
    _, model, rows = made
    tokens = jnp.asarray(target_inputs(rows))
    known = read(model, rows.source, rows.source_length)
    expected, _ = write(model, tokens, known)
    found, _ = write(model, tokens.at[:, 2].set(11), known)
    np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=1e-6)
    assert np.all(np.max(np.abs(found[:, 2:] - expected[:, 2:]), axis=(1, 2)) > 1e-4)


def test_decoder_only_is_one_row_of_source_and_target() -> None:
    own = config(form="decoder_only")
    model, rows = model_with_params(own), batch(own, 1)
    found, _ = write(model, jnp.asarray(target_inputs(rows)), read(model, rows.source, rows.source_length))
    for row, length in enumerate(rows.source_length):
        whole = np.concatenate([rows.source[row, :length], target_inputs(rows)[row]])
        logits = forced(model, whole[None])
        np.testing.assert_allclose(logits[0, length:], found[row], atol=2e-5)


def test_the_state_is_joined_by_layer_and_head() -> None:
    own = config(form="state", shared_embedding=False)
    model, rows = model_with_params(own), batch(own)
    encode = nnx.jit(lambda model, rows: model.encoder.hidden(rows.source, lengths=rows.source_length))
    encoded = encode(model, rows).state
    known = read(model, rows.source, rows.source_length)
    f, b = (np.asarray(gain[...]) for gain in (model.hand_over.forward, model.hand_over.backward))
    for layer, head in itertools.product(range(2), range(2)):
        expected = f[layer, head] * encoded.forward.wkv[layer, :, head]
        expected += b[layer, head] * encoded.backward.wkv[layer, :, head]
        np.testing.assert_allclose(known.state.wkv[layer, :, head], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(known.state.att_shift)
    assert not np.any(known.state.ffn_shift)


# Decoding, of made-up distributions: what follows depends on all tokens before.


def table(rows: int, vocab_size: int, limit: int) -> np.ndarray:
    """Log-probabilities by row and by what came before, as a number in base V."""
    draws = np.random.default_rng(5).normal(size=(rows, vocab_size**limit, vocab_size)) * 2
    return np.asarray(jax.nn.log_softmax(draws))


def step_of(values: np.ndarray, repeats: int) -> Any:
    """A step whose state is the row and what came before, [1, R] each."""
    vocab_size = values.shape[-1]

    def step(tokens: Any, state: Any) -> Any:
        row, before = state["row"][0], state["before"][0] * vocab_size + tokens
        return jnp.asarray(values)[row, before], {"row": state["row"], "before": before[None]}

    return step


def exhaustive(values: np.ndarray, row: int, limit: int, alpha: float) -> list[tuple[float, tuple[int, ...]]]:
    vocab_size, found = values.shape[-1], []
    letters = range(FIRST, vocab_size)
    for length in range(1, limit + 1):
        for text in itertools.product(letters, repeat=length - 1):
            log_p, before = 0.0, 0
            for last, token in itertools.pairwise((START, *text, END)):
                before = before * vocab_size + last
                log_p += values[row, before, token]
            padded = (*text, *(END,) * (limit - len(text)))
            found.append((log_p / ((5 + length) / 6) ** alpha, padded))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_a_wide_beam_finds_what_exhaustive_search_does(alpha: float) -> None:
    rows, vocab_size, limit, beam_size = 3, 4, 4, 8  # 2^3 texts go on before the last step
    values = table(rows, vocab_size, limit)
    state = {"row": jnp.arange(rows)[None], "before": jnp.zeros((1, rows), jnp.int32)}

    @jax.jit
    def search(state: Any) -> Any:
        step = step_of(values, beam_size)
        return beam_search(step, state, batch_size=rows, limit=limit, beam_size=beam_size, alpha=alpha)

    found = search(state)
    for row in range(rows):
        expected = exhaustive(values, row, limit, alpha)[:beam_size]
        assert [tuple(text) for text in np.asarray(found.tokens[row]).tolist()] == [text for _, text in expected]
        np.testing.assert_allclose(found.worth[row], [worth for worth, _ in expected], rtol=1e-5)


def test_a_narrow_beam_is_no_better_and_greedy_takes_the_likeliest() -> None:
    rows, vocab_size, limit = 3, 4, 4
    values = table(rows, vocab_size, limit)
    state = {"row": jnp.arange(rows)[None], "before": jnp.zeros((1, rows), jnp.int32)}
    narrow = beam_search(step_of(values, 2), state, batch_size=rows, limit=limit, beam_size=2, alpha=0.6)
    found = np.asarray(greedy(step_of(values, 1), state, batch_size=rows, limit=limit))
    for row in range(rows):
        assert narrow.worth[row, 0] <= exhaustive(values, row, limit, 0.6)[0][0] + 1e-5
        before, last, ended = 0, START, False
        for at in range(limit):
            before = before * vocab_size + last
            allowed = values[row, before].copy()
            allowed[START] = -np.inf
            last = END if ended else int(allowed.argmax())
            ended |= last == END
            assert found[row, at] == last


def test_length_penalty() -> None:
    assert length_penalty(1, 0.7) == 1
    assert length_penalty(7, 1.0) == 2
    assert length_penalty(9, 0.0) == 1


def test_beam_search_of_a_model_is_worth_what_the_model_gives_each_text(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher-forced, which is so if each hypothesis goes on with its own state and source."""
    _, model, rows = made
    beams: list[Beams] = []

    def kept(*args: Any, **options: Any) -> Beams:
        beams.append(beam_search(*args, **options))
        return beams[-1]

    monkeypatch.setattr(seq2seq_model, "beam_search", kept)

    @nnx.jit
    def search(model: Any, rows: data.Batch) -> tuple[Any, Beams]:
        found = model.decode(rows.source, rows.source_length, beam_size=4, alpha=3.0)
        return found, beams[-1]

    best, found = search(model, rows)
    np.testing.assert_array_equal(best, found.tokens[:, 0])
    tokens = np.asarray(found.tokens)
    assert np.argmax(tokens == END, axis=2).max() > 2  # some are long
    for rank in range(4):
        lengths = np.argmax(tokens[:, rank] == END, axis=1) + 1
        scored = losses(model, rows._replace(target=tokens[:, rank], target_length=lengths))
        expected = -np.asarray(scored.loss) * lengths / length_penalty(lengths, 3.0)
        np.testing.assert_allclose(found.worth[:, rank], expected, rtol=1e-4)


# Data.


def test_rules() -> None:
    assert data.transliterate("gentschosse") == "jentxos"
    assert data.transliterate("basacanpy") == "bazakampi"
    assert data.in_words(90742) == "ninety thousand seven hundred forty-two"
    assert data.in_words(0) == "zero"
    ids, lengths = data.encode(["ab", "c"], 4, has_end=True)
    assert lengths.tolist() == [3, 2]
    assert [data.decode(row) for row in ids] == ["ab", "c"]
    with pytest.raises(ConfigError, match="has \\['A'\\]"):
        data.encode(["A"], 4)
    with pytest.raises(ConfigError, match="must have 1 to 3"):
        data.encode(["abcd"], 4, has_end=True)


@pytest.mark.parametrize("task", data.TASKS)
def test_held_out_targets_are_not_trained_on(task: Any) -> None:
    settings = Seq2Seq(task=task, num_examples=2000, num_held_out=100)
    training, held_out = ({data.decode(row) for row in part.arrays.target} for part in data.examples(settings, seed=3))
    assert len(held_out) == 100
    assert not training & held_out
    again = data.examples(settings, seed=3)[0]
    assert again.fingerprint() == data.examples(settings, seed=3)[0].fingerprint()


def test_all_short_numbers_are_trained_on() -> None:
    settings = Seq2Seq(task="number_words", num_examples=5000, num_held_out=512)
    training, held_out = ({data.decode(row) for row in part.arrays.target} for part in data.examples(settings, seed=0))
    assert {str(number) for number in range(100)} <= training
    assert {len(target) for target in held_out} == {3, 4, 5}


def test_too_few_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_held_out = 50: reversal has too few different targets"):
        data.examples(Seq2Seq(task="reversal", min_symbols=1, max_symbols=1, num_held_out=50), 0)
    with pytest.raises(ConfigError, match="leaves nothing of reversal to train on"):
        data.examples(Seq2Seq(task="reversal", min_symbols=1, max_symbols=1, num_held_out=10), 0)


# Runs.


def test_a_run_learns_decodes_and_is_loaded(tmp_path: Path) -> None:
    own = config(str(tmp_path / "run"), form="state", num_held_out=20)
    result = train(own)
    assert result.measured is not None
    assert result.measured.metrics.keys() == {"token_accuracy", "forced_match", "exact_match"}
    assert result.measured.loss < np.log(NUM_SYMBOLS)
    application, model = load_application(str(tmp_path / "run"))
    _, held_out = application.examples(print)
    assert held_out is not None
    expected = losses(model, held_out.arrays)
    assert result.measured.loss == pytest.approx(float(np.mean(expected.loss)), rel=1e-4)
    right = float(np.mean(expected.metrics["token_accuracy"]))
    assert result.measured.metrics["token_accuracy"] == pytest.approx(right, rel=1e-4)
    assert right > 0


@pytest.mark.parametrize("count", [None, 19, 32])
def test_exact_match_counts_each_source_once(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With batches that do not divide them, and of which the last row, which fills the last batch, is right."""
    own = config(num_held_out=37)
    application = own.load_application()
    _, held_out = application.examples(print)
    assert held_out is not None
    is_right = np.isin(np.arange(37), (0, 3, 16, 18, 19, 33, 36))
    rows = held_out.arrays
    known = {one.tobytes(): i for i, one in enumerate(rows.source)}

    def fake(params: Any, source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        del params, lengths
        texts = []
        for one in source:
            row = known[one.tobytes()]
            text = rows.target[row]
            texts.append(text if is_right[row] else np.where(np.arange(len(text)) == 1, text + 1, text))
        return np.stack(texts)

    monkeypatch.setattr(type(application), "decode", staticmethod(fake))
    total = count or 37
    assert application.measure(None, held_out, count) == {"exact_match": is_right[:total].sum() / total}


TRANSFORMER = {"architecture": "transformer", "context_length": 11}


@pytest.mark.parametrize(
    "model", [TRANSFORMER, pytest.param({"generation": "7a", "width": 64, "head_dim": 64}, marks=pytest.mark.long)]
)
def test_decoder_only_takes_models_that_cannot_read_from_both_ends(model: dict[str, Any]) -> None:
    """A target token by token, after a source with padding, is what the row of both at once has."""
    own = config(form="decoder_only", model=model)
    application = own.load_application()
    assert application.stacks.keys() == {"decoder"}
    decoder, rows = model_with_params(own), batch(own)
    assert (rows.source_length < rows.source.shape[1]).any()
    known, tokens = read(decoder, rows.source, rows.source_length), target_inputs(rows)
    for at in range(tokens.shape[1]):
        logits, known = write(decoder, tokens[:, at : at + 1], known)
        for row, length in enumerate(rows.source_length):
            whole = np.concatenate([rows.source[row, :length], tokens[row], np.zeros(11, np.int32)])[:11]
            expected = forced(decoder, whole[None])[0, length + at]
            np.testing.assert_allclose(logits[row, 0], expected, rtol=1e-3, atol=1e-3)
    assert decode(decoder, rows.source, rows.source_length, beam_size=2).shape == rows.target.shape
    with pytest.raises(ConfigError, match=r"take 4, 5\.2, 6 or 7"):
        config(form="attention", model=model).load_application()


def test_a_run_folders_tokenizer_has_the_ids_of_the_data() -> None:
    tokenizer = config().load_application().tokenizer
    ids, _ = data.encode([ALPHABET], len(ALPHABET) + 1, has_end=True)
    assert tokenizer.encode(" ".join(ALPHABET.replace(" ", "_"))) == ids[0, :-1].tolist()
    assert (tokenizer.end_of_text, *tokenizer.encode("<start>")) == (END, START)
    assert tokenizer.vocab_size == NUM_SYMBOLS


def test_how_held_out_sources_are_decoded_is_no_other_run() -> None:
    own, other = config(beam_size=1), config(beam_size=4, length_penalty=1.0)
    assert identity(own, "", "") == identity(other, "", "")
    assert identity(own, "", "") != identity(config(max_symbols=6), "", "")


def test_what_cannot_work_is_refused() -> None:
    own = config()
    with pytest.raises(ConfigError, match=r"training.sequence_length = 12: must be 11"):
        dataclasses.replace(own, training=dataclasses.replace(own.training, sequence_length=12))
    with pytest.raises(ConfigError, match=f"model.vocab_size = 9: must be at least {NUM_SYMBOLS}"):
        config(model={"vocab_size": 9})
    with pytest.raises(ConfigError, match=r"parallel.tensor = 2: seq2seq cannot split heads"):
        dataclasses.replace(own, parallel=ParallelConfig(tensor=2))
    with pytest.raises(ConfigError, match=r"seq2seq.max_symbols = 3: must be at least min_symbols, 4"):
        Seq2Seq(min_symbols=4, max_symbols=3)
    with pytest.raises(ConfigError, match=r"seq2seq.length_penalty = -1"):
        Seq2Seq(length_penalty=-1)
    with pytest.raises(ConfigError, match=r"seq2seq.max_symbols = 5: dates does not read it; leave it out"):
        Seq2Seq(max_symbols=5)
    with pytest.raises(ConfigError, match=r"seq2seq.min_symbols = 2: transliteration does not read it"):
        Seq2Seq(task="transliteration", min_symbols=2)
    with pytest.raises(ConfigError, match=r"shared_embedding = False: decoder_only has no encoder; leave it out"):
        Seq2Seq(form="decoder_only", shared_embedding=False)
    with pytest.raises(ConfigError, match="form = 'state': RWKV-4's state is no matrix a head"):
        config(model={"generation": "4"}).load_application()
