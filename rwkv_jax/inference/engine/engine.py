"""Inference engine for any number of concurrent texts, each with a state of constant size."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, overload

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rwkv_jax.autotune import measured_prefill
from rwkv_jax.checks import ConfigError, is_whole, require_whole, shown
from rwkv_jax.data.tokenizers import Tokenizer, fits_model
from rwkv_jax.inference.engine.decode_step import choose_step
from rwkv_jax.inference.engine.job import Job, PrefillCursor, TokenTables
from rwkv_jax.inference.engine.options import EngineOptions
from rwkv_jax.inference.engine.product_form import choose_form, with_form
from rwkv_jax.inference.engine.programs import Programs
from rwkv_jax.inference.engine.prompts import MAX_BEST_OF, Arguments, build_requests, is_one
from rwkv_jax.inference.engine.requests import Chunk, Completion, Prompt, QueueFullError, Request, join
from rwkv_jax.inference.engine.scheduler import Scheduler, Shapes
from rwkv_jax.inference.engine.stream import Stream, uninterrupted
from rwkv_jax.inference.engine.text import TextStream
from rwkv_jax.inference.sampling.choose import bias_array, initial_occurrences, occurrence_weights
from rwkv_jax.inference.state.prefix_cache import PrefixCache
from rwkv_jax.inference.state.session import Session
from rwkv_jax.inference.state.session_store import SessionStore
from rwkv_jax.inference.state.snapshot import Snapshot, StateError
from rwkv_jax.inference.state.state_file import Identity, model_identity
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import prefill_implementation, unstacked, with_implementation

_SHORT_ROWS = 8  # prompts in a batched prefill
_MAX_PENDING_CHUNKS = 1024  # uncollected chunks at which a stream pauses
_MIN_CONVERSATION_BYTES = 1024  # counted for a session without state, so that names alone cannot fill the memory


class Engine:
    """Continuous batching of any number of texts: `generate`, `stream`, sessions. Thread-safe.

    Texts share a fixed number of slots on the device and join and leave between steps; memory does not grow with the
    length of a text. The model is stored with separate arrays per layer (`unstacked`).
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        options: EngineOptions | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        """Allocates the slots; programs are compiled on first use.

        Args:
          model: of any generation, with parameters of any dtype, packed or not.
          tokenizer: the model's.
          options: None is the defaults.
          mesh: the mesh of the model's parameters (`from_pretrained(mesh=)`); slots are split over its
            axes `data` and `fsdp` if these divide their number, and always decoded together.

        Raises:
          ConfigError: the tokenizer is not the model's.
        """
        if not isinstance(model, LanguageModel) or not hasattr(tokenizer, "vocab_size"):
            raise ConfigError(
                f"Engine({type(model).__name__}, {type(tokenizer).__name__}): must be a model, and then its tokenizer"
            )
        config = model.config
        if not fits_model(tokenizer, config.vocab_size):
            raise ConfigError(
                f"tokenizer: it has {tokenizer.vocab_size} tokens where the model has {config.vocab_size}; use its own"
            )
        for name, value, kind in (("options", options, EngineOptions), ("mesh", mesh, Mesh)):
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name} = {shown(value)}: must be of the type {kind.__name__}, or None")
        options = options or EngineOptions()
        if mesh is not None:
            options = dataclasses.replace(options, batch_sizes=(options.num_slots,))
        self.options, self.config, self.tokenizer = options, config, tokenizer
        self.model = unstacked(model)
        devices = jax.tree.leaves(nnx.state(self.model, nnx.Param))[0].devices()
        if mesh is None and len(devices) > 1:
            raise ConfigError(
                f"mesh = None: the model lies on {len(devices)} devices; give the mesh it was loaded with"
            )
        device = next(iter(devices))
        implementation, _ = prefill_implementation(config, device.platform)
        if implementation is not None:
            self.model = with_implementation(self.model, implementation)
        # Measured on one device; on a mesh XLA splits the arrays, which no kernel is prepared for.
        measures = options.tune == "auto" and mesh is None
        if options.tune == "auto":
            self.model = with_form(self.model, choose_form(self.model, device.platform))
        if measures and (step := choose_step(config, device.platform, options.sizes)) is not None:
            self.model = with_implementation(self.model, step=step)
        self._capacity = config.sizes().context_length or None
        # Padding rows of the embedding have no token and are untrained.
        self._named = np.array([tokenizer.is_named(token) for token in range(config.vocab_size)])
        self._weights = occurrence_weights(tokenizer, config.vocab_size)
        self._lock = threading.RLock()
        self._identity: Identity | None = None
        self._identity_lock = threading.Lock()  # hashing the weights takes seconds, while others continue
        self.prefix_cache = (
            PrefixCache(options.prefix_bytes) if options.prefix_bytes and not options.batch_invariant else None
        )
        self.sessions = SessionStore(
            options.session_bytes,
            options.session_idle_seconds,
            min_bytes=_MIN_CONVERSATION_BYTES,
            may_go=lambda session: not session.is_in_use,
        )
        measured = measured_prefill(config, device.platform) if measures else None
        programs = Programs(self.model, options.num_slots, options.burst_length, self._weights, mesh, measured)
        self._scheduler = Scheduler(
            programs,
            Shapes(
                options.sizes,
                options.prefill_length,
                options.short_prefill_length,
                # Rows split over devices are not moved.
                options.num_slots if mesh is not None else min(options.num_slots, _SHORT_ROWS),
                always_batched=options.batch_invariant,
            ),
            max_queue=options.max_queue,
            prefix_cache=self.prefix_cache,
            min_prefix_tokens=options.min_prefix_tokens,
        )

    # Texts.

    @overload
    def generate(
        self,
        prompts: Prompt,
        *,
        best_of: int = 1,
        conversation: str | None = None,
        **arguments: Unpack[Arguments],
    ) -> Completion: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, best_of: int = 1, **arguments: Unpack[Arguments]
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        best_of: int = 1,
        conversation: str | None = None,
        **arguments: Unpack[Arguments],
    ) -> Completion | list[Completion]:
        """Continues one prompt, or many of any lengths at once.

        Args:
          prompts: a text or token ids, or several of them. A text starts with the end-of-text token, like training
            documents; ids are used unchanged.
          best_of: number of continuations to generate per prompt, with different seeds; the one with the greatest mean
            logprob is returned, an empty one only if all are.
          conversation: the name of a conversation that one prompt continues; its state is kept in `sessions`.
          arguments: as in `stream`.

        Returns:
          One completion for one prompt, a list for several, in their order.

        Raises:
          ConfigError: an invalid value, such as a state of another model (StateError); nothing has been run then.
          QueueFullError: there is no room before others collect what they have asked for.
          NotFiniteError: the model's logits are not finite.
        """
        one = is_one(prompts)
        require_whole("best_of", best_of, 1, MAX_BEST_OF)
        best_of = int(best_of)
        if conversation is not None:
            if not one or best_of != 1:
                raise ConfigError(
                    f"conversation = {shown(conversation)}: continues with one prompt and one continuation; leave "
                    "best_of and further prompts out"
                )
            return self.conversation(conversation).generate(prompts, **arguments)  # pyright: ignore[reportArgumentType]
        completions = self._run(self._requests(prompts, best_of, arguments))
        best = [
            dataclasses.replace(
                max(completions[i : i + best_of], key=lambda completion: completion.score),
                index=i // best_of,
            )
            for i in range(0, len(completions), best_of)
        ]
        return best[0] if one else best

    def stream(self, prompts: Prompt | Sequence[Prompt], **arguments: Unpack[Arguments]) -> Stream:
        """Continues one prompt or many, chunk by chunk: an iterator, and an async iterator.

        Args:
          prompts: as in `generate`.
          max_tokens: maximum tokens to generate; 256 by default.
          sampling: a `SamplingParams` or the name of a preset ("greedy", "openai", "rwkv"), or one for each prompt;
            `SamplingParams()` by default.
          seed: random seed. With one number, prompt i has seed + i; or a number per prompt.
          stop: strings that end a text; not even their first characters are shown.
          stop_ids: tokens that end a text; None is the end-of-text token only.
          top_logprobs: number of most likely tokens to report at each position, at most 20 and at most V.
          guidance_scale, negative_prompt: classifier-free guidance, away from the logits after `negative_prompt`.
          state: the `Snapshot` to continue from; None begins a text.
          return_state: whether `Stream.snapshot` will be used.
          client_id: identifies the client; clients with queued texts take turns.

        A text pauses while a thousand of its chunks are not collected.

        Raises:
          ConfigError: an invalid value.
          QueueFullError: too many texts are queued already.
        """
        requests = self._requests(prompts, 1, arguments)
        return self._submitted(
            [self._job(request, index, _MAX_PENDING_CHUNKS) for index, request in enumerate(requests)]
        )

    submit = stream
    """As `stream`; submitted texts run whenever any caller waits, and are collected by iterating."""

    def prefill(self, state: Snapshot | None, prompt: Prompt) -> Snapshot:
        """Prefills a prompt after a state (None begins a text) and returns the new state.

        Raises:
          ConfigError: an invalid value.
          QueueFullError: there is no room before others collect what they have asked for.
        """
        (request,) = self._requests(prompt, 1, {"max_tokens": 0, "state": state, "return_state": True})
        while True:
            with self._lock:
                if self._scheduler.room:
                    stream = self._submitted([self._job(request, 0)])
                    break
            self._wait()
        for _ in stream:
            pass
        assert stream.snapshot is not None
        return stream.snapshot

    # Conversations.

    def session(self) -> Session:
        """A new conversation."""
        return Session(self)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """A conversation from a file of `Session.save`; raises as `Session.load`."""
        return Session.load(self, path)

    def conversation(self, name: str) -> Session:
        """The named conversation in `sessions`; a new one if there is none.

        Raises:
          ConfigError: the name is not a string, or a single state is larger than `session_bytes`.
        """
        if not isinstance(name, str):
            raise ConfigError(f"conversation = {shown(name)}: must be a string")
        if (one := self._scheduler.state_bytes) > self.options.session_bytes:
            raise ConfigError(
                f"session_bytes = {self.options.session_bytes}: a state of this model has {one}; build the engine with "
                "more, or use a session() of your own"
            )
        with self._lock:
            session = self.sessions.get(name)
            if session is None:
                session = Session(self, on_change=functools.partial(self._keep, name))
                self.sessions.put(name, session)
            return session

    def _keep(self, name: str, session: Session) -> None:
        """Updates a conversation's size; re-adds an evicted one unless another has its name."""
        with self._lock:
            if self.sessions.get(name) not in (None, session):
                return
            try:
                self.sessions.put(name, session)
            except ConfigError:  # too large for the store with its marks; the caller still has it
                self.sessions.pop(name)

    @property
    def owner(self) -> str:
        """Checksum of the model's parameters, stored in its snapshots."""
        return self._scheduler.owner

    @property
    def identity(self) -> Identity:
        """Identity of this engine's state files; hashes all parameters on first use."""
        with self._identity_lock:
            if self._identity is None:
                self._identity = model_identity(self.model, self.tokenizer)
            return self._identity

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """Ids of a text, after the end-of-text token if `begins`.

        Raises:
          ConfigError: the text is empty, or not UTF-8.
        """
        if not text:
            raise ConfigError("prompt = '': is empty; for a text from its start give [tokenizer.end_of_text]")
        try:
            ids = self.tokenizer.encode(text)
        except UnicodeEncodeError as error:
            raise ConfigError(f"prompt = {shown(text)}: is not UTF-8") from error
        return [self.tokenizer.end_of_text, *ids] if begins else ids

    # Arguments to jobs.

    def _requests(self, prompts: Any, copies: int, arguments: Mapping[str, Any]) -> list[Request]:
        """Checked requests, with copies of a prompt adjacent."""
        requests = build_requests(self.encode, self.tokenizer.end_of_text, prompts, copies, arguments)
        for i, request in enumerate(requests):
            if request.state is not None:
                self._check_state(request.state)
            name = "prompt" if len(requests) == copies else f"prompt {i // copies}"
            request.check(self.config.vocab_size, self._capacity, name=name)
            bias_array(request.sampling, self._named)  # rejects bans of all tokens
            if request.negative_ids and self.options.num_slots < 2:
                raise ConfigError(
                    f"guidance_scale = {request.guidance_scale}: needs two slots; build the engine with num_slots >= 2"
                )
        return requests

    def _job(self, request: Request, index: int, max_pending_chunks: int | None = None) -> Job:
        texts = [request.ids, request.negative_ids] if request.negative_ids else [request.ids]
        cursors = [PrefillCursor(tuple(map(int, ids))) for ids in texts]
        tables, text = functools.partial(self._tables, request), TextStream(self.tokenizer, request.stop)
        return Job(request, index, cursors, tables, text, max_pending_chunks)

    def _tables(self, request: Request) -> TokenTables:
        """Created when a text gets its slot, not while it is queued: V entries each."""
        stops = np.zeros(self.config.vocab_size, np.bool_)
        stops[list(request.stop_ids)] = True
        occurrences = initial_occurrences(request.sampling, request.ids, self._weights)
        return TokenTables(occurrences, bias_array(request.sampling, self._named), stops)

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs texts to completion. Queues only as many as may start soon, to leave room for others."""
        pending = collections.deque(enumerate(requests))
        chunks: list[list[Chunk]] = [[] for _ in requests]
        streams: collections.deque[Stream] = collections.deque()
        waiting: collections.deque[Job] = collections.deque()
        try:
            while pending or streams:
                with self._lock:
                    while waiting and waiting[0].has_begun:
                        waiting.popleft()
                    while pending and self._scheduler.room and len(waiting) < self.options.num_slots:
                        index, request = pending.popleft()
                        waiting.append(self._job(request, index))
                        streams.append(self._submitted([waiting[-1]]))
                if not streams:
                    self._wait()
                elif (chunk := next(streams[0], None)) is None:
                    streams.popleft()
                else:
                    chunks[chunk.index].append(chunk)
        finally:
            for stream in streams:
                stream.cancel()
        return [join(own, index, len(requests[index].ids)) for index, own in enumerate(chunks)]

    def _submitted(self, jobs: Sequence[Job]) -> Stream:
        with self._lock, uninterrupted():
            self._scheduler.submit(jobs)
            return Stream(jobs, self._scheduler, self._lock)

    def _wait(self) -> None:
        """Runs one step of the submitted texts. Raises QueueFullError if all of them wait for their consumers."""
        with self._lock, uninterrupted():
            if not self._scheduler.step() and not self._scheduler.room:
                raise QueueFullError(
                    f"queue: max_queue = {self.options.max_queue}, and as many texts are half collected; "
                    "collect or cancel some first, or build the engine with more"
                )

    def _check_state(self, snapshot: Snapshot) -> None:
        if not is_whole(snapshot.num_tokens) or snapshot.num_tokens < 0:
            raise StateError(f"state: its num_tokens = {shown(snapshot.num_tokens)} is no number of tokens")
        is_ours = snapshot.owner is None or (
            isinstance(snapshot.owner, str) and snapshot.owner == self._scheduler.owner
        )
        if not is_ours or not _is_like(snapshot, self._scheduler.empty_row):
            raise StateError(
                f"state: is of another model than this {self.config.title} of "
                f"{self.config.num_layers} x {self.config.width}; give one that an engine of this very model made"
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
