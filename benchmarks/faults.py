"""Injects faults with a seed and counts how they end: kills, damaged checkpoints, mutated files, writers, limits.

    python benchmarks/faults.py                       everything, about half an hour on two cores
    python benchmarks/faults.py --only damage files   some of it
    python benchmarks/faults.py --kills 5 --damages 20 --mutations 20

Prints a table as Markdown: tries; survived, with the bits or texts that were promised; named, refused with an error of
ours; no digest, other numbers in a file whose format cannot tell; silent, other numbers without a word; crashed, all
else. It fails if anything was silent or crashed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from rwkv_jax.checkpoint_files import CheckpointError
from rwkv_jax.config import ConfigError
from rwkv_jax.run_lock import lock_run
from rwkv_jax.training.checkpoints import Checkpoints
from tests.faults import files
from tests.runs import Workplace, kill_one, read_figures
from tests.small_runs import assert_same_bits
from tests.test_resume import CONFIG
from tests.training.saved import LIKE, make_state, save

OUTCOMES = ("survived", "named", "no digest", "silent", "crashed")


@dataclasses.dataclass(frozen=True)
class Row:
    """How the tries of one kind of fault ended."""

    fault: str
    outcomes: collections.Counter[str]

    def __str__(self) -> str:
        counts = " | ".join(str(self.outcomes[name]) for name in OUTCOMES)
        return f"| {self.fault} | {self.outcomes.total()} | {counts} |"


def outcome(attempt: Callable[[], str]) -> str:
    """What an attempt says, or how it failed."""
    try:
        return attempt()
    except ConfigError:
        return "named"
    except Exception as error:  # the table counts what nobody expected
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return "crashed"


def count(fault: str, attempts: Iterator[Callable[[], str]]) -> Row:
    """Runs attempts and counts their outcomes."""
    return Row(fault, collections.Counter(outcome(attempt) for attempt in attempts))


# Kills


def kills(folder: Path, number: int, seed: int) -> list[Row]:
    """SIGKILL at random moments of one run; survived if all parameters and every figure are those of one unbroken."""
    place = Workplace(folder, folder / "programs", CONFIG)
    steps = ("--training.num-steps", str(8 * number + 16))
    unbroken, killed, draws = place.folder / "unbroken", place.folder / "killed", random.Random(seed)
    place.finish(place.command(unbroken, *steps), unbroken, patience=60 * number)
    for kill in range(number):
        print(f"kill {kill + 1} of {number}", file=sys.stderr)
        process = place.start(place.command(killed, *steps), killed)
        kill_one([process], 0, killed, 8 * kill + 2 * draws.randint(1, 4), draws)
    place.finish(place.command(killed, *steps), killed)
    try:
        place.assert_same_end(unbroken, killed)
        same = read_figures(unbroken) == read_figures(killed)
    except AssertionError:
        same = False
    return [Row("SIGKILL of a run", collections.Counter({"survived" if same else "silent": number}))]


# Checkpoints


def flip(path: Path, draws: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draws: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draws.randrange(path.stat().st_size)])


def zero(path: Path, draws: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, draws: random.Random) -> None:
    path.unlink()


DAMAGES = {
    "a flipped bit": flip,
    "a file cut short": truncate,
    "a file of zeros": zero,
    "a missing file": delete,
}


def damages(folder: Path, number: int, seed: int) -> list[Row]:
    """One file of the newest of two checkpoints damaged; survived if that one or the other is restored, bit by bit."""
    whole = folder / "whole"
    save(whole, 4, 6)
    draws = random.Random(seed)

    def attempt(damage: Callable[[Path, random.Random], None], run_dir: Path) -> str:
        shutil.copytree(whole, run_dir)
        paths = [path for path in (run_dir / "checkpoints" / "6").rglob("*") if path.is_file() and path.stat().st_size]
        damage(draws.choice(sorted(paths)), draws)
        with Checkpoints(run_dir, 3, lambda line: None) as checkpoints:
            restored = checkpoints.restore(LIKE)
        assert restored is not None
        try:
            assert_same_bits(restored.state, make_state(6 if int(restored.state.step) == 6 else 4))
        except AssertionError:
            return "silent"
        return "survived"

    shares = np.array_split(np.arange(number), len(DAMAGES))
    return [
        count(
            f"checkpoint: {name}",
            (lambda run_dir=folder / f"damaged{i}", damage=damage: attempt(damage, run_dir) for i in share),
        )
        for (name, damage), share in zip(DAMAGES.items(), shares, strict=True)
    ]


# Other files


def mutations(number: int, seed: int) -> list[Row]:
    """Mutated files of every kind that we read."""
    names = {"unchanged": "survived", "named": "named", "silent": "silent", "traceback": "crashed"}
    rows = []
    for kind in files.KINDS:
        found = collections.Counter(names[each.result] for each in files.outcomes(kind, number, seed))
        if not files.KINDS[kind].has_digest:  # whose other numbers nobody can notice: said in docs/weights.md
            found["no digest"] = found.pop("silent", 0)
        rows.append(Row(f"mutated file: {kind}", found))
    return rows


# Limits


def writers(folder: Path, number: int) -> Row:
    """A second writer; named if it is refused within a second."""
    run_dir = folder / "run"
    run_dir.mkdir()

    def attempt() -> str:
        start = time.monotonic()
        with lock_run(run_dir, print):
            try:
                with lock_run(run_dir, print):
                    return "silent"
            finally:
                assert time.monotonic() - start < 1
        return "silent"

    return count("a second writer", (attempt for _ in range(number)))


def limits(folder: Path, number: int) -> list[Row]:
    """Limits of descriptors while a checkpoint is read, and of sizes while one is written."""

    def limited(kind: int, value: int, attempt: Callable[[], Any]) -> None:
        before = resource.getrlimit(kind)
        resource.setrlimit(kind, (value, before[1]))
        try:
            attempt()
        finally:
            resource.setrlimit(kind, before)

    save(folder / "read", 4, 6)

    def too_few_descriptors() -> str:
        with Checkpoints(folder / "read", 3, print) as checkpoints:
            try:
                limited(resource.RLIMIT_NOFILE, 3, lambda: checkpoints.restore(LIKE))
            except CheckpointError:
                left = sorted(path.name for path in (folder / "read" / "checkpoints").iterdir())
                return "named" if left == ["4", "6"] else "silent"
        return "silent"

    def too_large_a_file(run_dir: Path) -> str:
        save(run_dir, 4)

        def write() -> None:
            with Checkpoints(run_dir, 3, print) as checkpoints:
                checkpoints.save(make_state(6, size=512), 6)
                checkpoints.wait()

        try:
            limited(resource.RLIMIT_FSIZE, 4096, write)
        except CheckpointError:
            with Checkpoints(run_dir, 3, print) as checkpoints:
                restored = checkpoints.restore(LIKE)
            return "named" if restored is not None and int(restored.state.step) == 4 else "silent"
        return "silent"

    return [
        count("too few descriptors at restore", (too_few_descriptors for _ in range(number))),
        count("a disk with no room at save", (lambda i=i: too_large_a_file(folder / f"w{i}") for i in range(number))),
    ]


def main() -> None:
    """Injects the faults and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("kills", "damage", "files", "limits"))
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs")
    parser.add_argument("--damages", type=int, default=110, help="damaged checkpoints")
    parser.add_argument("--mutations", type=int, default=200, help="mutations of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = arguments.only or ("limits", "damage", "files", "kills")

    def run(name: str, folder: Path) -> list[Row]:
        if name == "kills":
            return kills(folder, arguments.kills, arguments.seed)
        if name == "damage":
            return damages(folder, arguments.damages, arguments.seed)
        if name == "files":
            return mutations(arguments.mutations, arguments.seed)
        return [writers(folder, 10), *limits(folder, 5)]

    print(f"jax {jax.__version__}, seed {arguments.seed}\n")
    print(f"| fault | tries | {' | '.join(OUTCOMES)} |\n|---|{'---|' * (1 + len(OUTCOMES))}", flush=True)
    failed = 0
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            for row in run(name, Path(folder)):
                print(row, flush=True)
                failed += row.outcomes["silent"] + row.outcomes["crashed"]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
