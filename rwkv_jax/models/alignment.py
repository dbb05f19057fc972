"""What the mixers of a model give for residual streams of another one, each layer by itself."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_jax.config import Remat
from rwkv_jax.models.block import SAVED_BY_REMAT, Block
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.language_model import LanguageModel, PartTransform, identity
from rwkv_jax.models.stacks import FIRST
from rwkv_kernels.arguments import check_segment_ids


def mixer_outputs(
    model: LanguageModel,
    inputs: Array,
    *,
    segment_ids: Array | None = None,
    remat: Remat = "none",
    axes: MeshAxes = UNSHARDED,
    gather_params: PartTransform = identity,
) -> Array:
    """The output of each block's attention or time mixing, on the residual streams given to it.

    No layer reads what another one wrote, but for the first layer's values, which time mixing takes.

    Args:
      inputs: [L, B, T, C], what each block would have as its input; texts begin with each row.
      segment_ids, remat, axes, gather_params: as in `LanguageModel.hidden`; layers are stacked.

    Returns:
      [L, B, T, C] in the compute dtype, before it is added to the residual stream.
    """
    _, batch, time, _ = inputs.shape
    segment_ids = None if segment_ids is None else check_segment_ids(segment_ids, batch, time)
    context = SequenceContext(segment_ids, axes=axes)
    of_kind = model.states_by_kind(model.empty_state(batch, axes))
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_BY_REMAT[remat])

    def mixed(name: str, block: Block, x: Array, state: Any, v_first: Array | None) -> tuple[Array, Array | None]:
        block = gather_params(name, block)
        y, v_first, _ = block.mix_branch(x, state=state, v_first=v_first, context=context)
        return y, v_first

    first, *stacks = model.layer_runs
    first_state = jax.tree.map(lambda s: s[0], of_kind[first.kind])
    run = jax.checkpoint(functools.partial(mixed, FIRST), policy=policy)
    y, v_first = run(model.first_block, inputs[0], first_state, None)

    def body(name: str, _: None, layer: tuple[Any, Array, Any]) -> tuple[None, Array]:
        block, x, state = layer
        run = jax.checkpoint(functools.partial(mixed, name), policy=policy, prevent_cse=False)
        return None, run(block, x, state, v_first)[0]

    outputs = [y[None]]
    for stack in stacks:
        own = slice(stack.index, stack.index + len(stack.layers))
        state = jax.tree.map(lambda s, own=own: s[own], of_kind[stack.kind])
        layers = (getattr(model, stack.name), inputs[stack.layers.start : stack.layers.stop], state)
        outputs.append(jax.lax.scan(functools.partial(body, stack.name), None, layers)[1])
    return jnp.concatenate(outputs)
