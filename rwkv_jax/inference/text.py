"""Detokenization: text that is safe to show as tokens arrive, cut at stop strings of which nothing is ever shown."""

from __future__ import annotations

from collections.abc import Sequence

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import StreamingDecoder, Tokenizer


class TextStream:
    """Turns tokens into text that is safe to show: whole characters, and no beginning of a stop string.

    Characters that a stop string may begin with are held back until it is clear that it does not. The stop string that
    is complete first ends the text; of several complete at the same character, the longest. Where a text ends does not
    depend on how it is cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        """For the tokens of one text. Raises ConfigError for a stop string that is empty or no string."""
        self._decoder = StreamingDecoder(tokenizer)
        self._stop_strings = sorted(check_stop_strings(stop_strings), key=len, reverse=True)
        self._held = ""
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text, or None."""
        return self._stopped

    def push(self, token: int) -> str:
        """Text that is safe to show now, perhaps none; once the text has stopped, none."""
        return "" if self._stopped is not None else self._show(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, when no token follows; U+FFFD for an incomplete character."""
        if self._stopped is not None:
            return ""
        shown = self._show(self._decoder.flush())
        shown, self._held = shown + self._held, ""
        return shown

    def _show(self, text: str) -> str:
        shown = ""
        for character in text:
            self._held += character
            # The longest suffix of the text that begins a stop string; whole strings are looked for first.
            for stop in self._stop_strings:
                if self._held.endswith(stop):
                    self._stopped, before = stop, self._held.removesuffix(stop)
                    self._held = ""
                    return shown + before
            length = max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
            safe = len(self._held) - length
            shown, self._held = shown + self._held[:safe], self._held[safe:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of a text that a stop string begins with."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


def check_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    """The stop strings.

    Raises:
      ConfigError: one that is empty, no string, or not UTF-8 (a shell's bytes arrive as lone surrogates then); or a
        string in place of a sequence.
    """
    if isinstance(stop_strings, str):
        raise ConfigError(f"stop strings = {stop_strings!r}: must be a sequence of strings, such as [{stop_strings!r}]")
    for index, stop in enumerate(stop_strings):
        if not isinstance(stop, str) or not stop:
            raise ConfigError(f"stop string {index} = {stop!r}: must be a string with at least one character")
        if any("\ud800" <= character <= "\udfff" for character in stop):
            raise ConfigError(f"stop string {index} = {stop!r}: is not UTF-8, which all generated text is")
    return tuple(stop_strings)
