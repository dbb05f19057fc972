"""Settings of runs that map one text to another."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from rwkv_jax.checks import checker, require_choices, require_positive
from rwkv_jax.config import ApplicationConfig

if TYPE_CHECKING:
    from rwkv_jax.applications.seq2seq.model import Seq2SeqApplication

ALPHABET = " ,-./0123456789abcdefghijklmnopqrstuvwxyz"
END, START, FIRST = 0, 1, 2
"""Token ids: the end of a target, its beginning, and the alphabet's first character."""
NUM_SYMBOLS = FIRST + len(ALPHABET)

SIZES: dict[str, tuple[int, int]] = {"transliteration": (16, 17), "number_words": (50, 6), "dates": (33, 11)}
"""Most tokens of a source and of a target with its end, by task; those of a reversal follow from its symbols."""


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """The application's own settings."""

    task: Literal["reversal", "transliteration", "number_words", "dates"] = "dates"
    """What is learned (data.py)."""
    form: Literal["state", "attention", "state_and_attention", "decoder_only"] = "state"
    """How the decoder knows the source: it begins from the encoder's state, it attends to the encoder's output, both,
    or it has read the source itself and there is no encoder."""
    shared_embedding: bool = True
    """Whether the encoder, if there is one, takes the decoder's token vectors."""
    min_symbols: int = 4
    """Fewest symbols of a reversal."""
    max_symbols: int = 16
    """Most symbols of a reversal."""
    num_examples: int = 20000
    """Pairs to train on."""
    num_held_out: int = 512
    """Pairs held out; none of their targets is trained on."""
    beam_size: int = 1
    """Hypotheses a held-out source is decoded with; 1 is greedy."""
    length_penalty: float = 0.6
    """The exponent by which beam search favors long targets (decode.py); 0 is none."""

    def __post_init__(self) -> None:
        require_choices(self, "seq2seq")
        require_positive(self, "seq2seq", "min_symbols", "max_symbols", "num_examples", "num_held_out", "beam_size")
        check = checker(self, "seq2seq")
        check(self.max_symbols >= self.min_symbols, "max_symbols", f"must be at least min_symbols, {self.min_symbols}")
        for name in ("min_symbols", "max_symbols"):
            is_read = self.task == "reversal" or getattr(self, name) == getattr(Seq2Seq, name)
            check(is_read, name, f"{self.task} does not read it; leave it out, or take seq2seq.task = reversal")
        has_encoder = self.form != "decoder_only"
        check(self.shared_embedding or has_encoder, "shared_embedding", "decoder_only has no encoder; leave it out")
        check(0 <= self.length_penalty < float("inf"), "length_penalty", "must be a number from 0")

    @property
    def sizes(self) -> tuple[int, int]:
        """Most tokens of a source, and of a target with its end."""
        return SIZES.get(self.task, (self.max_symbols, self.max_symbols + 1))


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig(ApplicationConfig):
    """A run that learns to write one text when it has read another."""

    application = "seq2seq"
    section = "seq2seq"

    seq2seq: Seq2Seq = dataclasses.field(default_factory=Seq2Seq)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check = checker(self)
        length = sum(self.seq2seq.sizes)
        check(
            self.training.sequence_length == length,
            "training.sequence_length",
            f"must be {length}, the most tokens of a source and a target of {self.seq2seq.task}",
        )
        check(self.model.vocab_size >= NUM_SYMBOLS, "model.vocab_size", f"must be at least {NUM_SYMBOLS}, the symbols")
        check(self.parallel.tensor == 1, "parallel.tensor", "seq2seq cannot split heads; split rows, with data or fsdp")

    @override
    def own_settings(self) -> dict[str, Any]:
        """All but how held-out sources are decoded, which may change when a run is resumed."""
        free = ("seq2seq.beam_size", "seq2seq.length_penalty")
        return {name: value for name, value in super().own_settings().items() if name not in free}

    @override
    def load_application(self) -> Seq2SeqApplication:
        from rwkv_jax.applications.seq2seq.model import Seq2SeqApplication

        return Seq2SeqApplication(self)
