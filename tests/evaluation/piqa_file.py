"""A small PIQA, for tests of what runs tasks."""

from __future__ import annotations

import json
from pathlib import Path

GOALS = ("open a jar", "dry wet shoes", "cool some soup", "find a lost key", "fold a shirt")


def write_piqa(path: Path, goals: tuple[str, ...] = GOALS) -> Path:
    """Writes one item for each goal."""
    items = [
        {"goal": goal, "sol1": f"{goal} with care", "sol2": "wait", "label": i % 2} for i, goal in enumerate(goals)
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path
