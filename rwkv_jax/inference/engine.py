"""The inference engine: any number of texts at once, each with a state of constant size."""

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

from rwkv_jax.checks import ConfigError, require_whole
from rwkv_jax.data.tokenizers import Tokenizer, fits_model
from rwkv_jax.inference.job import Job, Reader, Tables
from rwkv_jax.inference.options import EngineOptions
from rwkv_jax.inference.prefix_store import PrefixStore
from rwkv_jax.inference.programs import Programs
from rwkv_jax.inference.prompts import MOST_COPIES, Arguments, is_one, requests_of
from rwkv_jax.inference.requests import Chunk, Completion, Prompt, QueueFullError, Request, join
from rwkv_jax.inference.sampling import bias_of, initial_occurrences, occurrence_weights
from rwkv_jax.inference.scheduler import Scheduler, Shapes
from rwkv_jax.inference.session import Session
from rwkv_jax.inference.snapshot import Snapshot, StateError
from rwkv_jax.inference.state_file import Identity, model_identity
from rwkv_jax.inference.stores import SessionStore
from rwkv_jax.inference.stream import Stream, uninterrupted
from rwkv_jax.inference.text import TextStream
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import prefill_implementation, unstacked, with_implementation

_SHORT_ROWS = 8  # prompts whose short pieces are read in one call
_MOST_UNCOLLECTED = 1024  # chunks of a stream, behind which it waits for its reader
_LEAST_CONVERSATION_BYTES = 1024  # that one counts with before it has a state, or names alone would fill the memory


