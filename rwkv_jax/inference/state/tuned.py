"""Tuned states where text is generated: a row of an engine's slots that has read nothing, and begins with one."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.inference.state.snapshot import Snapshot, StateError
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.initial_state import begin_texts
from rwkv_jax.tuning.pretrained_state import open_tuned_state
from rwkv_jax.tuning.state_files import TunedState, TunedStateError
from rwkv_jax.weights.digest import content_digest

if TYPE_CHECKING:
    from rwkv_jax.inference.engine.engine import Engine


def opened_row(given: str | os.PathLike[str] | TunedState, engine: Engine) -> Any:
    """`tuned_row` of a tuned state, or of what `open_tuned_state` reads; raises as that and `check_base`."""
    tuned, name = (given, "initial_state") if isinstance(given, TunedState) else (open_tuned_state(given), str(given))
    check_base(tuned, engine, name)
    return tuned_row(tuned, engine.model, name)


def row_digest(row: Any) -> str:
    """SHA-256 in hex of what `tuned_row` gives."""
    lines = [content_digest(np.asarray(x)) for x in jax.tree.leaves(row)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_base(tuned: TunedState, engine: Engine, name: str) -> None:
    """Raises StateError for a tuned state that was trained with another model, unless the engine allows it."""
    try:
        tuned.check_base(lambda: engine.base_digest, name, allow_other_base=engine.allow_other_base)
    except TunedStateError as error:
        raise StateError(str(error)) from error


def tuned_row(tuned: TunedState, model: LanguageModel, name: str) -> Any:
    """The state of one text, without an axis of rows, as `Snapshot.state` has it.

    Args:
      model: with separate layers.
      name: of the file, for messages.

    Raises:
      StateError: a model without matrix states; tensors are missing, not expected, of another shape or not finite.
    """
    try:
        arrays = tuned.arrays(model.config, name)
    except TunedStateError as error:
        raise StateError(str(error)) from error
    state = begin_texts(jax.tree.map(jnp.asarray, arrays), model, 1)
    return jax.tree.map(lambda x: x[0], state)


def tuned_snapshot(tuned: TunedState, engine: Engine, name: str) -> Snapshot:
    """The state in which a text begins. It has read nothing: the logits are zeros, so a prompt must follow.

    Raises as `check_base` and `tuned_row`.
    """
    check_base(tuned, engine, name)
    logits = engine.identity.logits
    return Snapshot(tuned_row(tuned, engine.model, name), jnp.zeros(logits.shape, logits.dtype), 0)
