"""Run folders: a run's config, identity and model, read without trainer or optimizer.

A run folder contains

    run.json        the run's config and its identity: settings and fingerprints that must match to resume it
    tokenizer.model the tokenizer, so that sampling does not need the corpus; a given tokenizer.json keeps its name,
                    World and bytes are saved as tokenizer.kind.json
    checkpoints/    the newest steps, named by the number of steps taken
    best/           the step with the lowest held-out loss
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.sharding import SingleDeviceSharding

from rwkv_jax.atomic import replace_file
from rwkv_jax.checkpoint_files import (
    CheckpointError,
    DamagedError,
    changed_arrays,
    first_line,
    is_damage,
    open_checkpoints,
    read_metadata,
    writing,
)
from rwkv_jax.config import ApplicationConfig, ConfigError, ModelConfig, TrainConfig, TuningConfig, from_dict, to_dict
from rwkv_jax.config.model import IMPLEMENTATIONS
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.file_kinds import RUN_FILE as RUN_FILE
from rwkv_jax.file_kinds import Kind, describe_wrong_file, is_url
from rwkv_jax.json_object import is_unchanged, parse_object, with_digest
from rwkv_jax.models import abstract_model
from rwkv_jax.models.tuned import kept_shapes, merge_nested, set_at
from rwkv_jax.parallel.mesh import default_device
from rwkv_jax.tables import format_table

CHECKPOINTS = "checkpoints"
BEST = "best"
SET_ASIDE = "set-aside-"

MADE_WITH = "made_with"
"""What run.json has of what trained the run, by name: versions, and where on the hub its initial weights are from."""

INITIAL_WEIGHTS = "initial weights"
"""The name of the latter, OWNER/NAME@COMMIT."""

_CHAT = ("chat_format", "chat_loss", "chat_rows", "chat_too_long")  # what chats become besides tokens


def identity(
    config: TrainConfig,
    corpus_fingerprint: str,
    tokenizer_fingerprint: str,
    base: str | None = None,
    first_state: str | None = None,
    teacher: str | None = None,
) -> dict[str, Any]:
    """Fields that must not change when a run is resumed: the model and everything that determines the data order.

    Excluded are compute dtype and implementations, which change only rounding; the size of a Transformer's
    key-value cache, which training does not use; and the number of steps, so that a run can be extended.

    Args:
      base: digest of a tuning run's base, by which it is known wherever it lies; None for other runs.
      first_state: digest of the state that is tuned on, likewise; None takes the path that the config names.
      teacher: that of a distillation's teacher.
    """
    model = dataclasses.asdict(config.model.resolved())
    others = ("dtype", *IMPLEMENTATIONS, "context_length", "rosa_implementation")
    own = {name: None if value == () else _shown(value) for name, value in model.items() if name not in others}
    of_application: dict[str, Any] = {}
    if isinstance(config, ApplicationConfig):
        settings = {name: _shown(value) for name, value in config.own_settings().items()}
        of_application = {"application": config.application} | settings
    return (
        {f"model.{name}": value for name, value in own.items()}
        | of_application
        | {
            "initial_weights": None if config.tuning.is_partial else config.initial_weights,
            **_tuning_identity(config.tuning, base, first_state),
            "seed": config.seed,
            "data.order": config.data.order,  # the corpus's fingerprint includes the mixture
            "data.magic_prime": config.data.magic_prime,
            "training.first_step": config.training.first_step,
            # Whether, not how much: the optimizer then counts steps, and its state has another form.
            "optimizer.weight_decay_final is set": config.optimizer.weight_decay_final is not None,
            "training.batch_size": config.training.batch_size,
            "training.sequence_length": config.training.sequence_length,
            "training.reset_at_documents": config.training.reset_at_documents,
            "training.carry_state": config.training.carry_state,
            "training.spike_window": None if config.training.spike_factor is None else config.training.spike_window,
            **({f"data.{name}": getattr(config.data, name) for name in _CHAT} if config.data.chat is not None else {}),
            **({} if teacher is None else {"distillation.teacher": teacher}),
            "training.objective": None if config.training.objective == "next_token" else config.training.objective,
            "corpus": corpus_fingerprint,
            "tokenizer": tokenizer_fingerprint,
        }
    )


BASE = "tuning.base"
"""The field of a run's identity that has the digest of a tuning run's base."""

FIRST_STATE = "tuning.initial_state"
"""The field that has the digest of the state that is tuned on; its path, in runs of earlier versions."""


def _tuning_identity(tuning: TuningConfig, base: str | None, first_state: str | None) -> dict[str, Any]:
    """What must not change of a tuning run: its base, and what determines which arrays it trains."""
    if not tuning.is_partial:
        return {}
    free = ("dropout", "decay", "allow_other_base", "state_rate")
    fields = {name: value for name, value in dataclasses.asdict(tuning).items() if name not in free}
    return {f"tuning.{name}": _shown(value) for name, value in fields.items()} | {
        BASE: base,
        FIRST_STATE: first_state or tuning.initial_state,
    }


def _shown(value: Any) -> Any:
    """A field as run.json has it, which knows no tuples."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def refuse_difference(
    saved: Mapping[str, Any],
    present: Mapping[str, Any],
    place: str,
    what: str = "another run; use its settings to resume it, or name another run_dir",
) -> None:
    """Raises ConfigError with a table of the fields in which the saved and current identities differ."""

    def shown(fields: Mapping[str, Any], name: str) -> str:
        # A switch that is off is as one that a run of an earlier version did not have.
        value = fields.get(name)
        return "-" if value is None or value is False else str(value)

    rows = [(name, shown(saved, name), shown(present, name)) for name in sorted(saved.keys() | present.keys())]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return
    rows.insert(0, ("field", "saved", "now"))
    table = format_table(rows, "<<<")
    raise ConfigError(f"{place} holds {what}:\n{table}")


