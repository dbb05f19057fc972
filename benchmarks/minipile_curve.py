"""Holds a run of configs/minipile.py against the official trainer's losses and learning rates.

python benchmarks/minipile_curve.py runs/minipile
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_jax.training.reporting.metrics import read_metrics

STEPS = 40320 // 16
"""Of a mini-epoch: 40320 rows, 16 a step."""

LOSSES = (
    4.875856,
    4.028621,
    3.801625,
    3.663070,
    3.578974,
    3.510906,
    3.462345,
    3.412196,
    3.376724,
    3.336911,
    3.313411,
    3.295895,
)
"""Mean loss of each mini-epoch, in nats; README.md of RWKV-v7/train_temp in BlinkDL/RWKV-LM."""

LEARNING_RATES = {0: 5.9975e-4, 1: 5.9899e-4, 11: 5.6441e-4}
"""At the last step of a mini-epoch, from the same log."""

TOLERANCE = 0.01
"""Nats; what the official README allows."""


class MiniEpoch(NamedTuple):
    """One mini-epoch of a run beside the official one."""

    index: int
    loss: float
    expected: float
    learning_rate: float

    @property
    def is_right(self) -> bool:
        """Whether loss and learning rate are what they should be."""
        rate = LEARNING_RATES.get(self.index, self.learning_rate)
        return abs(self.loss - self.expected) <= TOLERANCE and math.isclose(self.learning_rate, rate, rel_tol=1e-4)


def mini_epochs(records: Sequence[dict[str, Any]]) -> Iterator[MiniEpoch]:
    """The mini-epochs that a run has finished, of those that were published.

    Args:
      records: of metrics.jsonl; those of training have the mean loss of the steps since the one before. After a resume
        at a step that has no line, the next one's mean is of the steps since the resume alone, and stands for the
        others too: each such resume leaves at most 9 losses out.

    Raises:
      ValueError: steps are missing, or a record spans two mini-epochs.
    """
    total, done = 0.0, 0
    for record in records:
        if record["kind"] != "train":
            continue
        index, count = done // STEPS, record["step"] - done
        if count <= 0 or record["step"] > (index + 1) * STEPS:
            raise ValueError(
                f"step {record['step']} follows step {done}: a mini-epoch ends at each multiple of {STEPS}, "
                "and so must lines of metrics.jsonl; leave logging.every at 10"
            )
        total, done = total + count * record["loss"], record["step"]
        if done % STEPS == 0:
            if index == len(LOSSES):
                return
            yield MiniEpoch(index, total / STEPS, LOSSES[index], record["learning_rate"])
            total = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    found = list(mini_epochs(read_metrics(parser.parse_args().run_dir / "metrics.jsonl")))
    print("| mini-epoch | loss | official | difference | learning rate | |\n|---|---|---|---|---|---|")
    for epoch in found:
        difference = f"{epoch.loss - epoch.expected:+.6f}"
        verdict = "right" if epoch.is_right else "wrong"
        cells = (epoch.index, f"{epoch.loss:.6f}", epoch.expected, difference, f"{epoch.learning_rate:.4e}", verdict)
        print(f"| {' | '.join(map(str, cells))} |")
    if not found:
        sys.exit(f"no mini-epoch of {STEPS} steps is finished yet")
    if not all(epoch.is_right for epoch in found):
        sys.exit(f"not the official run: losses must be within {TOLERANCE}, learning rates within 0.01%")


if __name__ == "__main__":
    main()
