"""The fastest implementation by measurement of an operator, or of a step, kept in a file of the user's cache folder.

A measurement holds for one kind of device, one workload and one version of JAX, of its compilers and of the kernels;
anything else is measured anew. Given the file, the choice is always the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import rwkv_kernels
from rwkv_jax import host, trying
from rwkv_jax.atomic import replace_file
from rwkv_jax.checks import ConfigError, is_number
from rwkv_jax.config import ModelConfig
from rwkv_jax.json_object import is_unchanged, parse_object, with_digest
from rwkv_jax.parallel.mesh import device_memory
from rwkv_jax.run_lock import take_lock
from rwkv_kernels import autotune, dispatch
from rwkv_kernels.autotune import Trial, Tuning, Workload

VARIABLE = "RWKV_JAX_TUNING"
"""Environment variable that names another file."""

FORMAT = "rwkv-jax tuning 1"

PREFILL_STEPS = 512
"""Tokens of the prompt whose prefill is measured, as many as `EngineOptions.prefill_length` is unless it is set; and
the fewest for which what was measured is taken."""

DECODED_TOKENS = 32
"""Tokens that are decoded one by one where that is measured."""


_MAX_WAIT = 60.0  # seconds for another process to write the file, which takes milliseconds


class TuningFileError(ConfigError):
    """A file that holds no measurements of ours, or is damaged; the message has its path and the remedy."""


def default_path(environment: Mapping[str, str] | None = None) -> Path:
    """The file of measurements: the one that `VARIABLE` names, or `rwkv-jax/tuning.json` in the user's cache folder."""
    environment = os.environ if environment is None else environment
    given = environment.get(VARIABLE)
    return Path(given).expanduser() if given else host.cache_folder(environment) / "tuning.json"


def training_workload(
    config: ModelConfig, rows: int, num_steps: int, *, tensor: int = 1, packed: bool = True
) -> Workload | None:
    """The operator's calls in a training step, as one device of the mesh makes them; None without an operator.

    Args:
      rows, num_steps: of a device.
      tensor: devices that split the heads.
      packed: whether rows have several documents.
    """
    return _workload(config, rows, num_steps, tensor, gradients=True, packed=packed)


def prefill_workload(config: ModelConfig) -> Workload | None:
    """The operator's call in the prefill of a prompt by the engine, on one device; None without an operator."""
    return _workload(config, 1, PREFILL_STEPS, 1, gradients=False, packed=False)


def decoding_workload(config: ModelConfig, rows: int) -> Workload | None:
    """What the heads of a layer do while rows are decoded on one device; None where no function does all of it."""
    if "step_implementation" not in config.spec.own_fields:
        return None
    shape = (rows, DECODED_TOKENS, config.num_heads, config.head_dim, config.head_dim)
    return autotune.workload_here("wkv7_step", shape, config.dtype, gradients=False)


