"""The inference engine: any number of texts at once, each with a state of constant size."""

from __future__ import annotations

import dataclasses
import numbers
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import Tokenizer, fits_model
from rwkv_jax.inference.job import Job, Reader
from rwkv_jax.inference.prefix_store import PrefixStore
from rwkv_jax.inference.programs import Programs, Row
from rwkv_jax.inference.requests import MOST_SEED, Completion, Request, join, require_whole
from rwkv_jax.inference.sampling import Sampling, bias_of, initial_occurrences, occurrence_weights
from rwkv_jax.inference.scheduler import Scheduler, Shapes
from rwkv_jax.inference.session import Session
from rwkv_jax.inference.snapshot import Snapshot, StateError
from rwkv_jax.inference.state_file import Identity, model_identity
from rwkv_jax.inference.stores import SessionStore
from rwkv_jax.inference.stream import Stream
from rwkv_jax.inference.text import TextStream
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.language_model import unstacked, with_implementation

Prompt = str | Sequence[int]
"""A text, or token ids."""

ModelT = TypeVar("ModelT", bound=LanguageModel)

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The sizes of an engine. What is compiled depends on the first four alone, never on what is asked for."""

    num_slots: int = 8
    """Texts that are held on the device at once; others wait."""
    batch_sizes: tuple[int, ...] | None = None
    """How many texts are written at once: the least of these that holds them. None is 1 and all slots."""
    prefill_length: int = 512
    """Tokens of a long prompt that are read at once."""
    short_prefill_length: int = 64
    """Tokens of short prompts, and of the ends of long ones, that are read at once."""
    burst_length: int = 8
    """Most tokens that the device writes on its own before the host sees them."""
    most_waiting: int = 1024
    """Texts that may wait for a slot; one more is refused."""
    prefix_bytes: int = 256 * _MIB
    """For the states of prompts, so that one that begins like another is read from there on; 0 keeps none."""
    fewest_prefix_tokens: int = 16
    """Shorter prompts are not kept."""
    session_bytes: int = 1024 * _MIB
    """For the states of named conversations; the least recently used go first."""
    session_idle_seconds: float = 3600.0
    """After which a named conversation is forgotten."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "prefill_length", "short_prefill_length", "burst_length", "most_waiting"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} = {value}: must be at least 1")
        if self.short_prefill_length > self.prefill_length:
            raise ConfigError(
                f"short_prefill_length = {self.short_prefill_length}: must not exceed prefill_length = "
                f"{self.prefill_length}"
            )
        sizes = self.sizes
        if sizes[0] < 1 or sizes[-1] != self.num_slots:
            raise ConfigError(
                f"batch_sizes = {self.batch_sizes}: must lie from 1 to num_slots = {self.num_slots}, and have that too"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        return tuple(sorted(set(self.batch_sizes or (1, self.num_slots))))


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
        config = model.config
        if not fits_model(tokenizer, config.vocab_size):
            raise ConfigError(
                f"tokenizer: it has {tokenizer.vocab_size} tokens where the model has {config.vocab_size}; use its own"
            )
        options = options or EngineOptions()
        if mesh is not None:
            options = dataclasses.replace(options, batch_sizes=(options.num_slots,))
        self.options, self.config, self.tokenizer = options, config, tokenizer
        self.model = _for_reading(unstacked(model))
        self._capacity = config.sizes().context_length or None
        # Embeddings have rows that no tokenizer names, and that no text has trained.
        self._named = np.array([tokenizer.is_named(token) for token in range(config.vocab_size)])
        self._weights = occurrence_weights(tokenizer, config.vocab_size)
        self._lock = threading.RLock()
        self._identity: Identity | None = None
        self.prefixes = PrefixStore(options.prefix_bytes) if options.prefix_bytes else None
        self.sessions: SessionStore[Session] = SessionStore(options.session_bytes, options.session_idle_seconds)
        programs = Programs(self.model, options.num_slots, options.burst_length, self._weights, mesh)
        self._scheduler = Scheduler(
            programs,
            Shapes(options.sizes, options.prefill_length, options.short_prefill_length),
            most_waiting=options.most_waiting,
            prefixes=self.prefixes,
            fewest_prefix_tokens=options.fewest_prefix_tokens,
        )

    # Texts.

    @overload
    def generate(self, prompts: Prompt, **arguments: Any) -> Completion: ...

    @overload
    def generate(self, prompts: Sequence[Prompt], **arguments: Any) -> list[Completion]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, best_of: int = 1, conversation: str | None = None, **arguments: Any
    ) -> Completion | list[Completion]:
        """Continues one prompt, or many of any lengths at once.

        Args:
          prompts: a text or token ids, or several of them. A text begins with the end-of-text token, as the training
            documents do; ids are taken as they are.
          best_of: how many continuations to write of each prompt, with seeds of their own, of which the one with the
            greatest mean log-probability is returned.
          conversation: the name of a conversation that one prompt goes on; its state is kept in `sessions`.
          arguments: as `stream` has them.

        Returns:
          One completion for one prompt, a list for several, in their order.

        Raises:
          ConfigError: a value that cannot work; nothing has been run then.
        """
        one = _is_one(prompts)
        if conversation is not None:
            if not one or best_of != 1:
                raise ConfigError(
                    f"conversation = {conversation!r}: goes on with one prompt and one continuation; leave best_of and "
                    "further prompts out"
                )
            session = self.conversation(conversation)
            try:
                return session.generate(prompts, **arguments)  # pyright: ignore[reportArgumentType]
            finally:
                self.sessions.put(conversation, session)  # anew, since its bytes have changed
        require_whole("best_of", best_of, 1)
        requests = self._requests(prompts, copies=best_of, **arguments)
        completions = self._run(requests)
        best = [
            dataclasses.replace(
                max(completions[i : i + best_of], key=lambda completion: completion.mean_log_probability),
                index=i // best_of,
            )
            for i in range(0, len(completions), best_of)
        ]
        return best[0] if one else best

    def stream(self, prompts: Prompt | Sequence[Prompt], **arguments: Any) -> Stream:
        """Continues one prompt or many, chunk by chunk: an iterator, and an async iterator.

        Args:
          prompts: as `generate` has them.
          max_tokens: most tokens to write; 256 by default.
          sampling: a `Sampling`, or one for each prompt; `Sampling()` by default.
          seed: of the draws. With one number, prompt i has seed + i; or a number for each prompt.
          stop: strings that end a text; neither they nor their first characters are shown.
          stop_ids: tokens that end a text; None is the end-of-text token alone.
          num_top: how many of the likeliest tokens to report with each token, at most 20.
          guidance, unguided: classifier-free guidance away from what the model says after the prompt `unguided`.
          start: the `Snapshot` that the prompt goes on from; None begins a text.
          keep: whether `Stream.snapshot` will be asked for.
          client: who asks; clients with waiting texts take turns.

        Raises:
          ConfigError: a value that cannot work.
          QueueFullError: too many texts wait already.
        """
        jobs = [self._job(request, index) for index, request in enumerate(self._requests(prompts, **arguments))]
        with self._lock:
            self._scheduler.submit(jobs)
        return Stream(jobs, self._scheduler, self._lock, self._read_again)

    submit = stream
    """The same: what is submitted is run whenever anybody waits for anything, and is collected when it is iterated."""

    def read(self, snapshot: Snapshot | None, prompt: Prompt) -> Snapshot:
        """The state after a prompt that goes on from a state; None begins a text."""
        (request,) = self._requests(prompt, max_tokens=0, start=snapshot, keep=True)
        return self._read_now(request)

    # Conversations.

    def session(self) -> Session:
        """A conversation that has not begun."""
        return Session(self)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """A conversation from a file of `Session.save`; see `Session.load`."""
        return Session.load(self, path)

    def conversation(self, name: str) -> Session:
        """The conversation of a name, kept in `sessions`; one that has not begun, if there is none.

        The store counts a session's bytes when it is looked up here, or put again.
        """
        with self._lock:
            session = self.sessions.get(name) or Session(self)
            self.sessions.put(name, session)
            return session

    @property
    def identity(self) -> Identity:
        """What states of this engine belong to; reads all parameters when it is first asked for."""
        with self._lock:
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

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        copies: int = 1,
        sampling: Sampling | Sequence[Sampling] | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Iterable[str] = (),
        stop_ids: Iterable[int] | None = None,
        unguided: Prompt | None = None,
        start: Snapshot | None = None,
        **fields: Any,
    ) -> list[Request]:
        each: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        if not each and start is not None:
            each = [""]  # no ids: nothing to read before going on
        if not each:
            raise ConfigError("prompts: there are none; give at least one")
        if start is not None:
            self._check_state(start)
        if (start is not None or fields.get("keep")) and len(each) > 1:
            raise ConfigError(f"start and keep are for one text; there are {len(each)} prompts")
        unknown = fields.keys() - {field.name for field in dataclasses.fields(Request)}
        if unknown:
            raise ConfigError(f"{', '.join(sorted(unknown))}: no such argument; Engine.stream lists them")
        samplings = _one_each("sampling", sampling or Sampling(), Sampling, len(each))
        if isinstance(seed, numbers.Integral):
            firsts: Sequence[int] = range(int(seed), int(seed) + len(each) * copies, copies)
        else:
            firsts = _made(tuple, "seed", seed)
            for first in firsts:
                require_whole("seed", first, 0, MOST_SEED)
        if len(firsts) != len(each):
            raise ConfigError(f"seed: {len(firsts)} for {len(each)} prompts; give one, or one for each prompt")
        strings: tuple[str, ...] = (stop,) if isinstance(stop, str) else _made(tuple, "stop", stop)
        ends = _made(frozenset, "stop_ids", [self.tokenizer.end_of_text] if stop_ids is None else stop_ids)
        requests = []
        for i, prompt in enumerate(each):
            if isinstance(prompt, str):
                # After a state there may be nothing to read.
                ids = self.encode(prompt, begins=start is None) if prompt or start is None else []
            else:
                ids = _made(tuple, f"prompt {i}", prompt)
            request = Request(
                ids=tuple(ids),
                sampling=samplings[i],
                stop=strings,
                stop_ids=ends,
                start=start,
                unguided_ids=()
                if unguided is None
                else _made(
                    tuple, "unguided", self.encode(unguided, begins=True) if isinstance(unguided, str) else unguided
                ),
                **fields,
            )
            requests += [dataclasses.replace(request, seed=firsts[i] + copy) for copy in range(copies)]
        for request in requests:
            request.check(self.config.vocab_size, self._capacity)
            if request.unguided_ids and self.options.num_slots < 2:
                raise ConfigError(
                    f"guidance = {request.guidance}: needs two slots; build the engine with num_slots >= 2"
                )
        return requests

    def _job(self, request: Request, index: int) -> Job:
        empty = self._scheduler.empty_row
        occurrences = initial_occurrences(request.sampling, request.ids, self._weights)
        start = request.start
        row = Row(*((empty.state, empty.logits) if start is None else (start.state, start.logits)), occurrences)
        readers = [Reader(tuple(map(int, request.ids)), row)]
        if request.unguided_ids:
            readers.append(Reader(tuple(map(int, request.unguided_ids)), row))
        stops = np.zeros(self.config.vocab_size, np.bool_)
        stops[list(request.stop_ids)] = True
        bias = bias_of(request.sampling, self._named)
        return Job(request, index, readers, bias, stops, TextStream(self.tokenizer, request.stop))

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs texts to their ends, no more of them waiting at a time than may wait."""
        jobs = [self._job(request, index) for index, request in enumerate(requests)]
        pending = list(jobs[::-1])
        chunks: list[list[Any]] = [[] for _ in jobs]
        streams: list[Stream] = []
        try:
            while pending or streams:
                with self._lock:
                    room = max(0, self.options.most_waiting - self._scheduler.num_waiting)
                    if pending and (room or not streams):
                        ready = [pending.pop() for _ in range(min(len(pending), max(room, 1)))]
                        self._scheduler.submit(ready, in_front=not room)
                        streams += [Stream([job], self._scheduler, self._lock, self._read_again) for job in ready]
                stream = streams[0]
                chunks_of_first = list(stream)
                if chunks_of_first:
                    chunks[chunks_of_first[0].index] += chunks_of_first
                streams.pop(0)
        finally:
            for stream in streams:
                stream.cancel()
        return [join(own, index, len(requests[index].ids)) for index, own in enumerate(chunks)]

    def _read_now(self, request: Request) -> Snapshot:
        job = self._job(request, 0)
        with self._lock:
            self._scheduler.submit([job], in_front=True)
        stream = Stream([job], self._scheduler, self._lock, self._read_again)
        for _ in stream:
            pass
        assert stream.snapshot is not None
        return stream.snapshot

    def _read_again(self, snapshot: Snapshot, ids: tuple[int, ...]) -> Snapshot:
        return self._read_now(Request(ids=ids, max_tokens=0, start=snapshot, keep=True))

    def _check_state(self, snapshot: Snapshot) -> None:
        if not isinstance(snapshot, Snapshot):
            raise ConfigError(f"start = {snapshot!r}: must be a Snapshot, such as Session.snapshot")
        like = self._scheduler.empty_row
        expected, found = (
            jax.tree.map(lambda x: (tuple(x.shape), np.dtype(x.dtype).name), (row.state, row.logits))
            for row in (like, snapshot)
        )
        is_ours = snapshot.owner in (None, self._scheduler.owner)
        if not is_ours or jax.tree.structure(snapshot.state) != jax.tree.structure(like.state) or expected != found:
            raise StateError(
                f"start: is a state of another model than this {self.config.architecture} of "
                f"{self.config.num_layers} x {self.config.width}; give one that an engine of this very model made"
            )


def _for_reading(model: ModelT) -> ModelT:
    """A model whose operator is the fastest where nothing is differentiated.

    On a CPU RWKV-7's recurrence, whose state stays in the cache, reads a prompt in 0.9 times the time that its chunks
    take (benchmarks/README.md); the other generations' chunks are as fast as their recurrences or faster.
    """
    config = model.config
    device = next(iter(jax.tree.leaves(nnx.state(model, nnx.Param))[0].devices()))
    if config.generation == "7" and config.wkv_implementation is None and device.platform == "cpu":
        return with_implementation(model, "scan")
    return model


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt: a text, or ids."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts = {prompts!r}: must be a text, token ids, or several of these")
    first = next(iter(prompts), None)
    return first is not None and not isinstance(first, str | Sequence | np.ndarray)


def _made(kind: type[Any], name: str, values: Any) -> Any:
    try:
        return kind(values)
    except TypeError as error:
        raise ConfigError(f"{name} = {values!r}: must be a sequence; {error}") from error


def _one_each(name: str, values: Any, kind: type, count: int) -> list[Any]:
    if isinstance(values, kind):
        return [values] * count
    values = _made(list, name, values)
    if len(values) != count:
        raise ConfigError(f"{name}: {len(values)} for {count} prompts; give one, or one for each prompt")
    return values
