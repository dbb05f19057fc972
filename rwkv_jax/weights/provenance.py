"""What is known of where weights are from: of a run from its folder, of files from their place and their metadata."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_jax.config import OF_TEXT, TrainConfig, from_dict
from rwkv_jax.file_kinds import METRICS_FILE
from rwkv_jax.run_folder import INITIAL_WEIGHTS, MADE_WITH, newest_step, read_run_file
from rwkv_jax.versions import versions
from rwkv_jax.weights.card import Provenance
from rwkv_jax.weights.hub import origin_of
from rwkv_jax.weights.sources import find_weights, hub_name, is_hub_name, read_tensors
from rwkv_jax.weights.tensors import WeightsError

_TOLD_ELSEWHERE = ("data.source", "data.mixture", "data.cache_dir", "data.tokenizer", "training.num_steps")
_SECTIONS = ("data", "optimizer", "training", "tuning", "preference", "grpo", "distillation")


def provenance_of(path: Path, *, step: int | None = None, ema: bool = False) -> Provenance:
    """What is known of a file of weights or a run, as `find_weights` has found it; reads no weights.

    Args:
      step, ema: of a run, which checkpoint is taken, None for the newest; and whether its averages are.
    """
    if path.is_dir():
        return _of_run(path, step, ema)
    if (origin := origin_of(path)) is not None:
        source = f"{origin.name} on the Hugging Face hub, {path.name}, commit {origin.commit}"
        return Provenance(source=_with_hash(source, path), base_model=origin.name)
    return Provenance(source=_with_hash(f"the file {path.name}", path))


def provenance_of_source(source: str | os.PathLike[str]) -> Provenance:
    """`provenance_of` what a caller names; of a model of the hub that is not here the name alone, fetching nothing."""
    path = Path(source).expanduser()
    if path.exists():
        return provenance_of(find_weights(path))
    if (name := hub_name(source)) is None:
        raise WeightsError(f"source = {str(source)!r}: is no file or folder here, and no name on the Hugging Face hub")
    return Provenance(source=f"{name} on the Hugging Face hub", base_model=name)


def _with_hash(source: str, path: Path) -> str:
    """A source with the hash that its file has of its tensors, if it is one of ours."""
    if not path.name.endswith((".safetensors", ".safetensors.index.json")):
        return source
    found = read_tensors(path)[0].content_sha256
    return source if found is None else f"{source}, SHA-256 of its tensors {found}"


def _of_run(run_dir: Path, step: int | None, ema: bool) -> Provenance:
    saved = read_run_file(run_dir)
    config = from_dict(saved["config"])
    step = newest_step(run_dir) if step is None else step
    made_with = dict(saved.get(MADE_WITH, {}))
    name, _, commit = made_with.pop(INITIAL_WEIGHTS, "").partition("@")
    of_hub = name if is_hub_name(name) else None
    training = training_rows(config, saved["identity"], step)
    if of_hub is not None:
        training["started from"] = f"{of_hub} on the Hugging Face hub, commit {commit}"
    return Provenance(
        source="a run of rwkv train" + (", the averages of its weights" if ema else ""),
        base_model=of_hub,
        relation=None if of_hub is None else "finetune",
        training=training,
        settings=settings_of(config),
        results=result_rows(list(_records(run_dir / METRICS_FILE)), step),
        trained_with=made_with,
    )


def describe_maker(config: TrainConfig, saved: Mapping[str, Any] | None) -> dict[str, str]:
    """What run.json has of what trains a run; where its initial weights were from stays as it was when it began.

    Args:
      saved: run.json of a run that is resumed.
    """
    if saved is not None:
        begun = saved.get(MADE_WITH, {})
        return versions() | {name: value for name, value in begun.items() if name == INITIAL_WEIGHTS}
    origin = None if config.initial_weights is None else origin_of(find_weights(config.initial_weights))
    return versions() | ({} if origin is None else {INITIAL_WEIGHTS: f"{origin.name}@{origin.commit}"})


def training_rows(config: TrainConfig, identity: Mapping[str, Any], step: int | None) -> dict[str, str]:
    """How a run was trained up to a step, by what each line is called.

    Args:
      identity: of the run, with fingerprints.
      step: of the checkpoint; None is not known.
    """
    training, optimizer, data = config.training, config.optimizer, config.data
    rows: dict[str, str] = {}
    if config.initial_weights is not None:
        rows["started from"] = public_name(config.initial_weights)
    if step is not None:
        rows["steps"] = f"{step:,} of {training.num_steps:,}"
        if training.objective in OF_TEXT:  # others have rows of their own, of which a step may read more or fewer
            tokens = (step - training.first_step) * training.batch_size * training.sequence_length
            rows["tokens seen"] = f"{tokens:,}, in rows of {training.sequence_length:,}, {training.batch_size} a step"
    rows["minimized"] = training.objective
    sources = [f"{public_name(source)} ({share:g})" for source, share in data.mixture]
    rows["data"] = ", ".join(sources) if sources else public_name(data.source)
    for name, field in (("fingerprint of the data", "corpus"), ("fingerprint of the tokenizer", "tokenizer")):
        if isinstance(found := identity.get(field), str):
            rows[name] = found
    rows["learning rate"] = (
        f"{optimizer.learning_rate:g} to {optimizer.final_learning_rate:g} ({optimizer.schedule}), after "
        f"{optimizer.warmup_steps} steps of warm-up"
    )
    rows["weight decay"] = f"{optimizer.weight_decay:g}"
    rows["seed"] = str(config.seed)
    if config.tuning.is_partial:
        named = [name for name in ("adapter", "also", "state") if getattr(config.tuning, name)]
        rows["trained of the base"] = ", ".join(named)
        if isinstance(base := identity.get("tuning.base"), str):
            rows["digest of the base's numbers"] = base
    return rows


def settings_of(config: TrainConfig) -> dict[str, str]:
    """The settings of a run that are not the defaults, without paths of the machine that it ran on."""
    found: dict[str, str] = {}
    for section in _SECTIONS:
        own = getattr(config, section)
        for field in dataclasses.fields(own):
            value, name = getattr(own, field.name), f"{section}.{field.name}"
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if name not in _TOLD_ELSEWHERE and value != default:
                found[name] = str(_without_paths(value))
    return found


def result_rows(records: list[Mapping[str, Any]], step: int | None) -> dict[str, str]:
    """The last evaluation up to a step, and the last metrics of tasks, by what each line is called.

    Args:
      records: of a run's metrics.jsonl.
    """
    rows: dict[str, str] = {}
    for kind in ("evaluation", "task"):
        known = [record for record in records if record["kind"] == kind and (step is None or record["step"] <= step)]
        if not known:
            continue
        last = max(known, key=lambda record: record["step"])
        for name, value in last.items():
            is_figure = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if name in ("kind", "step") or not is_figure or name.endswith("_stderr"):
                continue
            shown = {"bits_per_byte": "bits a byte, held out", "loss": "loss, held out"}.get(name, name)
            error = last.get(f"{name}_stderr")
            spread = f" +- {error:.2g}" if isinstance(error, int | float) else ""
            rows[shown] = f"{value:.5g}{spread}, after step {last['step']:,}"
    return rows


def public_name(source: str) -> str:
    """A source without the path of this machine."""
    return str(_without_paths(source))


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        return Path(value.replace("\\", "/")).name if "/" in value or "\\" in value else value
    if isinstance(value, tuple | list):
        return ", ".join(str(_without_paths(each)) for each in value)
    return f"{value:g}" if isinstance(value, float) else value


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Lines of a metrics.jsonl that can be understood; a card does not fail for others."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int):
            yield record
