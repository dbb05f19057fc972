"""Console output of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BAR_WIDTH = 24
_WIDTH_FOR_BAR = 100


def format_duration(seconds: float | None) -> str:
    """Seconds as 0:05, 12:03, 3:04:05 or 2d 3:04:05; `-:--` for None."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days}d {clock}" if days else clock


class _SurvivingConsole(RichConsole):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit the program


class Console:
    """Shows step, loss, bits per byte, tokens per second and time left, and prints messages; a context manager.

    On a terminal one line is redrawn in place; elsewhere (a file, a pipe, a dumb terminal) a plain line is written
    every `every` steps, without escape codes. `interactive` overrides the detection. Failing output (a closed
    pipe, a character that the encoding lacks) never stops the run.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        every: int = 10,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        width: int | None = None,
    ) -> None:
        self._num_steps = num_steps
        self._every = every
        self._stream = sys.stdout if stream is None else stream
        self._last_line: int | None = None
        self._broken = False
        self._live: Live | None = None
        self._rich: RichConsole | None = None
        if _is_terminal(self._stream) if interactive is None else interactive:
            self._rich = _SurvivingConsole(
                file=self._stream, width=width, force_terminal=True, highlight=False, markup=False, emoji=False
            )

    def __enter__(self) -> Console:
        if self._rich is not None:
            # Warnings and prints of other modules must appear above the line, not in it; a stream that was passed in
            # is left to the caller.
            is_stdout = self._stream is sys.stdout
            self._live = Live(
                console=self._rich,
                auto_refresh=False,
                redirect_stdout=is_stdout,
                redirect_stderr=is_stdout,
                vertical_overflow="crop",
            )
            self._attempt(self._live.start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            # Also after a failure: stopping restores stdout and stderr.
            self._broken = False
            self._attempt(self._live.stop)
            self._live = None

    def update(self, step: int, figures: Mapping[str, float | None], *, time_left: float | None = None) -> None:
        """Show the state after `step` steps; `time_left` is in seconds.

        Shows loss, bits_per_byte and tokens_per_second, those that `figures` contains.
        """
        if self._live is not None:
            self._redraw(self._live, step, figures, time_left)
        elif self._last_line is None or step % self._every == 0 or step >= self._num_steps:
            self._last_line = step
            self._write_line("  ".join([f"step {step}/{self._num_steps}", *_describe(figures, time_left)]))

    def print(self, *messages: object) -> None:
        """Write a message without breaking the live line; control characters are escaped."""
        text = _printable(" ".join(str(message) for message in messages))
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        rich = self._rich
        if rich is not None:
            self._attempt(lambda: rich.print(Text(text), soft_wrap=True))
        else:
            self._write_line(text)

    def _redraw(self, live: Live, step: int, figures: Mapping[str, float | None], time_left: float | None) -> None:
        row: list[Text | ProgressBar] = [Text(f"step {step}/{self._num_steps}", style="bold")]
        if live.console.width >= _WIDTH_FOR_BAR:
            row.append(ProgressBar(total=self._num_steps, completed=step, width=_BAR_WIDTH))
        else:
            row.append(Text(f"{100 * step // self._num_steps}%"))
        row.append(Text("  ".join(_describe(figures, time_left))))
        table = Table.grid(padding=(0, 2))
        for _ in row:
            table.add_column(no_wrap=True, overflow="crop")
        table.add_row(*row)
        self._attempt(lambda: live.update(table, refresh=True))

    def _write_line(self, text: str) -> None:
        def write() -> None:
            self._stream.write(text + "\n")
            self._stream.flush()

        self._attempt(write)

    def _attempt(self, output: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            output()
        except Exception:
            # No failure of the terminal, the pipe or the encoding may stop a run: print nothing from here on.
            self._broken = True


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except (AttributeError, ValueError, OSError):
        return False


def _describe(figures: Mapping[str, float | None], time_left: float | None) -> list[str]:
    formats = {"loss": "loss {:.4f}", "bits_per_byte": "{:.3f} bits/byte", "tokens_per_second": "{:,.0f} tokens/s"}
    shown = [form.format(value) for name, form in formats.items() if (value := figures.get(name)) is not None]
    return [*shown, f"{format_duration(time_left)} left"]


def _printable(text: str) -> str:
    """Escapes control characters other than line break and tab: a sample could otherwise redraw the terminal."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
