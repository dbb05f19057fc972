"""Utterances of several words with noise: sound, frames, and labels.

Sound has 8000 samples a second; a frame is 20 ms, 160 samples, and what is read of it ends where it ends. The same
versions of espeak-ng and NumPy on the same kind of processor make the same numbers; others may round the last digit
otherwise, and a run that is resumed there is refused.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import scipy.signal

from rwkv_jax.applications.audio.config import Audio
from rwkv_jax.config import ConfigError
from rwkv_jax.training.examples import Examples

RATE = 8000
HOP = 160
WINDOW = 256
MELS = 40

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONTOURS = {
    "low": (0.0, 0.0, 0.0),
    "high": (1.0, 1.0, 1.0),
    "rise": (0.0, 0.5, 1.0),
    "fall": (1.0, 0.5, 0.0),
    "peak": (0.0, 1.0, 0.0),
    "dip": (1.0, 0.0, 1.0),
    "step": (0.0, 0.0, 1.0),
    "drop": (1.0, 1.0, 0.0),
}
"""Pitch at the beginning, in the middle and at the end, from 0 to 1 octave."""

ACCENTS = ("en-us", "en-gb", "en-029", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-scotland")
VOICES = {
    held_out: tuple(f"{accent}+{voice}" for accent in ACCENTS for voice in voices.split())
    for held_out, voices in ((False, "m1 m3 m4 m6 m7 m8 f1 f3 f4"), (True, "m2 m5 f2 f5"))
}
"""Voices of espeak-ng, those to train on and those held out (True)."""


class AudioBatch(NamedTuple):
    """Utterances."""

    frames: Any
    """float32 [B, T, features]."""
    num_frames: Any
    """int32 [B]."""
    labels: Any
    """int32 [B, W]: words from 1 on, zeros behind them."""
    weight: Any
    """float32 [B]."""


def vocabulary(audio: Audio) -> tuple[str, ...]:
    """The words, of ids 1, 2, ..."""
    return DIGITS if audio.words == "digits" else tuple(CONTOURS)


def tone(contour: Sequence[float], draws: np.random.Generator) -> np.ndarray:
    """A word as a tone with a contour of pitch, four harmonics and a soft beginning and end."""
    length = int(RATE * draws.uniform(0.25, 0.45))
    octave = np.interp(np.linspace(0, 2, length), (0, 1, 2), contour)
    phase = 2 * np.pi * np.cumsum(draws.uniform(180, 320) * 2.0**octave) / RATE
    harmonics = [np.sin(phase * n) * draws.uniform(0.3, 1) / n for n in (1, 2, 3, 4)]
    return np.sum(harmonics, axis=0) * np.minimum(1, 20 * np.hanning(length))


@functools.cache
def speak(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """A word spoken by espeak-ng, without the silence around it.

    Args:
      speed: words a minute; pitch: from 0 to 99.

    Raises:
      ConfigError: espeak-ng is not installed, or has no such voice.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise ConfigError(
            "audio.words = 'digits': are spoken by espeak-ng, which is not installed; install it (Debian: apt install "
            "espeak-ng), or take tones"
        )
    command = [program, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        raise ConfigError(f"espeak-ng: cannot speak {word!r} with the voice {voice}: {done.stderr.decode().strip()}")
    # The header's length is a guess, since it is written before the sound.
    rate = int(np.frombuffer(done.stdout[24:28], "<u4")[0])
    sound = np.frombuffer(done.stdout[44 : 44 + (len(done.stdout) - 44) // 2 * 2], "<i2") / 2.0**15
    sound = np.asarray(scipy.signal.resample_poly(sound, RATE, rate))
    loud = np.flatnonzero(np.abs(sound) > 0.02 * np.max(np.abs(sound)))
    return sound[loud[0] : loud[-1] + 1]


def utterance(clips: Sequence[np.ndarray], snr: float, draws: np.random.Generator) -> np.ndarray:
    """Words with pauses and noise; a word has a root mean square of 0.07 to 0.1.

    Args:
      snr: power of the words with their pauses to that of the noise, dB; noise is white or falls with frequency.
    """
    parts = [np.zeros(int(RATE * draws.uniform(0.05, 0.2)))]
    for clip in clips:
        parts += [
            clip * draws.uniform(0.7, 1) / np.sqrt(np.mean(clip**2)),
            np.zeros(int(RATE * draws.uniform(0.05, 0.3))),
        ]
    sound = np.concatenate(parts)
    noise = draws.normal(size=len(sound))
    if draws.random() < 0.5:
        noise = np.asarray(scipy.signal.lfilter([1], [1, -0.9], noise))
    noise *= np.sqrt(np.mean(sound**2) / np.mean(noise**2)) * 10 ** (-snr / 20)
    # (Not of equal power as a whole: no listener knows that before the end.)
    return 0.1 * (sound + noise)


@functools.cache
def mel_filters() -> np.ndarray:
    """Triangles on the mel scale, 2595 log10(1 + f / 700), from 50 to 4000 Hz: [MELS, WINDOW / 2 + 1]."""
    mels = np.linspace(2595 * np.log10(1 + 50 / 700), 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling))


def frames_of(sound: np.ndarray, frontend: str, before: np.ndarray | None = None) -> np.ndarray:
    """Frames of a sound [samples]: float32 [samples // HOP, features], each of samples up to its end.

    Args:
      before: the WINDOW - HOP samples before it; None is silence.
    """
    count = len(sound) // HOP
    if not count:
        return np.zeros((0, num_features(frontend)), np.float32)
    if frontend == "raw":
        return (10 * sound[: count * HOP]).reshape(count, HOP).astype(np.float32)
    padded = np.concatenate([np.zeros(WINDOW - HOP) if before is None else before, sound])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:count]
    power = np.abs(np.fft.rfft(windows * np.hanning(WINDOW), axis=-1)) ** 2
    return (np.log(power @ mel_filters().T + 1e-4) / 3 + 1).astype(np.float32)


def num_features(frontend: str) -> int:
    """Numbers of a frame."""
    return HOP if frontend == "raw" else MELS


def vary(row: AudioBatch, draws: np.random.Generator) -> AudioBatch:
    """An utterance of another voice and room: energies up to two bands higher or lower, some bands at the mean of all.

    A longer or shorter vocal tract moves all formants; SpecAugment (arXiv 1904.08779) leaves out bands.
    """
    shift, width = int(draws.integers(-2, 3)), int(draws.integers(0, 9))
    frames = row.frames[:, np.clip(np.arange(MELS) + shift, 0, MELS - 1)]
    first = int(draws.integers(0, MELS - width + 1))
    heard = frames[: row.num_frames]
    heard[:, first : first + width] = np.mean(heard)
    return row._replace(frames=frames)


def draw_examples(audio: Audio, max_frames: int, *, held_out: bool) -> Examples:
    """Utterances to train on, or held out.

    Args:
      max_frames: T; utterances have fewer words where they would not fit.

    Raises:
      ConfigError: a single word does not fit, or as `speak`.
    """
    words, count = vocabulary(audio), audio.num_held_out if held_out else audio.num_examples
    draws = np.random.default_rng([int(held_out), 0xA0D])
    clips = _clips(audio, draws, held_out)
    frames = np.zeros((count, max_frames, num_features(audio.frontend)), np.float32)
    num_frames, labels = np.zeros(count, np.int32), np.zeros((count, audio.max_words), np.int32)
    for row in range(count):
        chosen = draws.integers(0, len(words), draws.integers(1, audio.max_words + 1))
        own = [clips[word][draws.integers(len(clips[word]))] for word in chosen]
        snr = audio.held_out_snr if held_out else draws.uniform(*audio.snr)
        while True:
            found = frames_of(utterance(own, snr, draws), audio.frontend)
            if len(found) <= max_frames:
                break
            if len(own) == 1:
                raise ConfigError(
                    f"training.sequence_length = {max_frames}: a word has {len(found)} frames; make it {2 * len(found)}"
                )
            own.pop()
        frames[row, : len(found)], num_frames[row], labels[row, : len(own)] = found, len(found), chosen[: len(own)] + 1
    varied = vary if audio.frontend == "log_mel" and not held_out else None
    return Examples(AudioBatch(frames, num_frames, labels, np.ones(count, np.float32)), "utterance", varied)


def _clips(audio: Audio, draws: np.random.Generator, held_out: bool) -> list[list[np.ndarray]]:
    """Several sounds of each word."""
    if audio.words == "tones":
        return [[tone(contour, draws) for _ in range(40)] for contour in CONTOURS.values()]
    kinds = [
        (word, voice, int(draws.integers(120, 200)), int(draws.integers(20, 80)))
        for word in DIGITS
        for voice in VOICES[held_out]
        for _ in range(1 if held_out else 2)
    ]
    with ThreadPoolExecutor() as pool:
        spoken = list(pool.map(lambda kind: speak(*kind), kinds))
    return [[clip for clip, kind in zip(spoken, kinds, strict=True) if kind[0] == word] for word in DIGITS]