def _workload(
    config: ModelConfig, rows: int, num_steps: int, tensor: int, *, gradients: bool, packed: bool
) -> Workload | None:
    if config.spec.operator is None:
        return None
    heads, key_dim, value_dim = config.spec.operator_sizes(config)
    shape = (rows, num_steps, heads // tensor, key_dim, value_dim)
    return autotune.workload_here(config.spec.operator, shape, config.dtype, gradients=gradients, packed=packed)


def measure(workload: Workload, path: Path | None = None, *, again: bool = False) -> Tuning:
    """Checks and times all implementations; see `rwkv_kernels.autotune.tune`.

    One that hung in an earlier process, or took it with it, is named and left out; never one that the table takes.

    Args:
      path: the file of measurements, beside which such are marked; None is the user's.
      again: whether to try them again.
    """
    known = (rwkv_kernels.OPERATORS | rwkv_kernels.PARTS)[workload.operator]
    path, trusted = path or default_path(), known.preferred(workload.problem)
    marks = {name: _mark(path, workload, name) for name in known.implementations if name not in trusted}
    if again:
        for mark in marks.values():
            trying.forget(mark)
    since = {name: trying.left_since(mark) for name, mark in marks.items()}
    left_out = {
        name: f"not tried: it did not come back from a trial that began {begun}; {trying.REMEDY}"
        for name, begun in since.items()
        if begun is not None
    }
    if workload.problem.platform == "cpu":
        memory = host.memory()
        memory = None if memory is None else memory // 2
    else:
        memory = device_memory(jax.local_devices()[0])

    def marked(name: str) -> contextlib.AbstractContextManager[None]:
        return trying.marked(marks[name]) if name in marks else contextlib.nullcontext()

    return autotune.tune(workload, memory=memory, left_out=left_out, trying=marked)


def find(path: Path, workload: Workload) -> Tuning | None:
    """The measurement of a workload here, or None; one whose choice is no longer there is none.

    Raises:
      TuningFileError: the file is not one of ours, or is damaged.
    """
    trials = _read(path).get(_key(workload))
    if trials is None:
        return None
    tuning = Tuning(workload, trials)
    known = (rwkv_kernels.OPERATORS | rwkv_kernels.PARTS).get(workload.operator)
    if known is None:  # a product, whose forms can all run
        return tuning
    chosen = known.implementations.get(tuning.chosen or "")
    return tuning if chosen is not None and chosen.refuses(workload.problem) is None else None


def find_or_measure(workload: Workload, measure: Callable[[Workload], Tuning] = measure) -> Tuning:
    """The measurement of a workload from the user's file; made now, and kept there, if there is none.

    A file that cannot be used or written is warned of.
    """
    path = default_path()
    try:
        found = find(path, workload)
    except TuningFileError:  # of which `keep` warns
        found = None
    if found is not None:
        return found
    tuning = measure(workload)
    if tuning.is_lasting:
        try:
            keep(path, tuning)
        except (TuningFileError, OSError) as error:
            warnings.warn(f"not kept: {error}", stacklevel=4)
    return tuning


def kept_here(path: Path) -> list[Tuning]:
    """The measurements of operators and parts in a file that hold on this device, with these versions.

    Raises:
      TuningFileError: the file is not one of ours, or is damaged.
    """
    tunings = []
    for key, trials in _read(path).items():
        of = json.loads(key)
        if of["operator"] not in rwkv_kernels.OPERATORS | rwkv_kernels.PARTS:
            continue
        problem = dispatch.problem_here(tuple(of["shape"]), of["recurrence"])
        workload = Workload(of["operator"], problem, of["inputs"], of["gradients"], of["packed"])
        if _key(workload) == key:
            tunings.append(Tuning(workload, trials))
    return tunings


def measured_prefill(config: ModelConfig, platform: str) -> str | None:
    """The implementation that was measured to be the fastest in prefill, on a GPU or TPU; None where nothing was.

    A file that cannot be used is warned of.
    """
    workload = prefill_workload(config)
    if platform == "cpu" or config.wkv_implementation is not None or workload is None:
        return None
    try:
        found = find(default_path(), workload)
    except TuningFileError as error:
        warnings.warn(f"not used: {error}", stacklevel=3)
        return None
    return None if found is None else found.chosen


def keep(path: Path, tuning: Tuning) -> None:
    """Adds a measurement to the file, in place of an earlier one of the same workload; other processes may do so, too.

    Raises:
      TuningFileError: what is there is not one of ours, or is damaged; it stays as it is.
      OSError: the folder cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path):
        entries = _read(path) | {_key(tuning.workload): tuning.trials}
        listed = [
            {"of": json.loads(key), "trials": [_finite(trial) for trial in trials]} for key, trials in entries.items()
        ]
        replace_file(path, json.dumps(with_digest({"format": FORMAT, "entries": listed}), indent=1).encode())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from changing the file meanwhile, except on file systems without locks."""
    lock_path = path.with_name(f".{path.name}.lock")
    lock, _ = take_lock(lock_path, _MAX_WAIT)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock_path.unlink()  # while it is held: who waits for it finds it gone, and makes a new one
        lock.release()


def describe(path: Path) -> list[str]:
    """What a file of measurements holds, a line each; those of other versions are marked.

    Raises:
      TuningFileError: the file is not one of ours, or is damaged.
    """
    entries = _read(path)
    lines = [f"measured operators: {len(entries) or 'none yet'} in {path}"]
    here = _versions()
    for key, trials in entries.items():
        of = json.loads(key)
        sizes = " ".join(f"{letter}{size}" for letter, size in zip("BTHNM", of["shape"], strict=True))
        how = ("with gradients" if of["gradients"] else "forward") + (", packed" if of["packed"] else "")
        fastest = min(((trial.seconds, trial.name) for trial in trials if trial.seconds is not None), default=None)
        found = "none is right" if fastest is None else f"{fastest[1]}, {1e3 * fastest[0]:.3f} ms"
        old = "" if here.items() <= of.items() else "; of another version, not used"
        lines.append(f"  {of['operator']} {sizes} {of['inputs']} on {of['device']}, {how}: {found}{old}")
    for mark in sorted(_marks(path).glob("* by *")):
        if (since := trying.left_since(mark)) is not None:
            tried = mark.name.partition(",")[0]
            lines.append(f"  {tried}: did not come back from a trial that began {since}; {trying.REMEDY}")
    return lines


def _versions() -> dict[str, str]:
    return {"jax": ", ".join([jax.__version__, *_compilers()]), "kernels": _kernels_digest()}


@functools.cache
def _compilers() -> tuple[str, ...]:
    """The installed packages that compile for a device, with their versions."""
    found = []
    for name in ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return tuple(found)


@functools.cache
def _kernels_digest() -> str:
    """Of the kernels' source, which changes oftener than the package's version."""
    folder, digest = Path(rwkv_kernels.__file__).parent, hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _key(workload: Workload) -> str:
    """All that a measurement depends on, as JSON."""
    problem = workload.problem
    device = problem.device_kind
    if problem.platform == "cpu":  # whose kind is "cpu", whatever it is
        device = f"{host.processor()}, {host.available_cores()} cores"
    of = {
        "operator": workload.operator,
        "shape": problem.shape,
        "recurrence": problem.dtype,
        "inputs": workload.inputs,
        "gradients": workload.gradients,
        "packed": workload.packed,
        "platform": problem.platform,
        "device": device,
    }
    return json.dumps(of | _versions(), sort_keys=True)


def _marks(path: Path) -> Path:
    """The folder of marks of a file of measurements."""
    return path.with_name(f".{path.name}.trying")


def _mark(path: Path, workload: Workload, name: str) -> Path:
    """Of an implementation on this device, with these versions, whatever its sizes."""
    of = json.loads(_key(workload))
    on = json.dumps([of[key] for key in ("platform", "device", "jax", "kernels")])
    digest = hashlib.blake2b(on.encode(), digest_size=8).hexdigest()
    return _marks(path) / f"{workload.operator} by {name}, {digest}"


def _finite(trial: Trial) -> Trial:
    """Without an infinite error, which JSON does not have; its failure tells."""
    return trial if trial.error is None or math.isfinite(trial.error) else trial._replace(error=None)


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("operator", "recurrence", "inputs", "platform", "device", "jax", "kernels"), str),
    **dict.fromkeys(("gradients", "packed"), bool),
    "shape": list,
}


