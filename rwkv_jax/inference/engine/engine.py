"""Inference engine for any number of concurrent texts, each with a state of constant size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack, overload

from jax.sharding import Mesh
from numpy.typing import NDArray

from rwkv_jax.checks import ConfigError, require_whole, shown
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.inference.embedder import Embedder, Pooling
from rwkv_jax.inference.engine.adapter_table import AdapterTable
from rwkv_jax.inference.engine.adapters import AdapterPlaces
from rwkv_jax.inference.engine.admission import Admission
from rwkv_jax.inference.engine.assembly import (
    SHORT_ROWS,
    check_arguments,
    make_scheduler,
    measured_implementation,
    with_choices,
)
from rwkv_jax.inference.engine.collector import Collector
from rwkv_jax.inference.engine.driver import Announcement, Driver, EngineStats
from rwkv_jax.inference.engine.news import News
from rwkv_jax.inference.engine.options import EngineOptions
from rwkv_jax.inference.engine.prompts import MAX_BEST_OF, Arguments, is_one
from rwkv_jax.inference.engine.requests import Completion, Prompt, Request, join
from rwkv_jax.inference.engine.scoring import Score
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.inference.state.prefix_cache import PrefixCache
from rwkv_jax.inference.state.session import Session
from rwkv_jax.inference.state.session_store import Name, SessionStore
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.inference.state.state_file import Identity, model_identity
from rwkv_jax.inference.state.tuned import opened_row, row_digest
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.tuning.adapter import Adapter
from rwkv_jax.tuning.pretrained_state import TunedState, base_digest

_MAX_PENDING_CHUNKS = 1024  # uncollected chunks at which a stream pauses
_MIN_CONVERSATION_BYTES = 1024  # counted for a session without state, so that names alone cannot fill the memory


class Engine:
    """Continuous batching of any number of texts: `generate`, `stream`, sessions. Thread-safe.

    A thread of its own, which alone touches the slots, runs all texts: it starts with the first one and ends with
    `close`, which a `with` block calls.

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
        initial_state: str | os.PathLike[str] | TunedState | None = None,
        allow_other_base: bool = False,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        """Allocates the slots; programs are compiled on first use.

        Args:
          model: of any generation, with parameters of any dtype, packed or not.
          tokenizer: the model's.
          options: None is the defaults.
          mesh: the mesh of the model's parameters (`from_pretrained(mesh=)`); slots are split over its
            axes `data` and `fsdp` if these divide their number, and always decoded together.
          initial_state: a tuned state, or its file or run, in which all texts begin, also those to be embedded.
          allow_other_base: whether tuned states and adapters may be of another model of the same sizes.
          adapters: by names that texts choose one by; a batch may mix them (`engine/adapters.py`).

        Raises:
          ConfigError: the tokenizer is not the model's, or the tuned state or an adapter is another model's.
        """
        check_arguments(model, tokenizer, options, mesh)
        options, config = options or EngineOptions(), model.config
        if mesh is not None:
            options = dataclasses.replace(options, batch_sizes=(options.num_slots,))
        self.options, self.config, self.tokenizer = options, config, tokenizer
        self.allow_other_base = allow_other_base
        self.model = with_choices(unstacked(model), options, mesh)
        self._admission = Admission(config, tokenizer, options.num_slots)
        self._sessions_lock = threading.RLock()
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
        self._base_digest = functools.cache(functools.partial(base_digest, self.model))
        digest = None if allow_other_base else self._base_digest
        places = AdapterPlaces(self.model, adapters or {}, options.adapter_places, options.adapter_rank, digest)
        placed, weights = places.with_places(self.model), self._admission.weights
        prefill = measured_implementation(self.model, options, mesh)
        scheduler = make_scheduler(
            placed, weights, options, self.prefix_cache, mesh=mesh, prefill_implementation=prefill
        )
        slots = scheduler.slots
        self.initial_state_digest: str | None = None
        row = None if initial_state is None else opened_row(initial_state, self)
        if row is not None:
            slots.begin_texts_with(row)
            self.initial_state_digest = row_digest(row)
        self._empty_row, self._state_bytes = slots.empty_row, scheduler.state_bytes
        self._driver = Driver(scheduler)
        self.adapters = AdapterTable(places, scheduler, self._driver, adapters or {}, config.num_layers)
        self._collector = Collector(self._driver, self._admission, options.num_slots)
        lengths = {"chunk_length": options.prefill_length, "short_chunk_length": options.short_prefill_length}
        self._embedder = Embedder(self.model, num_rows=SHORT_ROWS, initial_state=row, **lengths)

    # The thread.

    def start(self) -> None:
        """Starts the engine's thread, which the first text would do; no effect if it runs.

        Raises:
          EngineClosedError: the engine was closed.
        """
        self._driver.start()

    def close(self) -> None:
        """Ends the thread after its current step, and all texts with EngineClosedError; frees the slots.

        An engine that nobody refers to any more closes by itself, and so do all when Python ends.
        """
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """In a `with` block: no step begins, so that all texts submitted in it start together. Wait for none in it."""
        return self._driver.hold()

    def announce(self) -> Announcement:
        """Says that texts are about to be submitted, while they are still being prepared; call its `end` after that.

        An idle engine that is given a text waits up to 20 ms for announced ones, so that those that come together start
        together. Others never wait, nor does a text that nobody has announced.
        """
        return self._driver.announce()

    def warm_up(self) -> None:
        """Compiles all programs, which first uses would otherwise wait for."""
        self._driver.call(self._driver.scheduler.slots.warm_up)
        self._embedder.warm_up(self._driver.call)

    def stats(self) -> EngineStats:
        """What the engine is doing and has done; waits for nothing."""
        return self._driver.stats()

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
            session = self.conversation(conversation, adapter=arguments.pop("adapter", None))
            return session.generate(prompts, **arguments)  # pyright: ignore[reportArgumentType]
        ended = self._collector.run(self._requests(prompts, best_of, arguments))
        completions = [join(chunks, i, *stream.num_prompt_tokens) for i, (stream, chunks) in enumerate(ended)]
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
          stop_ids: tokens that end a text; None is those of the tokenizer, `Tokenizer.ends`.
          top_logprobs: number of most likely tokens to report at each position, at most 20 and at most V.
          guidance_scale, negative_prompt: classifier-free guidance, away from the logits after `negative_prompt`.
          state: the `Snapshot` to continue from; None begins a text.
          return_state: whether `Stream.snapshot` will be used.
          client_id: identifies the client; clients with queued texts take turns.
          grammar: a `Grammar` that each text has to match; None for no such limit.
          adapter: name of one of `adapters`; None for the model alone.

        A text pauses while a thousand of its chunks are not collected. The call encodes the prompts, and may wait for a
        step if the queue is full: in an event loop, make it in a thread (`asyncio.to_thread`).

        Raises:
          ConfigError: an invalid value.
          QueueFullError: too many texts are queued already.
        """
        news = News()
        jobs = self._admission.jobs(self._requests(prompts, 1, arguments), news, _MAX_PENDING_CHUNKS)
        self._driver.submit(jobs)
        return Stream(jobs, news, self._driver)

    def prefill(self, state: Snapshot | None, prompt: Prompt, *, adapter: str | None = None) -> Snapshot:
        """Prefills a prompt after a state (None begins a text) and returns the new state; `adapter` as in `stream`.

        Raises:
          ConfigError: an invalid value.
          QueueFullError: there is no room before others collect what they have asked for.
        """
        (request,) = self._requests(
            prompt, 1, {"max_tokens": 0, "state": state, "return_state": True, "adapter": adapter}
        )
        while not (streams := self._collector.try_streams([request])):
            self._driver.wait_for_room()
        (stream,) = streams
        for _ in stream:
            pass
        assert stream.snapshot is not None
        return stream.snapshot

    def score(
        self,
        contexts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt] | None = None,
        *,
        top_logprobs: int = 0,
        client_id: str = "",
        adapter: str | None = None,
    ) -> list[Score]:
        """Log-probabilities of given tokens: of the continuation after each context, or of whole texts.

        Args:
          contexts: one or several, of any lengths, as prompts in `generate`; an empty one is the start of a text. Their
            states are kept in the prefix cache as those of prompts are.
          continuations: one for each context, at least a token each. Two texts are encoded together if that begins with
            the context's own ids, else each by itself; ids are used unchanged. None scores all of each context, behind
            `beginning`.
          top_logprobs: number of most likely tokens to report for each, at most 20 and at most V.
          client_id, adapter: as in `stream`.

        Returns:
          A list even for one context, in their order.

        Raises:
          ConfigError: an invalid value; nothing has been run then.
          QueueFullError: there is no room before others collect what they have asked for.
          NotFiniteError: the model's logits are not finite.
        """
        given = {"top_logprobs": top_logprobs, "client_id": client_id, "adapter": self.adapters.find(adapter)}
        requests = self._admission.score_requests(contexts, continuations, **given)
        return [stream.score for stream, _ in self._collector.run(requests)]

    def embed(self, texts: Sequence[Sequence[int]], pooling: Pooling = "mean", *, skip: int = 0) -> NDArray[Any]:
        """One vector of length 1 a text, [n, C], as `Embedder.embed`, read between the steps of other texts.

        Args:
          texts: token ids, at least one a text.
          pooling: `mean` of the hidden states after each token, or the `last` one.
          skip: first tokens of each text that are read and do not count in the mean.

        Raises:
          ConfigError: a text without tokens that count, an id out of range, or a text too long for a Transformer.
          EngineClosedError: the engine was closed.
        """
        return self._embedder.embed(texts, pooling, skip=skip, run=self._driver.call)

    # Conversations.

    def session(self, *, adapter: str | None = None) -> Session:
        """A new conversation; `adapter` as in `stream`."""
        return Session(self, adapter=adapter)

    def load_session(self, path: str | os.PathLike[str], *, adapter: str | None = None) -> Session:
        """A conversation from a file of `Session.save`; raises as `Session.load`."""
        return Session.load(self, path, adapter)

    def conversation(self, name: str, *, adapter: str | None = None) -> Session:
        """The named conversation in `sessions`; a new one if there is none. Adapters have conversations of their own.

        Raises:
          ConfigError: the name is not a string, there is no such adapter, or a single state is larger than
            `session_bytes`.
        """
        if not isinstance(name, str):
            raise ConfigError(f"conversation = {shown(name)}: must be a string")
        if (one := self._state_bytes) > self.options.session_bytes:
            raise ConfigError(
                f"session_bytes = {self.options.session_bytes}: a state of this model has {one}; build the engine with "
                "more, or use a session() of your own"
            )
        self.adapters.find(adapter)  # before a session of it is kept
        key = name if adapter is None else (name, adapter)
        with self._sessions_lock:
            session = self.sessions.get(key)
            if session is None:
                session = Session(self, on_change=functools.partial(self._keep, key), adapter=adapter)
                self.sessions.put(key, session)
            return session

    def _keep(self, name: Name, session: Session) -> None:
        """Updates a conversation's size; re-adds an evicted one unless another has its name."""
        with self._sessions_lock:
            if self.sessions.get(name) not in (None, session):
                return
            try:
                self.sessions.put(name, session)
            except ConfigError:  # too large for the store with its marks; the caller still has it
                self.sessions.pop(name)

    def first_snapshot(self, adapter: str | None = None) -> Snapshot:
        """The state in which texts begin, with an adapter or without."""
        return Snapshot(self._empty_row.state, self._empty_row.logits, 0, self.adapters.owner_of(adapter))

    @property
    def state_bytes(self) -> int:
        """Bytes of one text's state with the logits that follow it."""
        return self._state_bytes

    @property
    def identity(self) -> Identity:
        """Identity of this engine's state files without adapter; hashes all parameters on first use."""
        with self._identity_lock:
            if self._identity is None:
                self._identity = model_identity(self.model, self.tokenizer)
            return self._identity

    @property
    def base_digest(self) -> str:
        """By which tuned states and adapters name this model; hashes all parameters on first use."""
        return self._base_digest()

    def identity_of(self, adapter: str | None) -> Identity:
        """Identity of state files of texts with an adapter."""
        loaded = self.adapters.find(adapter)
        return self.identity if loaded is None else dataclasses.replace(self.identity, adapter=loaded.digest)

    @property
    def beginning(self) -> list[int]:
        """Ids of a text that has not begun: those with which texts begin, or the end of another one."""
        return list(self.tokenizer.beginning)

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """Ids of a text, after `beginning` if `begins`.

        Raises:
          ConfigError: the text is empty, or not UTF-8.
        """
        return self._admission.encode(text, begins=begins)

    def _requests(self, prompts: Any, copies: int, arguments: Mapping[str, Any]) -> list[Request]:
        name = arguments.get("adapter")
        found = {**arguments, "adapter": self.adapters.find(name)}
        owner = self.adapters.owner_of(name)
        return self._admission.requests(prompts, copies, found, owner=owner, empty_row=self._empty_row)
