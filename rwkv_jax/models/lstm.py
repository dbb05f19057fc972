"""An LSTM: cells behind gates, one token after the other.

    i, f, g, o = sigma, sigma, tanh, sigma of W x_t + b + U h_{t-1} + c
    c_t = f c_{t-1} + i g        h_t = o tanh(c_t)

Source: Long Short-Term Memory (Hochreiter and Schmidhuber, 1997), with the forget gate of Gers et al. (2000), and
PyTorch's LSTM for the order of gates and initial values. A matrix O reads it into the residual stream. Shape letters: B
batch, T time, C width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from typing_extensions import override

from rwkv_jax.models.baseline import Baseline, BaselineBlock
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.layers import MixOutput
from rwkv_jax.models.rnn import BLOCK_AXES, RecurrentMixer, scan_tokens


class LSTMState(NamedTuple):
    """State of a block."""

    hidden: Array
    """[B, C], h."""
    cells: Array
    """[B, C], c."""


class LSTMMix(RecurrentMixer):
    """The recurrence, and the matrix that reads it."""

    num_gates = 4

    @override
    def mix(self, x: Array, *, state: LSTMState, context: SequenceContext) -> MixOutput:
        def step(state: LSTMState, token: Array) -> tuple[LSTMState, Array]:
            recurrent = self.recurrent(state.hidden.astype(x.dtype)).astype(token.dtype)
            i, f, g, o = jnp.split(token + recurrent, 4, axis=-1)
            cells = jax.nn.sigmoid(f) * state.cells + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cells)
            return LSTMState(hidden, cells), hidden

        hidden, state = scan_tokens(step, self.inputs(x), state, context)
        return MixOutput(self.read(hidden, x), state)


class LSTMBlock(BaselineBlock):
    """A block of the LSTM."""

    time_mix_type = LSTMMix


class LSTM(Baseline):
    """A language model of LSTMs: `model(tokens, state) -> (logits, state)`."""

    block_type = LSTMBlock
    block_axes = BLOCK_AXES
    state_type = LSTMState