def prepare_run_dir(run_dir: Path) -> dict[str, Any] | None:
    """Checks that a folder can be used for a run, before any work is done.

    Returns:
      The content of its run.json, or None for a new run.

    Raises:
      ConfigError: the folder cannot be written, or contains files that are not a run's.
    """
    if is_url(run_dir):
        raise ConfigError(f"run_dir = {str(run_dir)!r}: is a web address, not a path; name a folder of this machine")
    _refuse_characters(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # A random name: processes on several hosts may have the same number.
        with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".write-test-"):
            pass
    except OSError as error:
        raise ConfigError(f"run_dir = {str(run_dir)!r}: cannot be written ({error}); name another folder") from error
    run_file = run_dir / RUN_FILE
    if run_file.exists():
        return read_run_file(run_dir)
    foreign = sorted(path.name for path in run_dir.iterdir() if not path.name.startswith((".", SET_ASIDE)))
    if foreign:
        raise ConfigError(
            f"run_dir = {str(run_dir)!r}: holds {foreign[0]!r} but no {RUN_FILE}, so it is no run of ours; "
            "name a new or empty folder"
        )
    return None


def _refuse_characters(run_dir: Path) -> None:
    """Refuses names in which TensorStore cannot keep arrays, before anything is written."""
    for character in str(run_dir.absolute()):
        what = None
        if character == "\\":
            what = "a backslash, which is taken for a separator of folders"
        elif "\ud800" <= character <= "\udfff":
            what = f"the byte 0x{ord(character) & 0xFF:02x}, which is not UTF-8"
        elif character == "\0":
            what = "a zero byte"
        if what is not None:
            raise ConfigError(f"run_dir = {str(run_dir)!r}: has {what}, so no array can be saved there; name another")


