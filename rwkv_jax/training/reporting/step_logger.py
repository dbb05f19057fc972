"""Logs each step to the console and metrics.jsonl, and stops a run after too many skipped steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rwkv_jax.held_out import Answers, HeldOut, Measured, bits_per_byte
from rwkv_jax.training.reporting.console import Console
from rwkv_jax.training.reporting.metrics import Kind, MetricsWriter
from rwkv_jax.training.reporting.throughput import Throughput
from rwkv_jax.training.state import StepMetrics
from rwkv_jax.training.tasks import TaskResult


class NonFiniteError(RuntimeError):
    """Too many steps in a row were skipped: loss or gradients were not finite, or spikes."""


@dataclasses.dataclass(kw_only=True, eq=False)
class StepLogger:
    """Logs steps one step late, so that the device never waits for the host to read metrics.

    Without a `writer` no metrics are written; of several processes, only one has one.
    """

    num_steps: int
    every: int
    max_bad_steps: int
    bytes_per_token: float | None
    """None if tokens are no text, or losses no cross-entropy; bits per byte are then left out."""
    learning_rate: Callable[[int], object]
    row_locations: Callable[[int], Sequence[str]]
    console: Console
    writer: MetricsWriter | None
    throughput: Throughput
    resumed_window: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The `metrics_window` of the checkpoint that the run resumes from."""
    why_skipped: Callable[[int], str | None] | None = None
    """Why a step had to be skipped, where its data says so."""

    def __post_init__(self) -> None:
        self._pending: tuple[int, StepMetrics] | None = None
        self._losses: list[float] = list(self.resumed_window.get("losses", ()))
        self._skipped = int(self.resumed_window.get("skipped", 0))
        self._metrics: dict[str, list[float]] = {
            name: list(values) for name, values in self.resumed_window.get("metrics", {}).items()
        }
        self._bad: list[int] = []

    @property
    def metrics_window(self) -> dict[str, Any]:
        """What the next line of metrics.jsonl is made of, up to the last step logged; to be saved with a checkpoint."""
        window = {"losses": list(self._losses), "skipped": self._skipped}
        return window | (
            {"metrics": {name: list(values) for name, values in self._metrics.items()}} if self._metrics else {}
        )

    @property
    def is_bad(self) -> bool:
        """Whether the last step logged was skipped."""
        return bool(self._bad)

    def step(self, step: int, metrics: StepMetrics, *, wait: bool) -> None:
        """Takes a step's metrics, which may still be computing, and logs the step before.

        Args:
          wait: log this step too, once it is computed; for a step after which the model is evaluated or saved.

        Raises:
          NonFiniteError: `max_bad_steps` steps in a row were skipped.
        """
        self._write_pending()
        self._pending = (step, metrics)
        if wait:
            self._write_pending()

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss = float(metrics.loss)
        self.throughput.step()
        done = step + 1
        if bool(metrics.taken):
            self._losses.append(loss)
            for name, value in (metrics.metrics or {}).items():
                self._metrics.setdefault(name, []).append(float(value))
            self._bad = []
        else:
            self._bad.append(step)
            self._skipped += 1
            norm = float(metrics.gradient_norm)
            reason = "a spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
            reason = self._reason(step) or reason
            self.console.print(f"step {step}: loss {loss}, gradient norm {norm}: {reason}, step skipped")
        if done % self.every == 0 or done == self.num_steps:
            mean = sum(self._losses) / len(self._losses) if self._losses else math.nan
            figures = {
                "loss": mean,
                **self._bits_per_byte(mean),
                **{name: sum(values) / len(values) for name, values in self._metrics.items()},
                "gradient_norm": float(metrics.gradient_norm),
                "learning_rate": float(self.learning_rate(step)),  # pyright: ignore[reportArgumentType]
                "skipped_steps": self._skipped,
                "tokens_per_second": self.throughput.tokens_per_second,
            }
            self._losses, self._skipped, self._metrics = [], 0, {}
            self._write("train", done, figures)
        self.console.update(
            done,
            {
                "loss": loss,
                **self._bits_per_byte(loss),
                "tokens_per_second": self.throughput.tokens_per_second,
            },
            time_left=self.throughput.time_left(self.num_steps - done),
        )
        if len(self._bad) >= self.max_bad_steps:
            listed = "\n".join(f"  step {bad}: {'; '.join(self.row_locations(bad))}" for bad in self._bad)
            self._write(
                "stop", done, {"first": self._bad[0], "reason": f"{len(self._bad)} steps in a row were skipped"}
            )
            reasons = {self._reason(bad) for bad in self._bad}
            if None not in reasons:
                raise NonFiniteError(
                    f"{len(self._bad)} steps in a row were skipped, since {' and '.join(filter(None, reasons))}; "
                    f"nothing was saved since. Their rows begin here:\n{listed}"
                )
            raise NonFiniteError(
                f"{len(self._bad)} steps in a row had a loss or gradient that is not finite, or a spike, and were "
                "skipped; nothing was saved since. Lower optimizer.learning_rate or optimizer.clip_norm, raise "
                f"training.spike_factor if it is set, or look at the data. Their rows begin here:\n{listed}"
            )

    def _reason(self, step: int) -> str | None:
        return None if self.why_skipped is None else self.why_skipped(step)

    def held_out(self, step: int, result: HeldOut | Answers | Measured) -> None:
        """Logs an evaluation after `step` steps."""
        self._write("evaluation", step, result.record())
        self.console.print(f"step {step}: held-out {result.describe()}")

    def tasks(self, step: int, results: Mapping[str, TaskResult]) -> None:
        """Logs tasks' metrics after `step` steps, each with its standard error, and what was cut of their prompts."""
        figures: dict[str, object] = {}
        for task, found in results.items():
            shown = []
            for name, estimate in found.summary.metrics.items():
                error = "" if estimate.stderr is None else f" +- {estimate.stderr:.2g}"
                shown.append(f"{name} {estimate.value:.4g}{error}")
                figures |= {f"{task}.{name}": estimate.value, f"{task}.{name}_stderr": estimate.stderr}
                figures[f"{task}.items"] = estimate.count
            figures |= {f"{task}.num_fewshot": found.num_fewshot, f"{task}.num_truncated": found.num_truncated}
            if found.num_truncated:
                shown.append(f"{found.num_truncated} of {found.num_requests} requests were cut at their beginning")
            self.console.print(f"step {step}: {task} {', '.join(shown)}")
        self._write("task", step, figures)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Logs and prints a sample."""
        self._write("sample", step, {"prompt": prompt, "text": text})
        self.console.print(f"--- sample after step {step} ---\n{prompt}{text}\n---")

    def _bits_per_byte(self, loss: float) -> dict[str, float]:
        return {} if self.bytes_per_token is None else {"bits_per_byte": bits_per_byte(loss, self.bytes_per_token)}

    def _write(self, kind: Kind, step: int, values: Mapping[str, object]) -> None:
        if self.writer is not None:
            self.writer.write(kind, step, values)
