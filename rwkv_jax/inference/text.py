"""Text from tokens as they come, ending at stop strings of which nothing is ever shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import StreamingDecoder, Tokenizer


class TextStream:
    """Turns tokens into text that is safe to show: whole characters, and no beginning of a stop string.

    Characters that a stop string may begin with are held back until it is clear that it does not. Of several stop
    strings the one that is complete first ends the text, and of those complete at the same character the longest; so
    where a text ends does not depend on how it is cut into tokens. Takes time linear in the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        """For the tokens of one text. Raises ConfigError for a stop string that is empty or no string."""
        self._decoder = StreamingDecoder(tokenizer)
        self._matcher = _Matcher(check_stop_strings(stop_strings))
        self._held = ""
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text, or None."""
        return self._stopped

    def push(self, token: int) -> str:
        """Text that is safe to show now, perhaps none; once the text has stopped, none."""
        if self._stopped is not None:
            return ""
        return self._show(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, when no token follows; U+FFFD for a character that was begun and not completed."""
        if self._stopped is not None:
            return ""
        shown = self._show(self._decoder.flush())
        shown, self._held = shown + self._held, ""
        return shown

    def _show(self, text: str) -> str:
        known = self._held + text
        for index, character in enumerate(text, start=len(self._held)):
            found = self._matcher.read(character)
            if found is not None:
                self._stopped, self._held = found, ""
                return known[: index + 1 - len(found)]
        safe = len(known) - self._matcher.depth
        self._held = known[safe:]
        return known[:safe]


def check_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    """The stop strings. Raises ConfigError for one that is empty or no string, and for a string in their place."""
    if isinstance(stop_strings, str):
        raise ConfigError(f"stop strings = {stop_strings!r}: must be a sequence of strings, such as [{stop_strings!r}]")
    for index, stop in enumerate(stop_strings):
        if not isinstance(stop, str) or not stop:
            raise ConfigError(f"stop string {index} = {stop!r}: must be a string with at least one character")
    return tuple(stop_strings)


class _Matcher:
    """Finds strings in a text that is read character by character (Aho and Corasick 1975).

    A node stands for a beginning of a string; the current one for the longest that the text so far ends with.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._following: list[dict[str, int]] = [{}]
        self._depths = [0]
        self._found: list[str | None] = [None]
        for string in strings:
            node = 0
            for depth, character in enumerate(string, start=1):
                node = self._following[node].setdefault(character, len(self._depths))
                if node == len(self._depths):
                    self._following.append({})
                    self._depths.append(depth)
                    self._found.append(None)
            self._found[node] = string
        # For each node the longest other beginning that it ends with.
        self._shorter = [0] * len(self._depths)
        self._link()
        self._node = 0

    @property
    def depth(self) -> int:
        """Characters at the end of the text so far that a string begins with."""
        return self._depths[self._node]

    def read(self, character: str) -> str | None:
        """The longest string that ends with this character, or None."""
        self._node = self._next(self._node, character)
        return self._found[self._node]

    def _next(self, node: int, character: str) -> int:
        while node and character not in self._following[node]:
            node = self._shorter[node]
        return self._following[node].get(character, 0)

    def _link(self) -> None:
        nodes = deque(self._following[0].values())
        while nodes:  # the shorter come first
            node = nodes.popleft()
            for character, longer in self._following[node].items():
                shorter = self._next(self._shorter[node], character)
                self._shorter[longer] = shorter
                if self._found[longer] is None:
                    self._found[longer] = self._found[shorter]
                nodes.append(longer)
