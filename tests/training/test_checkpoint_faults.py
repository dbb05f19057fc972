"""What is wrong with a checkpoint, or with the machine that reads it, is told apart; only damage is set aside."""

from __future__ import annotations

import gc
import importlib
import json
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import checkpoint_files
from rwkv_jax.checkpoint_files import CheckpointError, DamagedError, is_damage, read_metadata
from rwkv_jax.json_object import with_digest
from rwkv_jax.training import checkpoints as ckpt
from tests.small_runs import assert_same_bits, names_in
from tests.training.saved import LIKE, make_state, restore, save, shapes_of

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def flip(folder: Path, rng: np.random.Generator) -> None:
    """Flips one bit of a file, drawn by size."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.array([path.stat().st_size for path in paths])
    path = paths[rng.choice(len(paths), p=sizes / sizes.sum())]
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def flips_that_pass(folder: Path, count: int, seed: int) -> list[str]:
    """What is wrong after single flips in the newest of two checkpoints; the older one must be restored, or the newest
    with all its bits."""
    rng, wrong = np.random.default_rng(seed), []
    save(folder / "whole", 4, 6)
    for number in range(count):
        run_dir = Path(shutil.copytree(folder / "whole", folder / str(number)))
        flip(run_dir / "checkpoints" / "6", rng)
        with ckpt.Checkpoints(run_dir, 3, lambda line: None) as checkpoints:
            state = restore(checkpoints)
        try:
            assert_same_bits(state, make_state(6 if int(state.step) == 6 else 4))
        except AssertionError:
            wrong.append(f"flip {number}")
    return wrong


def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    assert not flips_that_pass(tmp_path, 8, seed=0)


@pytest.mark.long
def test_a_hundred_flipped_bits_are_found_or_harmless(tmp_path: Path) -> None:
    assert not flips_that_pass(tmp_path, 100, seed=1)


def refused(run_dir: Path, message: str) -> None:
    """Restoring must fail with this message, and leave everything as it is."""
    before = names_in(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match=message), ckpt.Checkpoints(run_dir, 3, pytest.fail) as checkpoints:
        checkpoints.restore(LIKE)
    assert names_in(run_dir / "checkpoints") == before


@pytest.mark.parametrize(
    "fault",
    [
        PermissionError(13, "Permission denied"),
        OSError(24, "Too many open files"),
        MemoryError(),
        RuntimeError("can't start new thread"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_fault_of_the_machine_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    save(tmp_path, 4, 6)

    def load(*_: Any, **__: Any) -> Any:
        try:
            raise fault
        except Exception as error:
            raise ValueError("Failed to restore") from error

    monkeypatch.setattr(ckpt.ocp, "load", load)
    refused(tmp_path, r"checkpoints/6: cannot be read \(.*\); that proves no damage, so it stays as it is")


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, who may read everything.
    save(tmp_path, 4)
    path_open = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "_METADATA":
            raise PermissionError(13, "Permission denied", str(self))
        return path_open(self, *arguments, **options)

    assert is_damage(ValueError("something odd"), tmp_path / "checkpoints" / "4")
    monkeypatch.setattr(Path, "open", refuse)
    assert not is_damage(ValueError("something odd"), tmp_path / "checkpoints" / "4")


def test_too_few_descriptors_are_no_damage(tmp_path: Path) -> None:
    importlib.import_module("tracemalloc")  # which pytest would import when none is left
    save(tmp_path, 4, 6)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ckpt.Checkpoints(tmp_path, 3, pytest.fail) as checkpoints:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(CheckpointError, match="that proves no damage"):
                checkpoints.restore(LIKE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert int(restore(checkpoints).step) == 6
    gc.collect()  # what Orbax has left behind warns here, and not in the next module


def test_a_description_that_cannot_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax takes it for one that is not there."""
    save(tmp_path, 4, 6)
    read_bytes = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == "_CHECKPOINT_METADATA":
            raise OSError(24, "Too many open files", str(self))
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused(tmp_path, r"checkpoints/6: cannot be read \(.*_CHECKPOINT_METADATA: Too many open files\); that proves no")
    with ckpt.Checkpoints(tmp_path, 3, pytest.fail) as checkpoints:
        checkpoints.save_best(make_state(4), 4, 1.5)
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"best/4: cannot be read \(.*Too many open files\)"):
            checkpoints.best_loss()


def test_an_array_with_other_bits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 4)
    digests = ckpt.digest_tree

    def altered(tree: Any) -> dict[str, str]:
        return digests(tree) | {"params.blocks.k": "bfloat16[64] 0"}

    monkeypatch.setattr(ckpt, "digest_tree", altered)
    save(tmp_path, 6)
    monkeypatch.undo()
    said: list[str] = []
    with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
        assert int(restore(checkpoints).step) == 4
    assert "checkpoint of step 6 is damaged (params.blocks.k has other bits than were saved)" in said[0]