def set_aside(run_dir: Path, report: Callable[[str], None]) -> None:
    """Moves all that a run has left into a new folder `set-aside-N` in its own; what is there already stays."""
    if not (run_dir / RUN_FILE).exists():  # another process has done it
        return
    numbers = [path.name.removeprefix(SET_ASIDE) for path in run_dir.glob(f"{SET_ASIDE}*")]
    aside = run_dir / f"{SET_ASIDE}{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"
    with writing(aside):
        aside.mkdir()
        found = [path for path in run_dir.iterdir() if not path.name.startswith((".", SET_ASIDE))]
        for path in sorted(found, key=lambda path: path.name == RUN_FILE):  # last, so that a broken move is done again
            path.rename(aside / path.name)
    report(f"what the run has left is in {aside} now; it begins again")


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """Config and identity of a run, and what it has recorded of choices and `MADE_WITH`, from its run.json.

    Raises:
      ConfigError: it is missing or damaged, or has changed since it was written.
    """
    path = run_dir / RUN_FILE
    try:
        content = parse_object(path.read_bytes(), "its content")
        if not all(isinstance(content.get(part), dict) for part in ("config", "identity")):
            raise ConfigError("config or identity is missing")
        for part in ("choices", MADE_WITH):
            names = content.get(part, {})
            if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
                raise ConfigError(f"{part} are no names")
    except FileNotFoundError as error:
        raise ConfigError(f"{str(run_dir)!r}: is no run folder, it has no {RUN_FILE}") from error
    except (OSError, ConfigError) as error:
        wrong = describe_wrong_file(path, "the folder of a run", ["json"])
        reason = f": it {wrong}" if wrong else ""
        raise ConfigError(f"{path}: cannot be read as a run's description ({error}){reason}") from error
    if not is_unchanged(content):
        raise ConfigError(
            f"{path}: has changed since it was written, its digest is another; put the file back, or, if it was to be "
            "changed, take the digest out of it"
        )
    return {part: content[part] for part in ("config", "identity", "choices", MADE_WITH) if part in content}


def write_run(
    run_dir: Path,
    config: TrainConfig,
    run_identity: Mapping[str, Any],
    tokenizer: Tokenizer,
    choices: Mapping[str, str] | None = None,
    made_with: Mapping[str, str] | None = None,
) -> None:
    """Writes run.json, by which the folder is recognized as a run, then the tokenizer.

    Args:
      choices: what the run takes where the config leaves it open, by name; a resumed run keeps to it.
      made_with: `MADE_WITH`.
    """
    content = {"config": to_dict(config), "identity": dict(run_identity)}
    for name, value in (("choices", choices), (MADE_WITH, made_with)):
        if value:
            content[name] = dict(value)
    replace_file(run_dir / RUN_FILE, json.dumps(with_digest(content), indent=2).encode())
    replace_file(run_dir / tokenizer.saved.name, tokenizer.saved.content)


class LoadedModel(NamedTuple):
    """A trained model."""

    config: TrainConfig
    graphdef: Any
    """`nnx.merge(graphdef, params)` is the model."""
    params: Any
    step: int
    """Number of steps trained."""


def run_config(run_dir: Path) -> TrainConfig:
    """The config of a run.

    Raises:
      ConfigError: the folder is not a run.
    """
    return from_dict(read_run_file(run_dir)["config"])


def newest_step(run_dir: Path) -> int | None:
    """The step of a run's newest checkpoint, by the names of folders; None if there is none."""
    folder = run_dir / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


