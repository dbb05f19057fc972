"""A recognizer: frames to vectors, a stack of layers, and for each frame the chances of words and of none (CTC).

Connectionist temporal classification (Graves et al., 2006) sums over all ways in which the frames can say the words, so
that nobody has to mark where each word is. A causal stack hears word by word with a state of constant size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.applications.audio.config import AudioConfig
from rwkv_jax.applications.audio.data import (
    HOP,
    WINDOW,
    AudioBatch,
    draw_examples,
    frames_of,
    num_features,
    vocabulary,
)
from rwkv_jax.config import ConfigError
from rwkv_jax.models import LanguageModel, model_type
from rwkv_jax.models.bidirectional import bidirectional_type
from rwkv_jax.models.language_model import PartTransform, identity
from rwkv_jax.models.layers import BiasedLinear, uniform, wide_dtype
from rwkv_jax.training.application import Application, Forward, Losses, part_of
from rwkv_jax.training.examples import Examples
from rwkv_kernels.arguments import broadcast_varying_axes

BLANK = 0
"""CTC's blank: the class of a frame that says no word."""


def stack_type(config: AudioConfig) -> type[LanguageModel]:
    """The class of the layers."""
    both = config.audio.direction == "both"
    return bidirectional_type(config.model) if both else model_type(config.model)


class Recognizer(nnx.Module):
    """Logits of words for each frame: BiasedLinear, layers, BiasedLinear."""

    def __init__(self, config: AudioConfig, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> None:
        model, dtype = config.model, config.model.parameter_dtype
        self.dtype = model.dtype
        inputs, classes = num_features(config.audio.frontend), len(vocabulary(config.audio)) + 1

        def dense(size: int, num_inputs: int) -> BiasedLinear:
            return BiasedLinear(uniform(rngs.params(), (size, num_inputs), num_inputs**-0.5, dtype))

        self.inputs = shard_params("inputs", dense(model.width, inputs))
        self.layers = stack_type(config)(
            model, rngs=rngs, shard_params=part_of("layers", shard_params), has_embedding=False, has_head=False
        )
        self.words = shard_params("words", dense(classes, model.width))

    def __call__(
        self, frames: Array, state: Any = None, *, lengths: Array | None = None, forward: Forward | None = None
    ) -> tuple[Array, Any]:
        """Logits [B, T, classes] of frames [B, T, features], and the layers' next state.

        Args:
          state: from an earlier call; None is the beginning.
          lengths: integers [B], frames of each utterance.
        """
        forward = forward or Forward()
        x = forward.gather_params("inputs", self.inputs)(jnp.asarray(frames, self.dtype))
        hidden, state = self.layers.hidden(None, state, inputs_embeds=x, lengths=lengths, **forward.of_part("layers"))
        return forward.gather_params("words", self.words)(hidden).astype(wide_dtype(hidden.dtype)), state

    def losses(self, batch: AudioBatch, forward: Forward) -> Losses:
        """-log p(words) a word, and whether the likeliest class of each frame, collapsed, says them."""
        logits, _ = self(batch.frames, lengths=batch.num_frames, forward=forward)
        beyond = jnp.arange(logits.shape[1])[None] >= batch.num_frames[:, None]
        absent = batch.labels == 0
        # Its log 0 has to vary over the mesh axes over which rows are split, like the logits it is added to.
        log_zero, _ = broadcast_varying_axes(jnp.asarray(-1e5, logits.dtype), logits)
        loss = optax.ctc_loss(
            logits, beyond.astype(logits.dtype), batch.labels, absent.astype(logits.dtype), log_epsilon=log_zero
        )
        said = collapsed(logits, batch.num_frames, batch.labels.shape[1])
        exact = jnp.all(said == jnp.pad(batch.labels, ((0, 0), (0, 1))), axis=1)
        return Losses(loss / jnp.sum(~absent, axis=1), {"exact": exact.astype(loss.dtype)})


def collapsed(logits: Array, num_frames: Array, max_words: int) -> Array:
    """What frames say: each likeliest class once as long as it lasts, without blanks.

    Returns:
      [B, max_words + 1] words, zeros behind them; the last one is not 0 if there are more than `max_words`.
    """
    likeliest = jnp.argmax(logits, axis=-1)
    before = jnp.pad(likeliest, ((0, 0), (1, 0)))[:, :-1]
    is_said = (likeliest != before) & (likeliest != BLANK)
    is_said &= jnp.arange(logits.shape[1])[None] < num_frames[:, None]
    place = jnp.where(is_said, jnp.minimum(jnp.cumsum(is_said, axis=1) - 1, max_words), max_words + 1)
    said = jnp.zeros((len(logits), max_words + 2), likeliest.dtype)
    return said.at[jnp.arange(len(logits))[:, None], place].max(jnp.where(is_said, likeliest, 0))[:, :-1]


def edit_distance(said: Sequence[int], expected: Sequence[int]) -> int:
    """Words to add, leave out or change."""
    row = list(range(len(said) + 1))
    for number, word in enumerate(expected, start=1):
        above, row[0] = row[0], number
        for at, own in enumerate(said, start=1):
            above, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, above + (own != word))
    return row[-1]