def test_a_checkpoint_right_before_bad_steps_is_passed_over_for_an_older_one(tmp_path: Path) -> None:
    save(tmp_path, 4, 6)
    said: list[str] = []
    with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
        restored = checkpoints.restore(LIKE, suspect=6)
        assert restored is not None
        assert int(restored.state.step) == 4
    assert said[0].startswith("checkpoint of step 6 is passed over, since the step after it was not finite; moved to")
    assert [name.rpartition("-")[0] for name in names_in(tmp_path / "checkpoints")] == ["", "suspect-6"]
    with ckpt.Checkpoints(tmp_path, 3, pytest.fail) as checkpoints:  # the only one is better than none
        restored = checkpoints.restore(LIKE, suspect=4)
    assert restored is not None


def test_a_renamed_checkpoint_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 4, 6)
    (tmp_path / "checkpoints" / "6").rename(tmp_path / "checkpoints" / "60")
    refused(tmp_path, r"checkpoints/60: holds the state after step 6, not 60; give the folder its own name back")


def test_exchanged_arrays_are_noticed(tmp_path: Path) -> None:
    save(tmp_path, 4, 6)
    folder = tmp_path / "checkpoints"
    (folder / "6" / "state").rename(tmp_path / "kept")
    (folder / "4" / "state").rename(folder / "6" / "state")
    (tmp_path / "kept").rename(folder / "4" / "state")
    refused(tmp_path, r"checkpoints/6: its folder `state` is of step 4, its description of step 6")


def test_the_state_of_another_optimizer_is_no_damage(tmp_path: Path) -> None:
    with ckpt.Checkpoints(tmp_path, 3, pytest.fail) as checkpoints:
        checkpoints.save(make_state(4)._replace(recent=jnp.zeros((2, 3))), 4)
    refused(tmp_path, r"checkpoints/4: is of another kind of run: it lacks nothing and has \['recent'\]")


def test_a_checkpoint_that_cannot_be_written_is_one_named_line(tmp_path: Path) -> None:
    """A limit of sizes of files stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save(tmp_path, 4)
    large = make_state(6, size=512)
    try:
        with (  # noqa: PT012  either of the two may raise
            pytest.raises(CheckpointError, match=r"checkpoints: cannot be written \(.*\); see to the disk") as error,
            ckpt.Checkpoints(tmp_path, 3, print) as checkpoints,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            checkpoints.save(large, 6)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    with ckpt.Checkpoints(tmp_path, 3, pytest.fail) as checkpoints:
        assert int(restore(checkpoints, shapes_of(make_state(4))).step) == 4


def test_an_error_does_not_wait_for_ever_for_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt, "MAX_CLOSE_SECONDS", 0.2)
    said: list[str] = []
    released, start = threading.Event(), time.monotonic()
    with pytest.raises(KeyError), ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:  # noqa: PT012
        close = checkpoints._latest.close
        monkeypatch.setattr(checkpoints._latest, "close", lambda: released.wait(120))
        raise KeyError("anything")
    assert time.monotonic() - start < 60
    released.set()
    close()
    assert said == ["a save did not end within 0.2 seconds, and is left; it will be no checkpoint"]


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: None,
        lambda packed: {},
        lambda packed: packed | {"step": "4"},
        lambda packed: packed | {"step": 5},
        lambda packed: packed | {"digest": packed["digest"][::-1]},
        lambda packed: {name: value for name, value in packed.items() if name != "digest"},
    ],
)
def test_a_description_with_other_bits_is_damaged(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    packed, path = with_digest({"step": 4, "digests": {}}), tmp_path / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({"custom_metadata": packed}))
    assert read_metadata(tmp_path) == packed
    path.write_text(json.dumps({"custom_metadata": change(packed)}))
    with pytest.raises(DamagedError):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"custom_metadata": 1, "custom_metadata": 1}']
)
def test_a_description_that_is_no_json_object_is_damaged(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DamagedError, match="its description is missing"):
        read_metadata(tmp_path)
    (tmp_path / "_CHECKPOINT_METADATA").write_bytes(content)
    with pytest.raises(DamagedError):
        read_metadata(tmp_path)


def test_the_system_says_why() -> None:
    error = ValueError("many\nlines")
    error.__cause__ = FileNotFoundError(2, "No such file or directory", "/tmp/missing")
    assert checkpoint_files.first_line(error) == "/tmp/missing: No such file or directory"
    assert checkpoint_files.first_line(ValueError("  one\ntwo")) == "one"
    assert checkpoint_files.first_line(ValueError()) == "ValueError"
    assert checkpoint_files.first_line(ExceptionGroup("both", [OSError(28, "No space left on device")])) == (
        "No space left on device"
    )
