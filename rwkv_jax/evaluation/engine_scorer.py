"""Answers requests by an engine, which reads once what several of them begin with.

A context is a state of constant size, so N continuations of one context cost one prefill, and so do examples that
precede many questions. Here requests are put in order, so that those with the same beginning follow each other, and
what they share is read ahead of them into the engine's prefix cache.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import jax

from rwkv_jax.checks import require_whole
from rwkv_jax.evaluation.encoding import Pair, begun, encode_pair, rolling_windows
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, LoglikelihoodResult, Reporter, Request, Rolling, Text
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.models import LanguageModel

Ids = tuple[int, ...]

_PIECE = 32
"""Tokens of a short prefill: most continuations are shorter, and padding takes as long as tokens."""

_ROUNDS = 16
"""Requests for each slot of the engine, after which results are reported."""

_MAX_TOKENS = 2**17
"""Tokens after which they are reported, too."""


def options_for(model: LanguageModel, num_slots: int = 8, *, tune: Literal["auto", "never"] = "auto") -> EngineOptions:
    """Sizes of an engine for short continuations of contexts, whose states all fit into the prefix cache."""
    row = jax.eval_shape(lambda: model.initial_state(1))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(row)) + 8 * model.config.vocab_size
    default = EngineOptions(num_slots=num_slots, short_prefill_length=_PIECE, tune=tune)
    # Two contexts for each slot, and as many beginnings that contexts share.
    return dataclasses.replace(default, prefix_bytes=max(default.prefix_bytes, 4 * num_slots * size))


class EngineScorer:
    """A `Scorer` by an engine."""

    def __init__(self, engine: Engine, *, begin: bool = True, window: int | None = None) -> None:
        """Runs nothing yet.

        Args:
          begin: whether every context begins as texts do, World's with token 0, as in the official evaluations.
          window: tokens of a text that `rolling` reads at a time, as lm-eval's `max_length`. None carries the state
            over the whole text; of a model with a limited context, as many as that holds.

        Raises:
          ConfigError: a window that is not positive, or longer than the model's context.
        """
        self.engine, self.begin = engine, begin
        self._capacity = engine.config.sizes().context_length or None
        longest = None if self._capacity is None else self._capacity - len(engine.tokenizer.beginning)
        if window is not None:
            require_whole("window", window, 1, longest)
        self.window = longest if window is None else window

    def loglikelihood(
        self, requests: Sequence[Loglikelihood], report: Reporter[LoglikelihoodResult] | None = None
    ) -> list[LoglikelihoodResult]:
        """Log-probabilities of continuations.

        Raises:
          ConfigError: ids that the model does not have, or more of them than its context holds.
        """
        encoded = map(self._pair, requests)
        pairs = [Pair(self._fitted(pair.context, len(pair.continuation)), pair.continuation) for pair in encoded]
        return self.score_ids(pairs, report)

    def rolling(self, requests: Sequence[Rolling], report: Reporter[float] | None = None) -> list[float]:
        """Log-probabilities of whole texts, behind what begins texts; 0 of an empty one."""
        first = self.engine.tokenizer.beginning
        windows = [rolling_windows(self._ids(request.text), first, self.window) for request in requests]
        parts: list[list[float]] = [[] for _ in requests]
        owners = [index for index, pairs in enumerate(windows) for _ in pairs]

        def add(place: int, result: LoglikelihoodResult) -> None:
            owner = owners[place]
            parts[owner].append(result.logprob)
            if report is not None and len(parts[owner]) == len(windows[owner]):
                report(owner, math.fsum(parts[owner]))

        for index, pairs in enumerate(windows):
            if not pairs and report is not None:
                report(index, 0.0)
        self.score_ids([pair for pairs in windows for pair in pairs], add)
        return [math.fsum(values) for values in parts]

    def generate(self, requests: Sequence[Generate], report: Reporter[str] | None = None) -> list[str]:
        """Texts of answers. Raises as `loglikelihood`."""
        contexts = [self._fitted(self._context(request), request.max_tokens) for request in requests]
        texts = [""] * len(requests)
        for until, max_tokens in sorted({(request.until, request.max_tokens) for request in requests}):
            own = [i for i, each in enumerate(requests) if (each.until, each.max_tokens) == (until, max_tokens)]
            stop = tuple(text for text in until if text)
            for part in self._parts([Pair(contexts[i], ()) for i in own]):
                prompts = [contexts[own[place]] for place in part]
                self._read_ahead(prompts)
                completions = self.engine.generate(prompts, max_tokens=max_tokens, stop=stop, sampling="greedy")
                for place, completion in zip(part, completions, strict=True):
                    texts[own[place]] = completion.text
                    if report is not None:
                        report(own[place], completion.text)
        return texts

    def is_truncated(self, request: Request) -> bool:
        """Whether the beginning of a request's context is left out, since the model's context cannot hold it."""
        if self._capacity is None or isinstance(request, Rolling):
            return False
        if isinstance(request, Generate):
            return self._exceeds(self._context(request), request.max_tokens)
        pair = self._pair(request)
        return self._exceeds(pair.context, len(pair.continuation))

    def score_ids(
        self, pairs: Sequence[Pair], report: Reporter[LoglikelihoodResult] | None = None
    ) -> list[LoglikelihoodResult]:
        """As `loglikelihood`, of token ids: contexts of at least one, and what is scored behind them."""
        owners: dict[Pair, list[int]] = {}
        for index, pair in enumerate(pairs):
            owners.setdefault(pair, []).append(index)
        results: dict[Pair, LoglikelihoodResult] = {}
        unique = list(owners)
        for part in self._parts(unique):
            asked = [unique[place] for place in part]
            contexts, continuations = [pair.context for pair in asked], [pair.continuation for pair in asked]
            self._read_ahead(contexts)
            for pair, score in zip(asked, self.engine.score(contexts, continuations), strict=True):
                results[pair] = LoglikelihoodResult(score.logprob, score.is_greedy)
                if report is not None:
                    for index in owners[pair]:
                        report(index, results[pair])
        return [results[pair] for pair in pairs]

    def _ids(self, text: Text) -> Ids:
        return tuple(self.engine.tokenizer.encode(text) if isinstance(text, str) else text)

    def _context(self, request: Generate) -> Ids:
        return begun(self.engine.tokenizer, self._ids(request.context), begin=self.begin)

    def _pair(self, request: Loglikelihood) -> Pair:
        return encode_pair(self.engine.tokenizer, request.context, request.continuation, begin=self.begin)

    def _exceeds(self, context: Ids, num_after: int) -> bool:
        return self._capacity is not None and len(context) + num_after > self._capacity

    def _fitted(self, context: Ids, num_after: int) -> Ids:
        """The end of a context that leaves room for as many tokens."""
        if self._capacity is None or not self._exceeds(context, num_after):
            return context
        return context[-max(1, self._capacity - num_after) :]

    # What is shared.

    @property
    def _num_kept(self) -> int:
        """Contexts whose states are in the prefix cache at a time, beside as many shared beginnings; 0 without one."""
        size = self.engine.state_bytes
        if self.engine.prefix_cache is None or size > self.engine.prefix_cache.max_bytes:
            return 0
        return max(1, self.engine.prefix_cache.max_bytes // (2 * size))

    def _parts(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Indices of pairs, sorted and in parts for a call each, of which contexts share as much as may be."""
        most, num_kept = _ROUNDS * self.engine.options.num_slots, self._num_kept or math.inf
        part: list[int] = []
        contexts: set[Ids] = set()
        num_tokens = 0
        for index in sorted(range(len(pairs)), key=pairs.__getitem__):
            context, continuation = pairs[index]
            is_new = context not in contexts
            is_full = len(part) >= most or num_tokens >= _MAX_TOKENS or (is_new and len(contexts) >= num_kept)
            if part and is_full:
                yield part
                part, contexts, num_tokens, is_new = [], set(), 0, True
            part.append(index)
            contexts.add(context)
            num_tokens += len(continuation) + is_new * len(context)
        if part:
            yield part

    def _read_ahead(self, contexts: Sequence[Ids]) -> None:
        """Puts the states after contexts that occur several times, and after long shared beginnings, into the cache."""
        if not self._num_kept:
            return
        options, counts = self.engine.options, Counter(contexts)
        for prefix in shared_prefixes(sorted(counts), options.prefill_length, options.min_prefix_tokens):
            if not self._is_cached(prefix):
                self.engine.prefill(None, prefix)
        several = [ids for ids, count in counts.items() if count > 1 and len(ids) >= options.min_prefix_tokens]
        if unread := [ids for ids in several if not self._is_cached(ids)]:
            self.engine.generate(unread, max_tokens=0)

    def _is_cached(self, ids: Ids) -> bool:
        """Whether the state after these tokens is in the cache; it is then the last to be evicted."""
        assert self.engine.prefix_cache is not None
        found = self.engine.prefix_cache.lookup(ids)
        return found is not None and found[0] == len(ids)


def shared_prefixes(contexts: Sequence[Ids], min_saved: int, min_length: int = 1) -> list[Ids]:
    """Beginnings of several contexts that are worth a prefill of their own, each before those that continue it.

    Args:
      contexts: sorted, each once.
      min_saved: tokens that it must spare: all but one of the contexts need not read them.
      min_length: tokens of a beginning.
    """
    common = [_common_length(*both) for both in itertools.pairwise(contexts)]
    found: list[Ids] = []
    groups = [(0, len(contexts), 0)]  # contexts[begin:end] share some tokens, of which `known` are read already
    while groups:
        begin, end, known = groups.pop()
        if end - begin < 2:
            continue
        length = min(common[begin : end - 1])
        if length >= min_length and (end - begin - 1) * (length - known) >= min_saved:
            found.append(contexts[begin][:length])
            known = length
        borders = [begin, *(i + 1 for i in range(begin, end - 1) if common[i] == length), end]
        groups += [(*both, known) for both in reversed(list(itertools.pairwise(borders)))]
    return found


def _common_length(a: Ids, b: Ids) -> int:
    """Number of tokens with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