def _read(path: Path) -> dict[str, tuple[Trial, ...]]:
    """The file's trials by key; nothing if there is no file."""
    remedy = f"delete it to measure again, or name another file with --cache or {VARIABLE}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TuningFileError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    parsed = parse_object(content, path, TuningFileError, remedy)
    if parsed.get("format") != FORMAT:
        raise TuningFileError(f"{path}: is no file of measurements of this version ({FORMAT!r}); {remedy}")
    if not is_unchanged(parsed, required=True):
        raise TuningFileError(f"{path}: has changed since it was written, its digest is another; {remedy}")
    entries: Any = parsed.get("entries")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise TuningFileError(f"{path}: has an entry that is no measurement; {remedy}")
    return {
        json.dumps(entry["of"], sort_keys=True): tuple(Trial(*trial) for trial in entry["trials"]) for entry in entries
    }


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(of := entry.get("of"), dict) or of.keys() != _KINDS.keys():
        return False
    if any(type(of[name]) is not kind for name, kind in _KINDS.items()) or len(of["shape"]) != 5:
        return False
    return isinstance(entry.get("trials"), list) and all(map(_is_trial, entry["trials"]))


def _is_trial(trial: Any) -> bool:
    if not isinstance(trial, list) or len(trial) != len(Trial._fields):
        return False
    name, error, seconds, failure = trial
    numbers = all(x is None or (is_number(x) and math.isfinite(x)) for x in (error, seconds))
    return isinstance(name, str) and numbers and (failure is None or isinstance(failure, str))
