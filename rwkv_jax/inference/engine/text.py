"""Streaming detokenization with stop strings, of which nothing is ever shown."""

from __future__ import annotations

from collections.abc import Sequence

from rwkv_jax.checks import ConfigError, shown
from rwkv_jax.data.tokenizers import StreamingDecoder, Tokenizer


class TextStream:
    """Converts tokens to text that is safe to show: whole characters, no prefix of a stop string.

    A suffix that may become a stop string is held back until it cannot. The first complete stop string ends the text;
    of several completed by the same character, the longest. The end does not depend on how text is split into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        """For one text. Raises ConfigError for a stop string that is empty or not a string."""
        self._decoder = StreamingDecoder(tokenizer)
        self._stop_strings = sorted(check_stop_strings(stop_strings), key=len, reverse=True)
        self._held = ""
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text, or None."""
        return self._stopped

    def push(self, token: int) -> str:
        """Text that is safe to show now, possibly empty; empty once the text has stopped."""
        return "" if self._stopped is not None else self._show(self._decoder.push(token))

    def flush(self) -> str:
        """The held-back text, if no token follows; U+FFFD for an incomplete character."""
        if self._stopped is not None:
            return ""
        shown = self._show(self._decoder.flush())
        shown, self._held = shown + self._held, ""
        return shown

    def _show(self, text: str) -> str:
        shown = ""
        for character in text:
            self._held += character
            # The longest suffix of the text that is a prefix of a stop string; complete ones were found above.
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
    """Length of the longest suffix of a text that is a prefix of a stop string."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


def check_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    """The stop strings.

    Raises:
      ConfigError: one that is empty, not a string, or not UTF-8 (a shell's bytes arrive as lone surrogates then); or a
        string instead of a sequence.
    """
    if isinstance(stop_strings, str):
        raise ConfigError(
            f"stop strings = {shown(stop_strings)}: must be a sequence of strings, such as [{shown(stop_strings)}]"
        )
    for index, stop in enumerate(stop_strings):
        if not isinstance(stop, str) or not stop:
            raise ConfigError(f"stop string {index} = {shown(stop)}: must be a string with at least one character")
        if any("\ud800" <= character <= "\udfff" for character in stop):
            raise ConfigError(f"stop string {index} = {stop!r}: is not UTF-8, which all generated text is")
    return tuple(stop_strings)
