"""The KL divergence between a teacher's next-token probabilities and a student's, and the student's cross-entropy.

Of a teacher's k most likely tokens S, with probabilities p_i, and the rest r = 1 - sum p_i of all others together:

    sum_{i in S} p_i (log p_i - log q_i) + r (log r - log sum_{j not in S} q_j)

which is the divergence between both models' probabilities of S's tokens and of "another one": at most the whole
divergence, and equal to it if k = V. It is also the whole divergence of probabilities that have r shared out among the
other tokens as the student shares it, r q_j / sum_{j not in S} q_j, and so has its gradient, q - p.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_jax.models.layers import reduce_from_tensor_parallel, shard_offset
from rwkv_jax.training.loss import flatten_tokens, likeliest, logit_of, sum_over_chunks


class DistillationSums(NamedTuple):
    """Sums over the tokens of a batch that count."""

    kl: Array
    """Sum of the KL divergences, at the temperature."""
    nll: Array
    """Sum of -log p(target) of the student at temperature 1, in nats."""
    agreement: Array
    """Tokens at which both models have the same most likely one."""


class Taught(NamedTuple):
    """What a teacher says of some tokens' next ones."""

    scores: Array
    """[n, V] log-probabilities at the temperature, up to a constant of each token; the shard's part of V."""
    likeliest: Array
    """[n] ids of the most likely tokens."""


class TopK(NamedTuple):
    """A teacher's k most likely tokens."""

    ids: Array
    """int32 [n, k], the most likely one first."""
    log_p: Array
    """[n, k + 1]: their log-probabilities at the temperature, and that of all others together."""


def distillation_losses(
    logits: Array, scores: Array, targets: Array, temperature: float = 1.0, axis_name: str | None = None
) -> tuple[Array, Array]:
    """Each token's KL divergence at the temperature, and its -log p(target) at temperature 1.

    Args:
      logits: [n, V], float32 or float64, the student's; the shard's part of V if a mesh axis splits it.
      scores: [n, V], the teacher's logits divided by the temperature; -inf for a token without probability. No gradient
        flows there.
      targets: [n] integers in [0, V).
      axis_name: the mesh axis over which V is split; only sums [n] are communicated.

    Returns:
      Two arrays [n], the same on all shards.
    """
    return _losses(logits, lax.stop_gradient(scores), targets, temperature, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _losses(
    logits: Array, scores: Array, targets: Array, temperature: float, axis_name: str | None
) -> tuple[Array, Array]:
    return _forward(logits, scores, targets, temperature, axis_name)[0]


def log_normalizer(logits: Array, axis_name: str | None = None) -> Array:
    """log sum exp of logits [n, V] over V, [n]; a mesh axis may split V."""
    largest = jnp.max(logits, axis=-1)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    total = reduce_from_tensor_parallel(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1), axis_name)
    return largest + jnp.log(total)


