"""Answers the requests of evaluation tasks with a run's own parameters, on its mesh and without the engine.

The engine would need another copy of the weights, and programs of its own. Here all texts are laid end to end in the
rows of a batch, each row a stream that goes on in the next batch with the state that it was left with: one program of
the training's shape scores texts of any lengths, and nothing but the streams' ends is padding. A Transformer, whose
state is a cache, gets whole texts in each batch instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from rwkv_jax.config import ModelConfig, StepConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.evaluation.encoding import Pair, cut_at_stops, encode_pair, rolling_windows
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, LoglikelihoodResult, Reporter, Request, Rolling
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.parallel.coordination import global_array
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.loss import flatten_tokens, likeliest, split_chunks, token_losses
from rwkv_jax.training.micro_batches import where_rows
from rwkv_jax.training.sample import Sampler


class StreamBatch(NamedTuple):
    """A piece of every stream."""

    tokens: Any
    """int32 [B, T]."""
    targets: Any
    """int32 [B, T], the token after each input."""
    segment_ids: Any
    """int32 [B, T]; a text begins where the id changes along a row."""
    continues: Any
    """bool [B], whether a row begins within the text that the last piece ended in."""


class Stretch(NamedTuple):
    """Where the tokens of a continuation are predicted: columns begin:end of a stream."""

    row: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Streams:
    """Texts laid end to end in B streams, of which each batch reads T tokens."""

    tokens: np.ndarray
    """int32 [B, number of batches * T]."""
    targets: np.ndarray
    begins: np.ndarray
    """bool, whether a text begins at a token."""
    stretches: list[Stretch]
    """One of each text, in the order given."""

    def batches(self, length: int) -> Iterator[StreamBatch]:
        """Pieces of T = `length` tokens."""
        for start in range(0, self.tokens.shape[1], length):
            piece = slice(start, start + length)
            segment_ids = np.cumsum(self.begins[:, piece], axis=1, dtype=np.int32)
            continues = ~self.begins[:, start]
            yield StreamBatch(self.tokens[:, piece], self.targets[:, piece], segment_ids, continues)


def lay_out(
    pairs: Sequence[Pair], num_rows: int, length: int, *, crosses: bool = True, aligned: bool = False
) -> Streams:
    """Lays texts end to end, the longest first, each in the stream that is the shortest so far.

    Args:
      length: T, of which the streams' length is a multiple.
      crosses: whether a text may go on in the next batch; else each has at most T tokens, and none is divided.
      aligned: whether each text begins with a batch, since one that begins within a row begins with zeros.
    """
    ends, placed = [0] * num_rows, []
    for index in sorted(range(len(pairs)), key=lambda i: -len(pairs[i].context) - len(pairs[i].continuation)):
        context, continuation = pairs[index]
        size = len(context) + len(continuation) - 1
        row = min(range(num_rows), key=ends.__getitem__)
        start = ends[row]
        if aligned or (not crosses and start % length + size > length):
            start += -start % length
        placed.append((index, row, start))
        ends[row] = start + size
    width = max(1, -(-max(ends) // length)) * length
    tokens, targets = np.zeros((2, num_rows, width), np.int32)
    begins = np.zeros((num_rows, width), bool)
    stretches: list[Any] = [None] * len(pairs)
    for index, row, start in placed:
        context, continuation = pairs[index]
        ids = np.array(context + continuation, np.int32)
        end = start + len(ids) - 1
        tokens[row, start:end], targets[row, start:end] = ids[:-1], ids[1:]
        begins[row, start] = True
        stretches[index] = Stretch(row, end - len(continuation), end)
    return Streams(tokens, targets, begins, stretches)


class TaskScorer:
    """Scores with one compiled program, and generates with that of the run's samples; `of` gives it parameters."""

    def __init__(
        self, trainer: TrainFunctions, model: ModelConfig, training: StepConfig, tokenizer: Tokenizer, sampler: Sampler
    ) -> None:
        """Compiles nothing yet."""
        self._trainer, self._training = trainer, training
        self._tokenizer, self._sampler = tokenizer, sampler
        self._context_length = model.sizes().context_length
        self._has_cache = bool(self._context_length)
        self._tokens: dict[Loglikelihood | Rolling, list[Pair]] = {}
        self._prompts: dict[Generate, tuple[int, ...]] = {}
        whole, sharded = trainer.state_shardings.step, trainer.sharded
        on_mesh = whole if sharded.mesh is None else shardings(sharded.mesh, sharded.state_specs)
        where = None if self._has_cache else on_mesh
        self._score = jax.jit(self._score_batch, out_shardings=(whole, whole, where))
        self._empty_state = jax.jit(self._initial_state, out_shardings=where)

    def prepare(self, requests: Iterable[Request]) -> None:
        """Encodes requests and keeps their tokens, so that what cannot be encoded is refused before the first step."""
        for request in requests:
            if isinstance(request, Generate):
                self._prompts[request] = self._encode_prompt(request)
            else:
                self._tokens[request] = self._encode(request)

    def of(self, params: Any) -> BoundScorer:
        """A `Scorer` with these parameters."""
        return BoundScorer(self, params)

    def _initial_state(self, params: Any) -> Any:
        """The state in which all rows begin texts."""
        run_model, rows = self._trainer.run_model, self._training.batch_size
        state = run_model.first_state(params, rows)
        return run_model.model(params).initial_state(rows) if state is None else state

    def _score_batch(self, params: Any, batch: StreamBatch, state: Any) -> tuple[Array, Array, Any]:
        """log p of each target, float [B, T], whether it is the most likely token, bool [B, T], and the next state."""
        sharded = self._trainer.sharded
        if state is not None:
            state = where_rows(batch.continues, state, self._initial_state(params))

        def local(params: Any, batch: StreamBatch, state: Any) -> tuple[Array, Array, Any]:
            model = self._trainer.run_model.model(params)
            hidden, next_state = model.hidden(
                batch.tokens,
                state,
                segment_ids=batch.segment_ids,
                axes=sharded.axes,
                gather_params=sharded.gather_params,
            )
            model.gather_head(sharded.gather_params)
            flat, targets, _ = flatten_tokens(hidden, batch.targets, None)
            chunk = min(self._training.loss_chunk or len(targets), len(targets))
            chunks = split_chunks((flat, targets), chunk)
            found = jax.lax.map(lambda group: _scores(model.logits(group[0]), group[1], sharded.axes.tensor), chunks)
            logprobs, is_argmax = (x.reshape(-1)[: len(targets)].reshape(batch.targets.shape) for x in found)
            return logprobs, is_argmax, None if state is None else next_state

        state_specs = None if state is None else sharded.state_specs
        run = sharded.shard_map(
            local,
            (sharded.select_param_specs(params), sharded.batch_specs(batch), state_specs),
            (sharded.tokens_spec, sharded.tokens_spec, state_specs),
        )
        return run(params, batch, state)

    def score(self, params: Any, pairs: Sequence[Pair]) -> list[LoglikelihoodResult]:
        """Log-probabilities of continuations, in order."""
        rows, length = self._training.batch_size, self._training.sequence_length
        if self._has_cache:
            pairs = [_cut(pair, length) for pair in pairs]
        tuned = self._trainer.run_model.tuning.state
        streams = lay_out(pairs, rows, length, crosses=not self._has_cache, aligned=tuned)
        state = None if self._has_cache else self._empty_state(params)
        found: list[tuple[Any, Any]] = []
        for batch in streams.batches(length):
            logprobs, is_argmax, state = self._score(params, self._placed(batch), state)
            # Fetched one batch late, so that the device never waits for the host.
            found[-1:] = [(np.asarray(a, np.float64), np.asarray(b)) for a, b in found[-1:]]
            found.append((logprobs, is_argmax))
        logprobs = np.concatenate([np.asarray(part, np.float64) for part, _ in found], axis=1)
        is_argmax = np.concatenate([np.asarray(part) for _, part in found], axis=1)
        return [
            LoglikelihoodResult(float(logprobs[row, begin:end].sum()), bool(is_argmax[row, begin:end].all()))
            for row, begin, end in streams.stretches
        ]

    def _placed(self, batch: StreamBatch) -> StreamBatch:
        """The same arrays on the devices; each process reads its own devices' rows."""
        where = {1: self._trainer.rows_sharding, 2: self._trainer.tokens_sharding}
        return StreamBatch(*(global_array(where[x.ndim], x.shape, x.__getitem__) for x in batch))

    def tokens(self, request: Loglikelihood | Rolling) -> list[Pair]:
        """Tokens of a request: of a text for a model with a cache, windows as training reads them; else one pair."""
        return self._tokens.get(request) or self._encode(request)

    def _encode(self, request: Loglikelihood | Rolling) -> list[Pair]:
        if isinstance(request, Loglikelihood):
            return [encode_pair(self._tokenizer, request.context, request.continuation)]
        ids = self._tokenizer.encode(request.text) if isinstance(request.text, str) else request.text
        window = self._training.sequence_length if self._has_cache else None
        return rolling_windows(ids, self._tokenizer.beginning, window)

    def is_truncated(self, request: Request) -> bool:
        """Whether the beginning of what is read is left out: a Transformer's batch or cache cannot hold all of it."""
        if not self._has_cache or isinstance(request, Rolling):
            return False
        if isinstance(request, Generate):
            return len(self._prompt(request)) > self._room(request)
        (pair,) = self.tokens(request)
        return len(pair.context) + len(pair.continuation) > self._training.sequence_length + 1

    def _encode_prompt(self, request: Generate) -> tuple[int, ...]:
        """The end of a context that leaves a Transformer's cache room for the answer, as `EngineScorer` cuts it."""
        ids = self._prompt(request)
        return ids[-self._room(request) :] if self._has_cache else ids

    def _prompt(self, request: Generate) -> tuple[int, ...]:
        context = request.context
        return tuple(self._tokenizer.encode(context) if isinstance(context, str) else context)

    def _room(self, request: Generate) -> int:
        """Tokens of a context that a Transformer's cache has room for, behind the sampler's end-of-text token."""
        return max(1, self._context_length - request.max_tokens - 1)

    def write(self, params: Any, request: Generate) -> str:
        """The most likely tokens after a context, up to a stop."""
        prompt = self._prompts.get(request) or self._encode_prompt(request)
        text = self._sampler.text(params, prompt, request.max_tokens, SamplingParams(temperature=0.0), 0)
        return cut_at_stops(text, request.until)


