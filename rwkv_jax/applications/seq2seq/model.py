"""An encoder that reads a source from both ends, and a decoder, a generation's language model, that writes a target.

How the decoder knows the source, by `form`:

    state          layer l of the decoder begins with S = f_lh S_forward + b_lh S_backward per head h, the encoder's WKV
                   states of layer l after all of the source; f, b [L, H] are learned from 1/2, token shifts are zero
    attention      the decoder begins empty; before its head, x + W_o softmax(q k^T / sqrt(N)) v with q of its output x
                   and k, v of the encoder's, [B, S, C] (multi-head, as in arXiv 1706.03762)
    decoder_only   the decoder reads source, START, target as one row; no encoder

What a decoder carries from token to token has a constant size, but for the encoder's output under attention, which is
constant while decoding and grows with the source.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.applications.seq2seq import data
from rwkv_jax.applications.seq2seq.config import ALPHABET, START, Seq2SeqConfig
from rwkv_jax.applications.seq2seq.decode import beam_search, greedy
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models import LanguageModel, model_type
from rwkv_jax.models.bidirectional import bidirectional_type
from rwkv_jax.models.language_model import PartTransform, identity
from rwkv_jax.models.layers import LayerNorm, Linear, linear, orthogonal, wide_dtype
from rwkv_jax.training.application import Application, Forward, Losses, part_of
from rwkv_jax.training.examples import Examples


class HandOver(nnx.Module):
    """The decoder's first WKV state, of the encoder's two last ones."""

    def __init__(self, config: ModelConfig) -> None:
        half = jnp.full((config.num_layers, config.num_heads), 0.5, config.parameter_dtype)
        self.forward, self.backward = nnx.Param(half), nnx.Param(half)

    def __call__(self, forward: Array, backward: Array) -> Array:
        """[L, B, H, N, N] of both directions -> the same of the decoder."""

        def scaled(gain: nnx.Param[Array], state: Array) -> Array:
            return gain[...].astype(state.dtype)[:, None, :, None, None] * state

        return scaled(self.forward, forward) + scaled(self.backward, backward)


class CrossAttention(nnx.Module):
    """What a decoder's output takes from an encoder's, by multi-head softmax attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        shape = (config.width, config.width)
        self.norm = LayerNorm(config.width, config.parameter_dtype)
        self.query, self.key, self.value = (
            Linear(orthogonal(rngs.params(), shape, 1.0, config.parameter_dtype)) for _ in range(3)
        )
        self.output = Linear(jnp.zeros(shape, config.parameter_dtype))

    def __call__(self, x: Array, memory: Array, lengths: Array) -> Array:
        """[B, U, C] for x [B, U, C] and memory [B, S, C], of which each row has `lengths` [B]."""

        def heads(y: Array) -> Array:
            return rearrange(y, "B T (H N) -> B H T N", N=self.head_dim)

        q, k, v = heads(self.query(self.norm(x))), heads(self.key(memory)), heads(self.value(memory))
        scores = jnp.einsum("BHUN,BHSN->BHUS", q, k).astype(wide_dtype(x.dtype)) / self.head_dim**0.5
        is_text = jnp.arange(memory.shape[1])[None] < lengths[:, None]
        weights = jax.nn.softmax(jnp.where(is_text[:, None, None], scores, -jnp.inf)).astype(x.dtype)
        # Values beyond a row are undefined; zero weights would not hide what is not a number.
        v = jnp.where(is_text[:, None, :, None], v, 0)
        return self.output(rearrange(jnp.einsum("BHUS,BHSN->BHUN", weights, v), "B H U N -> B U (H N)"))


class Source(NamedTuple):
    """What a decoder knows of a source."""

    state: Any
    """The decoder's, before the first token of the target."""
    memory: Array | None
    """The encoder's output [B, S, C], if there is attention."""
    lengths: Array
    """[B] of the source."""