def _forward(
    logits: Array, scores: Array, targets: Array, temperature: float, axis_name: str | None
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    own, softened = log_normalizer(logits, axis_name), logits / temperature
    of_student = own if temperature == 1 else log_normalizer(softened, axis_name)
    of_teacher = log_normalizer(scores, axis_name)
    log_p, log_q = scores - of_teacher[:, None], softened - of_student[:, None]
    probability = jnp.exp(log_p)
    terms = jnp.where(probability == 0, 0, probability * (log_p - log_q))
    kl = reduce_from_tensor_parallel(jnp.sum(terms, axis=-1), axis_name)
    nll = own - logit_of(logits, targets, axis_name)
    return (kl, nll), (logits, scores, targets, own, of_student, of_teacher)


def _backward(
    temperature: float, axis_name: str | None, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, None, None]:
    logits, scores, targets, own, of_student, of_teacher = saved
    dkl, dnll = cotangents
    size = logits.shape[-1]
    vocabulary = (jnp.arange(size) + shard_offset(size, axis_name))[None]  # [1, V]
    is_target = vocabulary == targets[:, None]
    taught = jnp.exp(scores - of_teacher[:, None])
    dlogits = (dkl / temperature)[:, None] * (jnp.exp(logits / temperature - of_student[:, None]) - taught)
    dlogits += dnll[:, None] * (jnp.exp(logits - own[:, None]) - is_target.astype(logits.dtype))
    return dlogits.astype(logits.dtype), None, None


_losses.defvjp(_forward, _backward)


def top_k_of(scores: Array, k: int, axis_name: str | None = None) -> TopK:
    """The k most likely tokens of scores [n, V], the first of equals first; the same on all shards."""
    size = scores.shape[-1]
    whole = log_normalizer(scores, axis_name)[:, None]
    log_p = scores - whole
    values, ids = lax.top_k(log_p, min(k, size))
    ids = (ids + shard_offset(size, axis_name)).astype(jnp.int32)
    if axis_name is not None:
        values, ids = (lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (values, ids))
        values, chosen = lax.top_k(values, k)
        # Equal on all shards, which the largest of them says.
        values, ids = (lax.pmax(x, axis_name) for x in (values, jnp.take_along_axis(ids, chosen, axis=1)))
    # Not 1 - sum p: in float32 that has nothing of a rest below 1e-7.
    others = scores.at[_places(ids, scores, axis_name)].set(-jnp.inf, mode="drop")
    rest = log_normalizer(others, axis_name)[:, None] - whole
    return TopK(ids, jnp.concatenate([values, rest], axis=1))


def _places(ids: Array, scores: Array, axis_name: str | None) -> tuple[Array, Array]:
    """Where tokens [n, k] are in a shard's scores [n, V]: beyond its end for those of other shards."""
    size = scores.shape[-1]
    own = ids - shard_offset(size, axis_name)
    return jnp.arange(len(scores))[:, None], jnp.where((own >= 0) & (own < size), own, size)


def taught_by_logits(
    teacher_logits: Array,
    logits: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    axis_name: str | None = None,
) -> Taught:
    """What a teacher's logits [n, V] say, all of it or `top_k`, of which no gradient flows.

    The teacher may have other padding rows, beyond what the tokenizer names, than the student's logits [n, V].
    """
    scores = lax.stop_gradient(with_rows(teacher_logits, logits.shape[-1]) / temperature)
    if top_k is not None:
        top = top_k_of(scores, top_k, axis_name)
        return taught_by_top_k(top, logits, temperature=temperature, axis_name=axis_name)
    return Taught(scores, likeliest(scores, axis_name))


def taught_by_top_k(top: TopK, logits: Array, *, temperature: float = 1.0, axis_name: str | None = None) -> Taught:
    """What the most likely tokens say: the rest is shared out as the student does, whose logits [n, V] are given."""
    logits = lax.stop_gradient(logits)
    log_p, places = top.log_p.astype(logits.dtype), _places(top.ids, logits, axis_name)
    others = (logits / temperature).at[places].set(-jnp.inf, mode="drop")
    rest = log_p[:, -1] - log_normalizer(others, axis_name)
    shared_out = jnp.where(jnp.isneginf(others), -jnp.inf, others + rest[:, None])
    scores = shared_out.at[places].set(log_p[:, :-1], mode="drop")
    return Taught(scores, top.ids[:, 0])


def with_rows(logits: Array, size: int) -> Array:
    """Logits [n, size], cut or filled up with -inf: rows beyond the tokenizer's vocabulary have no probability."""
    logits = logits[:, :size]
    missing = size - logits.shape[1]
    return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf) if missing else logits


def sum_distillation(
    logits_of: Callable[[Array], Array],
    hidden: Array,
    taught_of: Callable[..., Taught],
    given: tuple[Array, ...],
    targets: Array,
    mask: Array | None = None,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> DistillationSums:
    """The losses of a batch, summed.

    Args:
      logits_of: from the student's hidden vectors [n, C] to its logits [n, V].
      hidden: [B, T, C], the student's.
      taught_of: from the student's logits and what is given of the same tokens to what the teacher says.
      given: arrays [B, T, ...], such as the teacher's hidden vectors.
      targets: [B, T] integers; mask: [B, T], 1 where a token counts (None: everywhere).
      chunk: tokens whose logits, of both models, are in memory at a time, also in the backward pass; None computes all
        B * T at once.
      axis_name: the mesh axis over which V is split, within `jax.shard_map`.
    """
    flat, wanted, weight = flatten_tokens(hidden, targets, mask)

    def sums(hidden: Array, targets: Array, weight: Array, *given: Array) -> DistillationSums:
        logits = logits_of(hidden)
        taught = taught_of(logits, *given)
        kl, nll = distillation_losses(logits, taught.scores, targets, temperature, axis_name)
        agrees = likeliest(logits, axis_name) == taught.likeliest
        return DistillationSums(*(jnp.sum(x * weight) for x in (kl, nll, agrees)))

    others = tuple(x.reshape(-1, *x.shape[2:]) for x in given)
    return sum_over_chunks(sums, (flat, wanted, weight, *others), chunk)