def _scores(logits: Array, targets: Array, axis_name: str | None) -> tuple[Array, Array]:
    """log p of each target [n], and whether it is the most likely token."""
    return -token_losses(logits, targets, axis_name)[0], likeliest(logits, axis_name) == targets


def _cut(pair: Pair, length: int) -> Pair:
    """The end of a text that is too long, as lm-eval leaves out the beginning of a context."""
    ids = (pair.context + pair.continuation)[-length - 1 :]
    scored = min(len(pair.continuation), len(ids) - 1)
    return Pair(ids[: len(ids) - scored], ids[len(ids) - scored :])


@dataclasses.dataclass(frozen=True)
class BoundScorer:
    """A `Scorer` with given parameters; results are reported when all are there."""

    scorer: TaskScorer
    params: Any

    def loglikelihood(
        self, requests: Sequence[Loglikelihood], /, report: Reporter[LoglikelihoodResult] | None = None
    ) -> list[LoglikelihoodResult]:
        """Log-probabilities of continuations."""
        pairs = [pair for request in requests for pair in self.scorer.tokens(request)]
        return _reported(self.scorer.score(self.params, pairs), report)

    def rolling(self, requests: Sequence[Rolling], /, report: Reporter[float] | None = None) -> list[float]:
        """Log-probabilities of whole texts, nats."""
        windows = [self.scorer.tokens(request) for request in requests]
        scores = iter(self.scorer.score(self.params, [pair for own in windows for pair in own]))
        return _reported([sum(next(scores).logprob for _ in own) for own in windows], report)

    def generate(self, requests: Sequence[Generate], /, report: Reporter[str] | None = None) -> list[str]:
        """Texts of answers, one after the other."""
        return _reported([self.scorer.write(self.params, request) for request in requests], report)


def _reported(results: list[Any], report: Reporter[Any] | None) -> list[Any]:
    for i, result in enumerate(results):
        if report is not None:
            report(i, result)
    return results