class Seq2SeqModel(nnx.Module):
    """Encoder, decoder, and what joins them."""

    def __init__(self, config: Seq2SeqConfig, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> None:
        model, self.settings = config.model, config.seq2seq
        form = self.settings.form
        self.decoder = model_type(model)(model, rngs=rngs, shard_params=part_of("decoder", shard_params))
        if form != "decoder_only":
            self.encoder = bidirectional_type(model)(
                model,
                rngs=rngs,
                shard_params=part_of("encoder", shard_params),
                has_embedding=not self.settings.shared_embedding,
                has_head=False,
            )
        if form in ("state", "state_and_attention"):
            self.hand_over = shard_params("hand_over", HandOver(model))
        if form in ("attention", "state_and_attention"):
            self.attention = shard_params("attention", CrossAttention(model, rngs))

    def read(self, source: Array, lengths: Array, forward: Forward | None = None) -> Source:
        """What the decoder knows of sources [B, S] of lengths [B]."""
        forward = forward or Forward()
        if self.settings.form == "decoder_only":
            _, state = self.decoder.hidden(source, lengths=lengths, **forward.of_part("decoder"))
            return Source(state, None, lengths)
        tokens, vectors = source, None
        if self.settings.shared_embedding:
            embedding = forward.gather_params("decoder.emb", self.decoder.emb)
            tokens, vectors = None, embedding(source, self.decoder.config.dtype, forward.axes)
        memory, encoded = self.encoder.hidden(
            tokens, inputs_embeds=vectors, lengths=lengths, **forward.of_part("encoder")
        )
        state = self.decoder.initial_state(source.shape[0], forward.axes)
        if "state" in self.settings.form:
            join = forward.gather_params("hand_over", self.hand_over)
            state = dataclasses.replace(state, wkv=join(encoded.forward.wkv, encoded.backward.wkv))
        return Source(state, memory if "attention" in self.settings.form else None, lengths)

    def write(self, tokens: Array, source: Source, forward: Forward | None = None) -> tuple[Array, Source]:
        """Logits [B, U, V] of what follows each of the tokens [B, U], the first of which is START, and what is next."""
        forward = forward or Forward()
        hidden, state = self.decoder.hidden(tokens, source.state, **forward.of_part("decoder"))
        if source.memory is not None:
            attend = forward.gather_params("attention", self.attention)
            hidden = hidden + attend(hidden, source.memory, source.lengths)
        name = "emb" if self.decoder.config.tied_head else "head"
        head = forward.gather_params(f"decoder.{name}", getattr(self.decoder, name)).weight[...]
        return linear(hidden, head, out_dtype=wide_dtype(hidden.dtype)), source._replace(state=state)

    def losses(self, batch: data.Batch, forward: Forward) -> Losses:
        """Mean cross-entropy of each row's target; whether its tokens, and all of them, are the likeliest ones."""
        start = jnp.full_like(batch.target[:, :1], START)
        tokens = jnp.concatenate([start, batch.target[:, :-1]], axis=1)
        logits, _ = self.write(tokens, self.read(batch.source, batch.source_length, forward), forward)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.target[:, :, None], axis=-1)[:, :, 0]
        counts = jnp.arange(log_p.shape[1])[None] < batch.target_length[:, None]
        is_right = jnp.argmax(logits, axis=-1) == batch.target

        def mean(values: Array) -> Array:
            return jnp.sum(jnp.where(counts, values, 0), axis=1) / batch.target_length.astype(log_p.dtype)

        whole = jnp.all(is_right | ~counts, axis=1).astype(log_p.dtype)
        return Losses(mean(-log_p), {"token_accuracy": mean(is_right.astype(log_p.dtype)), "forced_match": whole})

    def decode(self, source: Array, lengths: Array, *, beam_size: int = 1, alpha: float = 0.6) -> Array:
        """Targets [B, U] of sources [B, S] of lengths [B], zeros from the end on."""
        known = self.read(source, lengths)
        repeats, limit = beam_size, self.settings.sizes[1]
        memory = None if known.memory is None else jnp.repeat(known.memory, repeats, axis=0)
        fixed = Source(None, memory, jnp.repeat(lengths, repeats, axis=0))

        def step(tokens: Array, state: Any) -> tuple[Array, Any]:
            logits, after = self.write(tokens[:, None], fixed._replace(state=state))
            return jax.nn.log_softmax(logits[:, 0]), after.state

        size = source.shape[0]
        if beam_size == 1:
            return greedy(step, known.state, batch_size=size, limit=limit)
        found = beam_search(step, known.state, batch_size=size, limit=limit, beam_size=beam_size, alpha=alpha)
        return found.tokens[:, 0]


class Seq2SeqApplication(Application):
    """Model, pairs, and exact match.

    Raises:
      ConfigError: a generation that cannot read from both ends, or whose states cannot be handed over.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        self.config: Seq2SeqConfig = config
        form = config.seq2seq.form
        if form == "decoder_only":
            return
        both = bidirectional_type(config.model)
        state = jax.eval_shape(lambda: both.initial_block_state(config.model, 1))
        if "state" in form and len(jax.tree.leaves(state.forward.wkv)) > 1:
            raise ConfigError(
                f"seq2seq.form = {form!r}: {config.model.title}'s state is no matrix a head, and is not handed over; "
                "take attention or decoder_only, or generation 5.2, 6 or 7"
            )

    @property
    @override
    def stacks(self) -> Mapping[str, type[LanguageModel]]:
        decoder = model_type(self.config.model)
        if self.config.seq2seq.form == "decoder_only":
            return {"decoder": decoder}
        return {"decoder": decoder, "encoder": bidirectional_type(self.config.model)}

    @override
    def new_model(self, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> Seq2SeqModel:
        return Seq2SeqModel(self.config, rngs, shard_params)

    @override
    def labels(self) -> tuple[str, ...]:
        return ("<start>", *ALPHABET.replace(" ", "_"))  # a tokenizer of symbols has an end of its own, id 0

    @override
    def examples(self, report: Callable[[str], None]) -> tuple[Examples, Examples]:
        return data.examples(self.config.seq2seq, self.config.seed)

    @functools.cached_property
    def decode(self) -> Callable[[Any, Array, Array], Array]:
        """(parameters, sources [B, S], lengths [B]) -> targets [B, U], as the settings say; compiled."""
        own = self.config.seq2seq

        def decode(params: Any, source: Array, lengths: Array) -> Array:
            return self.model(params).decode(source, lengths, beam_size=own.beam_size, alpha=own.length_penalty)

        return jax.jit(decode)

    @override
    def measure(self, params: Any, examples: Examples, num_examples: int | None) -> Mapping[str, float]:
        """The share of sources whose decoded target is right in every token."""
        total, size = min(num_examples or len(examples), len(examples)), self.config.training.batch_size
        right = 0
        for start in range(0, total, size):
            rows = examples.rows(np.arange(start, start + size))
            found = np.asarray(self.decode(params, rows.source, rows.source_length))
            right += int(np.all(found == rows.target, axis=1)[: total - start].sum())
        return {"exact_match": right / total}
