"""Loads tuned states: from files, or from runs that train them, for a model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rwkv_jax.models import LanguageModel
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.initial_state import SHIFTS, begin_texts, state_shapes
from rwkv_jax.models.packed import PackedMatrix
from rwkv_jax.run_folder import load_part, read_run_file
from rwkv_jax.tuning.state_files import TunedState, TunedStateError, is_tuned, named_tensors, parse_tuned_state
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.official import official_tensors
from rwkv_jax.weights.tensors import WeightsError

_LARGEST = 4 * 2**30
"""Bytes of a file that is looked at: of 200 layers of 80 heads of 64 it has 260 MB."""


def open_tuned_state(
    path: str | os.PathLike[str], *, which: Literal["newest", "best"] = "newest", ema: bool = False
) -> TunedState:
    """The tuned state of a file, or of a checkpoint of a run's folder.

    Args:
      which, ema: of a run, its newest or best checkpoint, and whether its averages (training.ema_decay).

    Raises:
      TunedStateError: there is no such file, or no tuned state in it.
      WeightsError, UnsafeFileError: as `parse_tuned_state`.
      ConfigError: the folder is no run, or its checkpoint cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_run(path, which, ema=ema)
    if not path.is_file():
        raise TunedStateError(f"{path}: there is no such file; name that of a tuned state, or a run that tunes one")
    if path.stat().st_size > _LARGEST:
        raise TunedStateError(f"{path}: is larger than any tuned state; name that of a tuned state, not of a model")
    found = parse_tuned_state(path.read_bytes(), str(path))
    if not is_tuned(found.tensors):
        raise TunedStateError(
            f"{path}: holds no tuned state (blocks.0.att.time_state); name a file of one, or a run that tunes one"
        )
    return found


def open_first_state(path: str | os.PathLike[str]) -> TunedState:
    """What a state is tuned on from: as `open_tuned_state`, or the state of a text (`Session.save`, /v1/states).

    Raises as `open_tuned_state`.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.stat().st_size <= _LARGEST:
        found = parse_tuned_state(path.read_bytes(), str(path)).tensors
        if "blocks.0.wkv" in found:
            renamed = {re.sub(r"\.wkv$", ".att.time_state", name): x for name, x in found.items() if name != "logits"}
            return TunedState(renamed)
    return open_tuned_state(path)


def _of_run(run_dir: Path, which: Literal["newest", "best"], *, ema: bool) -> TunedState:
    part = "ema" if ema else "params"
    place = f"{part}.initial_state"

    def wanted(config: Any, saved: Any) -> Any:
        if ema and f"{place}.first_block.wkv" not in saved and "params.initial_state.first_block.wkv" in saved:
            raise TunedStateError(f"ema = True: {run_dir} has no averages of its state; leave it out")
        if f"{place}.first_block.wkv" not in saved:
            raise TunedStateError(f"{run_dir}: is a run that tunes no state; name one that does, or a file")
        shifts = all(f"{place}.first_block.{name}" in saved for name in SHIFTS)
        return {part: {"initial_state": state_shapes(config.model, shifts=shifts)}}

    tree = load_part(run_dir, which, wanted)
    identity = read_run_file(run_dir)["identity"]
    return TunedState(named_tensors(tree[part]["initial_state"]), identity.get("tuning.base"))


def load_initial_state(
    path: str | os.PathLike[str], model: LanguageModel, batch_size: int = 1, *, allow_other_base: bool = False
) -> Any:
    """A state for `model(tokens, state)` in which texts begin as the tuned one says.

    Args:
      path: as in `open_tuned_state`.
      batch_size: texts, which all begin in the same state.
      allow_other_base: whether the state may have been trained with another model of the same sizes.

    Raises:
      TunedStateError: the state is of another model.
      ConfigError: as `open_tuned_state`.
    """
    state = open_tuned_state(path)
    state.check_base(lambda: base_digest(model), str(path), allow_other_base=allow_other_base)
    arrays = jax.tree.map(jnp.asarray, state.arrays(model.config, str(path)))
    return begin_texts(arrays, model, batch_size)


def base_digest(model: LanguageModel) -> str:
    """`weights_digest` of a model in memory, its layers stacked or not; of adapted matrices, their bases count.

    Raises:
      WeightsError: parts of it are on other hosts, or its matrices are packed.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params = jax.tree.map(_base, params, is_leaf=lambda x: isinstance(x, AdaptedMatrix | PackedMatrix))
    if not model.is_stacked:
        layers = [params["blocks"][i] for i in range(model.config.num_layers - 1)]
        params |= {"blocks": jax.tree.map(lambda *each: jnp.stack(each), *layers)}
    return weights_digest(official_tensors(model.config, params))


def _base(x: Any) -> Any:
    base = x.base if isinstance(x, AdaptedMatrix) else x
    if isinstance(base, PackedMatrix):
        raise WeightsError(
            "the model's matrices are packed, so that the numbers by which its base is known are rounded; load it "
            "unpacked, or say that this base will do (allow_other_base)"
        )
    return base
