"""From the arguments of a call to jobs that the scheduler takes: everything is checked here, before any work."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rwkv_jax.checks import ConfigError, is_whole, shown
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.inference.engine.job import Job, PrefillCursor, TokenTables
from rwkv_jax.inference.engine.news import News
from rwkv_jax.inference.engine.programs import SlotState
from rwkv_jax.inference.engine.prompts import build_requests, build_score_requests
from rwkv_jax.inference.engine.requests import Request
from rwkv_jax.inference.engine.text import TextStream
from rwkv_jax.inference.sampling.choose import bias_array, initial_occurrences, occurrence_weights
from rwkv_jax.inference.sampling.grammar import GrammarCompiler
from rwkv_jax.inference.state.snapshot import Snapshot, StateError


class Admission:
    """Builds requests and jobs for one model, tokenizer and number of slots."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, num_slots: int) -> None:
        self._config, self._tokenizer, self._num_slots = config, tokenizer, num_slots
        self._capacity = config.sizes().context_length or None
        # Padding rows of the embedding have no token and are untrained.
        self._named = np.array([tokenizer.is_named(token) for token in range(config.vocab_size)])
        self._grammars = GrammarCompiler(tokenizer, config.vocab_size)
        self.weights = occurrence_weights(tokenizer, config.vocab_size)
        """float32 [V], of `occurrence_weights`."""

    def requests(
        self, prompts: Any, copies: int, arguments: Mapping[str, Any], *, owner: str, empty_row: SlotState
    ) -> list[Request]:
        """Checked requests, with copies of a prompt adjacent.

        Args:
          arguments: as in `Engine.stream`.
          owner: checksum of the model's parameters, and
          empty_row: a slot's content, which states have to be like.

        Raises:
          ConfigError: an invalid value, such as a state of another model (StateError).
        """
        if arguments.get("stop_ids") is None:
            arguments = {**arguments, "stop_ids": self._tokenizer.ends}
        requests = build_requests(self.encode, self._tokenizer.end_of_text, prompts, copies, arguments)
        for i, request in enumerate(requests):
            if request.state is not None:
                check_state(request.state, self._config, owner, empty_row)
            name = "prompt" if len(requests) == copies else f"prompt {i // copies}"
            request.check(self._config.vocab_size, self._capacity, name=name)
            bias_array(request.sampling, self._named)  # rejects bans of all tokens
            if request.grammar is not None:
                self._grammars.check(request.grammar)  # rejects what cannot be compiled, or matches nothing
            if request.negative_ids and self._num_slots < 2:
                raise ConfigError(
                    f"guidance_scale = {request.guidance_scale}: needs two slots; build the engine with num_slots >= 2"
                )
        return requests

    def score_requests(self, contexts: Any, continuations: Any, **given: Any) -> list[Request]:
        """Checked requests to score; arguments and errors as those of `build_score_requests`."""
        starts = (self._tokenizer.begin, self._tokenizer.beginning)
        requests = build_score_requests(self.encode, *starts, contexts, continuations, **given)
        for i, request in enumerate(requests):
            request.check(self._config.vocab_size, self._capacity, name=f"context {i}")
        return requests

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """Ids of a text, after those with which texts begin (`Tokenizer.begin`) if `begins`.

        Raises:
          ConfigError: the text is empty, or not UTF-8.
        """
        if not text:
            raise ConfigError("prompt = '': is empty; for a text from its start give [tokenizer.end_of_text]")
        try:
            ids = self._tokenizer.encode(text)
        except UnicodeEncodeError as error:
            raise ConfigError(f"prompt = {shown(text)}: is not UTF-8") from error
        return [*self._tokenizer.begin, *ids] if begins else ids

    def jobs(self, requests: Sequence[Request], news: News, max_pending_chunks: int | None = None) -> list[Job]:
        """Jobs of one consumer, who learns of chunks by `news`."""
        return [self._job(request, index, news, max_pending_chunks) for index, request in enumerate(requests)]

    def _job(self, request: Request, index: int, news: News, max_pending_chunks: int | None) -> Job:
        texts = [request.ids, request.negative_ids] if request.negative_ids else [request.ids]
        cursors = [PrefillCursor(tuple(map(int, ids)), adapter=request.adapter) for ids in texts]
        if scored := tuple(map(int, request.scored_ids)):
            ids = (*cursors[0].ids, *scored)
            cursors = [PrefillCursor(ids, num_scored=len(scored), adapter=request.adapter)]
        tables, text = functools.partial(self._tables, request), TextStream(self._tokenizer, request.stop)
        constraint = None if request.grammar is None else self._grammars.constraint(request.grammar)
        return Job(request, index, cursors, tables, text, news, constraint, max_pending_chunks)

    def _tables(self, request: Request) -> TokenTables:
        """Created when a text gets its slot, not while it is queued: V entries each."""
        stops = np.zeros(self._config.vocab_size, np.bool_)
        stops[list(request.stop_ids)] = True
        occurrences = initial_occurrences(request.sampling, request.ids, self.weights)
        return TokenTables(occurrences, bias_array(request.sampling, self._named), stops)


def check_state(snapshot: Snapshot, config: ModelConfig, owner: str, empty_row: SlotState) -> None:
    """Raises StateError for a state of another model."""
    if not is_whole(snapshot.num_tokens) or snapshot.num_tokens < 0:
        raise StateError(f"state: its num_tokens = {shown(snapshot.num_tokens)} is no number of tokens")
    is_ours = snapshot.owner is None or (isinstance(snapshot.owner, str) and snapshot.owner == owner)
    if not is_ours or not _is_like(snapshot, empty_row):
        raise StateError(
            f"state: is of another model than this {config.title} of {config.num_layers} x {config.width}; give one "
            "that an engine of this very model made"
        )


def _is_like(snapshot: Snapshot, row: Any) -> bool:
    """Whether a snapshot has the arrays of a slot's row."""
    try:
        leaves, tree = jax.tree.flatten((snapshot.state, snapshot.logits))
    except (RecursionError, SystemError, TypeError, ValueError):  # of what is nested too deep, or cannot be sorted
        return False
    expected, like = jax.tree.flatten((row.state, row.logits))
    return tree == like and all(
        np.shape(x) == y.shape and getattr(x, "dtype", None) == y.dtype for x, y in zip(leaves, expected, strict=True)
    )