class Engine:
    """Runs a model on texts: `generate`, `stream`, sessions. Safe to use from several threads.

    Texts share a fixed number of slots on the device and join and leave as they come and end; nothing grows with the
    length of a text but its text. The model is held with arrays of its own for each layer (`unstacked`).
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        options: EngineOptions | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        """Allocates the slots; programs are compiled when they are first needed.

        Args:
          model: of any generation, with parameters of any dtype, packed or not.
          tokenizer: the model's.
          options: None is the defaults.
          mesh: the devices over which the model's parameters lie (`from_pretrained(mesh=)`); slots are split over its
            axes `data` and `fsdp` if these divide their number, and always written together.

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
        self._capacity = config.sizes().context_length or None
        # Embeddings have rows that no tokenizer names, and that no text has trained.
        self._named = np.array([tokenizer.is_named(token) for token in range(config.vocab_size)])
        self._weights = occurrence_weights(tokenizer, config.vocab_size)
        self._lock = threading.RLock()
        self._identity: Identity | None = None
        self._identity_lock = threading.Lock()  # its own: hashing weights takes seconds, in which others are written
        self.prefixes = PrefixStore(options.prefix_bytes) if options.prefix_bytes else None
        self.sessions: SessionStore[Session] = SessionStore(
            options.session_bytes,
            options.session_idle_seconds,
            least_bytes=_LEAST_CONVERSATION_BYTES,
            may_go=lambda session: not session.is_in_use,
        )
        programs = Programs(self.model, options.num_slots, options.burst_length, self._weights, mesh)
        self._scheduler = Scheduler(
            programs,
            Shapes(
                options.sizes,
                options.prefill_length,
                options.short_prefill_length,
                # Rows that are split over devices are read as they lie.
                options.num_slots if mesh is not None else min(options.num_slots, _SHORT_ROWS),
            ),
            most_waiting=options.most_waiting,
            prefixes=self.prefixes,
            fewest_prefix_tokens=options.fewest_prefix_tokens,
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
          prompts: a text or token ids, or several of them. A text begins with the end-of-text token, as the training
            documents do; ids are taken as they are.
          best_of: how many continuations to write of each prompt, with seeds of their own, of which the one with the
            greatest mean log-probability is returned; one without text only if none has any.
          conversation: the name of a conversation that one prompt goes on; its state is kept in `sessions`.
          arguments: as `stream` has them.

        Returns:
          One completion for one prompt, a list for several, in their order.

        Raises:
          ConfigError: a value that cannot work, a state of another model among them (StateError); nothing has been run
            then.
          QueueFullError: there is no room before others collect what they have asked for.
          NotFiniteError: the model's logits are not finite.
        """
        one = is_one(prompts)
        if conversation is not None:
            if not one or best_of != 1:
                raise ConfigError(
                    f"conversation = {conversation!r}: goes on with one prompt and one continuation; leave best_of and "
                    "further prompts out"
                )
            return self.conversation(conversation).generate(prompts, **arguments)  # pyright: ignore[reportArgumentType]
        require_whole("best_of", best_of, 1, MOST_COPIES)
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
          prompts: as `generate` has them.
          max_tokens: most tokens to write; 256 by default.
          sampling: a `SamplingParams`, or one for each prompt; `SamplingParams()` by default.
          seed: of the draws. With one number, prompt i has seed + i; or a number for each prompt.
          stop: strings that end a text; neither they nor their first characters are shown.
          stop_ids: tokens that end a text; None is the end-of-text token alone.
          num_top: how many of the likeliest tokens to report with each token, at most 20 and at most V.
          guidance, unguided: classifier-free guidance away from what the model says after the prompt `unguided`.
          start: the `Snapshot` that the prompt goes on from; None begins a text.
          keep: whether `Stream.snapshot` will be asked for.
          client: who asks; clients with waiting texts take turns.

        A text of which a thousand chunks have not been collected is written on when they are.

        Raises:
          ConfigError: a value that cannot work.
          QueueFullError: too many texts wait already.
        """
        requests = self._requests(prompts, 1, arguments)
        return self._submitted([self._job(request, index, _MOST_UNCOLLECTED) for index, request in enumerate(requests)])

    submit = stream
    """The same: what is submitted is run whenever anybody waits for anything, and is collected when it is iterated."""

    def read(self, snapshot: Snapshot | None, prompt: Prompt) -> Snapshot:
        """The state after a prompt that goes on from a state; None begins a text.

        Raises:
          ConfigError: a value that cannot work.
          QueueFullError: there is no room before others collect what they have asked for.
        """
        (request,) = self._requests(prompt, 1, {"max_tokens": 0, "start": snapshot, "keep": True})
        while True:
            with self._lock:
                if self._scheduler.room:
                    stream = self._submitted([self._job(request, 0)])
                    break
            self._wait()
        return _end_of(stream)

    # Conversations.

    def session(self) -> Session:
        """A conversation that has not begun."""
        return Session(self)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """A conversation from a file of `Session.save`; see `Session.load`."""
        return Session.load(self, path)

    def conversation(self, name: str) -> Session:
        """The conversation of a name, kept in `sessions`; one that has not begun, if there is none.

        Raises:
          ConfigError: the name is no string, or a single state is more than `session_bytes`.
        """
        if not isinstance(name, str):
            raise ConfigError(f"conversation = {name!r}: must be a string")
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
        """Counts a conversation's bytes anew; one that went to make room comes back, unless another has its name."""
        with self._lock:
            if self.sessions.get(name) not in (None, session):
                return
            try:
                self.sessions.put(name, session)
            except ConfigError:  # with all that it has marked it is larger than the store; its user still has it
                self.sessions.pop(name)

    @property
    def owner(self) -> str:
        """Checksum of the model's parameters: what its snapshots are marked with."""
        return self._scheduler.owner

    @property
    def identity(self) -> Identity:
        """What states of this engine belong to; reads all parameters when it is first asked for."""
        with self._identity_lock:
            if self._identity is None:
                self._identity = model_identity(self.model, self.tokenizer)
            return self._identity

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """Ids of a text, after an end-of-text token where it begins one.

        Raises:
          ConfigError: the text is empty, or no UTF-8.
        """
        if not text:
            raise ConfigError("prompt = '': is empty; for a text from its start give [tokenizer.end_of_text]")
        try:
            ids = self.tokenizer.encode(text)
        except UnicodeEncodeError as error:
            raise ConfigError(f"prompt = {text!r}: is not UTF-8") from error
        return [self.tokenizer.end_of_text, *ids] if begins else ids

    # From what is asked to what is run.

    def _requests(self, prompts: Any, copies: int, arguments: Mapping[str, Any]) -> list[Request]:
        """Requests that can be run; see `requests_of`."""
        requests = requests_of(self.encode, self.tokenizer.end_of_text, prompts, copies, arguments)
        for i, request in enumerate(requests):
            if request.start is not None:
                self._check_state(request.start)
            name = "prompt" if len(requests) == copies else f"prompt {i // copies}"
            request.check(self.config.vocab_size, self._capacity, name=name)
            bias_of(request.sampling, self._named)  # refuses bans that leave nothing
            if request.unguided_ids and self.options.num_slots < 2:
                raise ConfigError(
                    f"guidance = {request.guidance}: needs two slots; build the engine with num_slots >= 2"
                )
        return requests

    def _job(self, request: Request, index: int, most_uncollected: int | None = None) -> Job:
        texts = [request.ids, request.unguided_ids] if request.unguided_ids else [request.ids]
        readers = [Reader(tuple(map(int, ids))) for ids in texts]
        tables, text = functools.partial(self._tables, request), TextStream(self.tokenizer, request.stop)
        return Job(request, index, readers, tables, text, most_uncollected)

    def _tables(self, request: Request) -> Tables:
        """Made when a text gets its slot, not while it waits: each has an entry for every token."""
        stops = np.zeros(self.config.vocab_size, np.bool_)
        stops[list(request.stop_ids)] = True
        occurrences = initial_occurrences(request.sampling, request.ids, self._weights)
        return Tables(occurrences, bias_of(request.sampling, self._named), stops)

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs texts to their ends. No more of them are in the queue than may soon begin: it is for others, too."""
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
        """Runs what others have submitted, one turn. Raises QueueFullError where all of it waits for its readers."""
        with self._lock, uninterrupted():
            if not self._scheduler.tick() and not self._scheduler.room:
                raise QueueFullError(
                    f"queue: most_waiting = {self.options.most_waiting}, and as many texts are half collected; "
                    "collect or cancel some first, or build the engine with more"
                )

    def _check_state(self, snapshot: Snapshot) -> None:
        like = self._scheduler.empty_row
        expected, found = (
            jax.tree.map(lambda x: (tuple(x.shape), np.dtype(x.dtype).name), (row.state, row.logits))
            for row in (like, snapshot)
        )
        is_ours = snapshot.owner in (None, self._scheduler.owner)
        if not is_ours or jax.tree.structure(snapshot.state) != jax.tree.structure(like.state) or expected != found:
            raise StateError(
                f"start: is a state of another model than this {self.config.title} of "
                f"{self.config.num_layers} x {self.config.width}; give one that an engine of this very model made"
            )


def _end_of(stream: Stream) -> Snapshot:
    """The state after a stream that only reads."""
    for _ in stream:
        pass
    assert stream.snapshot is not None
    return stream.snapshot
