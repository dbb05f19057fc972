"""Recognizing words in sound: what is made, the loss by enumeration, listening frame by frame, a run of tones."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.applications.audio import data
from rwkv_jax.applications.audio.config import Audio, AudioConfig
from rwkv_jax.applications.audio.data import HOP, MELS, RATE, AudioBatch, draw_examples, frames_of, mel_filters
from rwkv_jax.applications.audio.model import AudioApplication, Listener, Recognizer, collapsed, edit_distance
from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
)
from rwkv_jax.training.application import Forward, load_application
from rwkv_jax.training.loop import train

TONES = Audio(words="tones", max_words=2, num_examples=24, num_held_out=8)


def config_of(audio: Audio = TONES, **changes: Any) -> AudioConfig:
    options: dict[str, Any] = {
        "model": ModelConfig(vocab_size=16, num_layers=2, width=32, head_dim=16),
        "audio": audio,
        "optimizer": OptimizerConfig(warmup_steps=1),
        "training": StepConfig(batch_size=8, sequence_length=70, num_steps=2),
        "evaluation": EvaluationConfig(every=2, batches=1, sample_prompts=()),
        "checkpoint": CheckpointConfig(every=2),
        "logging": LoggingConfig(every=1),
    }
    return AudioConfig(**options | changes)


def recognizer(audio: Audio = TONES) -> Recognizer:
    """With no zeros among its parameters."""
    graphdef, params = nnx.split(Recognizer(config_of(audio), nnx.Rngs(0)), nnx.Param)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params))


FRAMES = np.random.default_rng(0).normal(size=(2, 12, MELS)).astype(np.float32)


def test_a_frame_ends_where_it_is_heard() -> None:
    sound = np.random.default_rng(0).normal(size=10 * HOP + 30)
    for frontend in ("log_mel", "raw"):
        whole, changed = frames_of(sound, frontend), sound.copy()
        assert whole.shape == (10, data.num_features(frontend))
        changed[4 * HOP :] += 1
        np.testing.assert_array_equal(frames_of(changed, frontend)[:4], whole[:4])
        assert np.all(np.any(frames_of(changed, frontend)[4:] != whole[4:], axis=1))


def test_mel_energies_are_where_the_tone_is() -> None:
    lowest, highest = (2595 * np.log10(1 + frequency / 700) for frequency in (50, 4000))
    centers = 700 * (10 ** (np.linspace(lowest, highest, MELS + 2) / 2595) - 1)
    for frequency in (300, 1000, 2500):
        found = frames_of(np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE), "log_mel")[20]
        assert abs(centers[1 + np.argmax(found)] - frequency) < 0.1 * frequency
    assert np.all(mel_filters() >= 0)


def test_noise_has_the_power_asked_for() -> None:
    clip = np.sin(np.arange(4000))
    for snr in (0.0, 20.0):
        clean, noisy = (data.utterance([clip], ratio, np.random.default_rng(3)) for ratio in (300.0, snr))
        scale = np.dot(clean, noisy) / np.dot(clean, clean)
        noise = noisy - scale * clean
        assert 10 * np.log10(np.mean((scale * clean) ** 2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.6)


def test_utterances_are_the_same_every_time_and_fit() -> None:
    first, again = (draw_examples(TONES, 70, held_out=False) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != draw_examples(TONES, 70, held_out=True).fingerprint()
    frames, num_frames, labels, _ = first.arrays
    assert np.max(num_frames) <= 70
    assert np.min(labels[:, 0]) >= 1
    assert not any(np.any(frames[row, num_frames[row] :]) for row in range(len(frames)))
    with pytest.raises(ConfigError, match=r"training.sequence_length = 10: a word has \d+ frames"):
        draw_examples(TONES, 10, held_out=False)


def test_utterances_are_varied_within_their_length() -> None:
    frames = np.random.default_rng(0).normal(size=(9, MELS)).astype(np.float32)
    frames[7:] = 0
    row = AudioBatch(frames.copy(), np.int32(7), np.array([1], np.int32), np.float32(1))
    varied = [data.vary(row, np.random.default_rng(seed)).frames for seed in range(40)]
    np.testing.assert_array_equal(row.frames, frames)
    assert not any(np.any(each[7:]) for each in varied)
    same = [np.sum(np.all(each[:7] == frames[:7], axis=0)) for each in varied]
    assert any(0 < count < MELS for count in same), "bands at their mean"
    assert any(np.array_equal(each[:7, 12:14], frames[:7, 14:16]) for each in varied), "higher"
    assert len({each.tobytes() for each in varied}) > 30


def test_without_espeak_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"audio.words = 'digits': .*apt install espeak-ng"):
        data.speak("one", "en-us+m1", 150, 51)


def test_voices_held_out_are_no_voices_trained_on() -> None:
    assert not set(data.VOICES[False]) & set(data.VOICES[True])


def test_the_loss_sums_over_all_ways_to_say_the_words() -> None:
    """-log of the sum over all 9^4 paths of frames that collapse to the words, a word."""
    model = recognizer()
    labels = np.array([[3, 3], [5, 0]], np.int32)
    batch = AudioBatch(FRAMES[:, :5], np.array([5, 4], np.int32), labels, np.ones(2, np.float32))
    found = model.losses(batch, Forward()).loss
    log_p = np.asarray(jax.nn.log_softmax(model(jnp.asarray(FRAMES[:, :5]), lengths=batch.num_frames)[0]))
    for row, (words, count) in enumerate((([3, 3], 5), ([5], 4))):
        total = -np.inf
        for path in itertools.product(sorted({0, *words}), repeat=count):
            said = [word for word, before in zip(path, (0, *path), strict=False) if word not in (before, 0)]
            if said == words:
                total = np.logaddexp(total, sum(log_p[row, at, word] for at, word in enumerate(path)))
        assert found[row] == pytest.approx(-total / len(words), rel=1e-4)


def test_frames_collapse_to_words() -> None:
    likeliest = np.array([[0, 2, 2, 0, 2, 1, 1], [3, 3, 1, 2, 0, 0, 1]])
    logits = jnp.asarray(np.eye(4)[likeliest])
    np.testing.assert_array_equal(collapsed(logits, jnp.array([7, 7]), 3), [[2, 2, 1, 0], [3, 1, 2, 1]])
    np.testing.assert_array_equal(collapsed(logits, jnp.array([4, 3]), 3), [[2, 0, 0, 0], [3, 1, 0, 0]])


@pytest.mark.parametrize(
    ("said", "expected", "distance"),
    [
        ([], [], 0),
        ([1], [], 1),
        ([], [1, 2], 2),
        ([1, 3, 2], [1, 2], 1),
        ([2, 1], [1, 2], 2),
        ([1, 2, 4], [1, 3, 4], 1),
    ],
)
def test_edit_distance(said: list[int], expected: list[int], distance: int) -> None:
    assert edit_distance(said, expected) == distance


@pytest.mark.parametrize("direction", ["causal", "both"])
def test_what_fills_up_a_row_is_not_heard(direction: Any) -> None:
    model = recognizer(dataclasses.replace(TONES, direction=direction))
    whole, _ = model(jnp.asarray(FRAMES), lengths=jnp.array([7, 12]))
    alone, _ = model(jnp.asarray(FRAMES[:1, :7]))
    np.testing.assert_allclose(whole[0, :7], alone[0], rtol=0, atol=2e-5)


def test_listening_frame_by_frame_is_hearing_the_whole() -> None:
    model, config = recognizer(), config_of()
    words = data.vocabulary(TONES)
    said = np.asarray(collapsed(model(jnp.asarray(FRAMES))[0], jnp.array([12, 12]), 12))
    for row in range(2):
        listener, heard = Listener(model, config), []
        for part in np.split(FRAMES[row], [1, 2, 6, 11]):
            heard += listener.hear(part)
        assert heard == [words[word - 1] for word in said[row] if word]
        assert heard
    with pytest.raises(ConfigError, match=r"audio.direction = 'both': needs the end"):
        Listener(model, config_of(dataclasses.replace(TONES, direction="both")))


@pytest.mark.parametrize("frontend", ["log_mel", "raw"])
def test_sound_in_pieces_is_heard_as_the_whole(frontend: Any) -> None:
    audio = dataclasses.replace(TONES, frontend=frontend)
    model, config = recognizer(audio), config_of(audio)
    sound = data.utterance([data.tone((0, 1, 0), np.random.default_rng(1))] * 3, 10, np.random.default_rng(2))
    whole = Listener(model, config).hear_sound(sound)
    listener = Listener(model, config)
    pieces = [listener.hear_sound(piece) for piece in np.split(sound, [7, 700, 701, 2500])]
    assert whole
    assert [word for piece in pieces for word in piece] == whole


def test_every_word_too_many_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that says another word in each frame, against a single one."""
    config = config_of(dataclasses.replace(TONES, max_words=1))
    said = np.resize([1, 2], (8, 70))

    def recognize(params: None, batch: AudioBatch) -> np.ndarray:
        del params
        return np.where(np.arange(70)[None] < batch.num_frames[:, None], said, 0)

    monkeypatch.setattr(AudioApplication, "_recognize", staticmethod(recognize))
    examples = draw_examples(config.audio, 70, held_out=True)
    found = AudioApplication(config).measure(None, examples, None)["word_accuracy"]
    frames, labels = examples.arrays.num_frames, examples.arrays.labels[:, 0]
    wrong = sum(int(count) - (label in (1, 2)) for count, label in zip(frames, labels, strict=True))
    assert found == pytest.approx(1 - wrong / 8)


def test_a_run_of_tones(tmp_path: Path) -> None:
    result = train(config_of(run_dir=str(tmp_path / "run")))
    assert result.measured is not None
    assert result.measured.metrics.keys() == {"exact", "word_accuracy"}
    assert result.measured.metrics["word_accuracy"] < 0.5
    assert np.isfinite(result.measured.loss)
    application, model = load_application(str(tmp_path / "run"), "newest")
    held_out = application.examples(print)[1]
    assert held_out is not None
    losses = model.losses(held_out.arrays, Forward())
    assert float(np.mean(losses.loss)) == pytest.approx(result.measured.loss, rel=1e-4)