class Heard(NamedTuple):
    """Where a listener is."""

    state: Any
    last: int
    """The likeliest class of the last frame."""
    tail: np.ndarray
    """The last samples, of which the next frames begin; and those of no whole frame yet."""


class Listener:
    """Recognizes words while they are heard: any number of frames at a time, with a state of constant size."""

    def __init__(self, recognizer: Recognizer, config: AudioConfig) -> None:
        """Raises ConfigError for a recognizer that reads frames from both ends."""
        if config.audio.direction == "both":
            raise ConfigError("audio.direction = 'both': needs the end of an utterance; train a causal one to listen")
        self._words, self._frontend = vocabulary(config.audio), config.audio.frontend
        graphdef, params = nnx.split(recognizer)
        self._params = params
        self._heard = Heard(recognizer.layers.initial_state(1), BLANK, np.zeros(WINDOW - HOP))
        self._run = jax.jit(lambda params, frames, state: nnx.merge(graphdef, params)(frames, state))

    def hear(self, frames: np.ndarray) -> list[str]:
        """The words that begin within the next frames [n, features]."""
        logits, state = self._run(self._params, frames[None], self._heard.state)
        words, last = [], self._heard.last
        for found in np.argmax(np.asarray(logits)[0], axis=-1).tolist():
            if found not in (last, BLANK):
                words.append(self._words[found - 1])
            last = found
        self._heard = self._heard._replace(state=state, last=last)
        return words

    def hear_sound(self, sound: np.ndarray) -> list[str]:
        """The words that begin within the next samples, of any number, 8000 a second, loud as those trained on."""
        before, sound = np.split(np.concatenate([self._heard.tail, sound]), [WINDOW - HOP])
        end = len(sound) // HOP * HOP
        frames = frames_of(sound, self._frontend, before)
        self._heard = self._heard._replace(tail=np.concatenate([before, sound])[end:])
        return self.hear(frames) if len(frames) else []


class AudioApplication(Application):
    """Words in sound."""

    def __init__(self, config: AudioConfig) -> None:
        self.config: AudioConfig = config

    @property
    @override
    def stacks(self) -> Mapping[str, type[LanguageModel]]:
        return {"layers": stack_type(self.config)}

    @override
    def new_model(self, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> Recognizer:
        return Recognizer(self.config, rngs, shard_params)

    @override
    def labels(self) -> tuple[str, ...]:
        return vocabulary(self.config.audio)

    @override
    def examples(self, report: Callable[[str], None]) -> tuple[Examples, Examples]:
        length, audio = self.config.training.sequence_length, self.config.audio
        return draw_examples(audio, length, held_out=False), draw_examples(audio, length, held_out=True)

    @functools.cached_property
    def _recognize(self) -> Callable[[Any, AudioBatch], Array]:
        def recognize(params: Any, batch: AudioBatch) -> Array:
            logits, _ = self.model(params)(batch.frames, lengths=batch.num_frames)
            return collapsed(logits, batch.num_frames, logits.shape[1])  # however many are said

        return jax.jit(recognize)

    @override
    def measure(self, params: Any, examples: Examples, num_examples: int | None) -> Mapping[str, float]:
        """Share of words that are right: 1 - (words to add, leave out or change) / words."""
        size, wrong, words = self.config.training.batch_size, 0, 0
        for start in range(0, min(num_examples or len(examples), len(examples)), size):
            batch = examples.rows(np.arange(start, start + size))
            for row, said in enumerate(np.asarray(self._recognize(params, batch))):
                expected = batch.labels[row][batch.labels[row] > 0].tolist()
                if batch.weight[row]:
                    wrong, words = wrong + edit_distance(said[said > 0].tolist(), expected), words + len(expected)
        return {"word_accuracy": 1 - wrong / words}
