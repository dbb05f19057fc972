"""Settings of runs that recognize words in sound."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from rwkv_jax.checks import checker, require_choices, require_positive
from rwkv_jax.config import ApplicationConfig

if TYPE_CHECKING:
    from rwkv_jax.applications.audio.model import AudioApplication


@dataclasses.dataclass(frozen=True)
class Audio:
    """The application's own settings."""

    words: Literal["digits", "tones"] = "digits"
    """What is heard: digits, the English ones as espeak-ng speaks them, which must be installed; tones, eight contours
    of pitch made by a formula."""
    frontend: Literal["log_mel", "raw"] = "log_mel"
    """What the model reads of a frame: 40 log-mel energies, or its samples."""
    direction: Literal["causal", "both"] = "causal"
    """Whether frames after the present one are read, too; then words cannot be recognized while they are heard."""
    max_words: int = 4
    """Words of an utterance, from one."""
    snr: tuple[float, float] = (5.0, 30.0)
    """Lowest and highest signal-to-noise ratio in training, dB."""
    held_out_snr: float = 10.0
    """Signal-to-noise ratio of what is held out, dB."""
    num_examples: int = 8000
    """Utterances to train on."""
    num_held_out: int = 256
    """Utterances held out; their voices are none of those trained on."""

    def __post_init__(self) -> None:
        require_choices(self, "audio")
        require_positive(self, "audio", "max_words", "num_examples", "num_held_out")
        check = checker(self, "audio")
        check(-100 < self.snr[0] <= self.snr[1] < 100, "snr", "must be the lowest ratio, then the highest, dB")
        check(-100 < self.held_out_snr < 100, "held_out_snr", "must lie between -100 and 100 dB")


@dataclasses.dataclass(frozen=True)
class AudioConfig(ApplicationConfig):
    """A run that learns to recognize words, by connectionist temporal classification over frames of 20 ms."""

    application = "audio"
    section = "audio"

    audio: Audio = dataclasses.field(default_factory=Audio)

    @override
    def load_application(self) -> AudioApplication:
        from rwkv_jax.applications.audio.model import AudioApplication

        return AudioApplication(self)