def load_run_tokenizer(run_dir: Path) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
      ConfigError: the folder is not a run, or its tokenizer has changed.
    """
    run = read_run_file(run_dir)
    tokenizer = load_tokenizer(run_dir, from_dict(run["config"]).model.vocab_size)
    if tokenizer.fingerprint != run["identity"].get("tokenizer", tokenizer.fingerprint):
        raise ConfigError(
            f"{run_dir / tokenizer.saved.name}: has changed since the run was begun; put back the file that was there"
        )
    return tokenizer


def load_model(
    run_dir: Path,
    which: Literal["newest", "best"],
    shardings: Callable[[ModelConfig], Any] | None = None,
    *,
    ema: bool = False,
) -> LoadedModel:
    """Loads the model of a run's newest or best checkpoint; nothing else of it is read.

    Of a tuning run this is what it has trained, without its base, on the first device (`weights.pretrained.load_run`
    has both).

    Args:
      shardings: maps the model's config to a nested dict of shardings; None is the first device.
      ema: takes the averages of training.ema_decay in the place of the trained weights.

    Raises:
      ConfigError: the folder is not a run, or the checkpoint is missing or damaged.
    """
    config = run_config(run_dir)
    if isinstance(config, ApplicationConfig):
        raise ConfigError(
            f"{str(run_dir)!r}: is a run of the application {config.application}, not of a language model; load it "
            "with rwkv_jax.training.application.load_application"
        )
    graphdef, shapes = abstract_model(config.model)
    if config.tuning.is_partial:
        shapes, shardings = kept_shapes(config.tuning, config.model), None
    if shardings is None:
        placed = jax.tree.map(lambda _: SingleDeviceSharding(default_device()), shapes)
    else:
        placed = shardings(config.model)
    like = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, placed)
    tree, place, step = _load(run_dir, which, lambda saved: with_averages(like, saved) if ema else {"params": like})
    if ema and "ema" not in tree:
        raise ConfigError(f"{place}: has no averages of weights, which training.ema_decay keeps; leave ema out")
    return LoadedModel(config, graphdef, merge_nested(tree.get("params", {}), tree.get("ema", {})), step)


def load_part(
    run_dir: Path, which: Literal["newest", "best"], wanted: Callable[[TrainConfig, Mapping[str, str]], Any]
) -> Any:
    """Loads some arrays of a run's newest or best checkpoint onto the first device.

    Args:
      wanted: from the run's config and the paths of what was saved, a nested dict of the shapes to load, from
        TrainState's fields down.

    Raises:
      ConfigError: as `load_model`, or as `wanted`.
    """
    config, one = run_config(run_dir), SingleDeviceSharding(default_device())

    def placed(saved: Mapping[str, str]) -> Any:
        shapes = wanted(config, saved)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)

    return _load(run_dir, which, placed)[0]


def _load(
    run_dir: Path, which: Literal["newest", "best"], wanted: Callable[[Mapping[str, str]], Any]
) -> tuple[Any, Path, int]:
    """What is wanted of a checkpoint, given the paths of all that was saved; its folder, and its step."""
    folder = run_dir / (BEST if which == "best" else CHECKPOINTS)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: holds no checkpoint yet; train the run first")

    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, open_checkpoints(folder, None) as checkpointer:
        if checkpointer.latest is None:
            raise ConfigError(f"{folder}: holds no checkpoint yet; train the run first")
        step = checkpointer.latest.step
        place = folder / str(step)
        try:
            metadata = read_metadata(place)
            tree = checkpointer.load(step, wanted(metadata["digests"]))
            if changed := changed_arrays(tree, metadata["digests"]):
                raise DamagedError(f"{changed[0]} has other bits than were saved")
        except Exception as error:  # whatever Orbax raises for a damaged file, report path and remedy
            if isinstance(error, ConfigError) and not isinstance(error, CheckpointError):
                raise  # of `wanted`
            if not isinstance(error, DamagedError) and not is_damage(error, place):
                remedy = "that proves no damage; mend the cause"
            else:
                mended = "resume the run, which takes the one before" if which == "newest" else "take the newest one"
                remedy = _describe_broken_files(place) or mended
            raise CheckpointError(f"{place}: cannot be read ({first_line(error)}); {remedy}") from error
        if metadata["step"] != step:
            raise CheckpointError(
                f"{place}: holds the state after step {metadata['step']}; give the folder its own name back"
            )
    return tree, place, step


def with_averages(params: Any, saved: Mapping[str, str]) -> dict[str, Any]:
    """What to load of a checkpoint: the averages that it has of parameters, and the parameters that it has none of."""
    parts: dict[str, Any] = {"params": {}, "ema": {}}
    for path, leaf in jax.tree.leaves_with_path(params):
        names = tuple(str(entry.key) for entry in path)
        set_at(parts["ema" if ".".join(["ema", *names]) in saved else "params"], names, leaf)
    return {name: part for name, part in parts.items() if part}


def _describe_broken_files(checkpoint: Path) -> str | None:
    """Describes the first file recognized as broken in a damaged checkpoint; Orbax has valid empty ones."""
    for path in sorted(checkpoint.rglob("*")):
        wrong = describe_wrong_file(path, "a checkpoint", get_args(Kind))
        if wrong is not None and path.stat().st_size:
            return f"{path.relative_to(checkpoint)} {wrong}"
    return None
