"""The engine's thread, which alone runs the scheduler: everybody else leaves it messages and waits for its replies.

Messages go through `queue.SimpleQueue`, whose `put` takes no lock that another holder could keep. So a finalizer, which
Python may run in any thread at any time, can always leave a message; and the thread itself never waits for anybody.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple, TypeVar

import jax

from rwkv_jax.inference.engine.job import Job
from rwkv_jax.inference.engine.requests import QueueFullError
from rwkv_jax.inference.engine.scheduler import Scheduler

T = TypeVar("T")

Message = Callable[[], None]
"""What the thread is to do between two steps."""

_GATHER_SECONDS = 0.02
"""How long an idle engine waits for texts that are announced, at most."""


class EngineClosedError(RuntimeError):
    """The engine was closed; build another one."""


class Status(NamedTuple):
    """What the thread published after its last step."""

    room: int
    """Jobs that may still be queued."""
    num_received: int
    """Jobs received since the start."""


class EngineStats(NamedTuple):
    """What an engine is doing, and has done since its start."""

    num_slots: int
    """Texts that may run at once."""
    num_running: int
    """Texts with a slot."""
    num_queued: int
    """Texts that wait for one."""
    num_swapped_out: int
    """Texts that wait for their consumers without one."""
    prompt_tokens: int
    """Tokens of prompts and of texts to score that were read."""
    cached_tokens: int
    """Prompt tokens that the prefix cache spared."""
    prefix_hits: int
    """Prompts of which the cache had a prefix."""
    prefix_misses: int
    """Prompts of which it had none."""
    prefix_bytes: int
    """Bytes of the prefix cache."""
    generated_tokens: int
    """Tokens generated."""
    mask_seconds: float
    """Seconds in which masks of grammars were computed, mostly while the device read the tokens before them."""


class Announcement:
    """Says to an idle engine that texts are about to be sent, so that those that come together start together."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop
        loop.announced.add(self)

    def end(self) -> None:
        """They have been sent, or do not come."""
        if self in self._loop.announced:
            self._loop.announced.discard(self)
            self._loop.inbox.put(_nothing)


class Driver:
    """Handle of the thread. Thread-safe. The thread starts with the first job and ends when no handle is left."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Starts nothing yet; the thread computes with JAX's settings (64-bit types, precision) of here and now."""
        self.scheduler: Final = scheduler
        """Only for functions that are given to `call`."""
        self._loop: Final = _Loop(scheduler, _jax_settings())
        # Held only to change the following, never while waiting for the thread, which does not take it. Reentrant,
        # since a finalizer may come along.
        self._lock: Final = threading.RLock()
        self._thread: threading.Thread | None = None
        self._num_sent = 0
        self._is_closed = False
        # The thread holds no reference to this handle.
        weakref.finalize(self, self._loop.inbox.put, self._loop.close).atexit = False

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the thread itself, in which a finalizer must not wait for it."""
        return threading.current_thread() is self._thread

    @property
    def num_queued(self) -> int:
        """Jobs sent or queued, and without a slot yet."""
        return self.scheduler.num_queued + self._num_sent - self._loop.status.num_received

    @property
    def room(self) -> int:
        """Jobs that may still be sent, at least."""
        status = self._loop.status
        return max(0, status.room - (self._num_sent - status.num_received))

    def start(self) -> None:
        """Starts the thread; no effect if it runs.

        Raises:
          EngineClosedError: it was closed.
        """
        with self._lock:
            if self._is_closed or self._loop.has_ended:
                raise EngineClosedError("the engine is closed; build another one")
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop.run, name="rwkv-engine", daemon=True)
                self._thread.start()
                # A daemon that is still inside XLA when Python ends would crash it.
                atexit.register(close_at_exit := _AtExit(weakref.ref(self)))
                weakref.finalize(self, atexit.unregister, close_at_exit).atexit = False

    def close(self) -> None:
        """Ends all jobs with EngineClosedError, and the thread after its current step; waits for it."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.inbox.put(self._loop.close)
                if self._thread is None:
                    self._loop.run()
        if self._thread is not None and not self.is_own_thread:
            self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Sends jobs, all of them or none.

        Raises:
          QueueFullError: more than `max_queue` would wait.
          EngineClosedError: it was closed.
        """
        self.refuse_own_thread()
        if self.try_submit(jobs):
            return
        # Forgotten and cancelled texts may still be counted.
        self.call(self.scheduler.remove_abandoned)
        if not self.try_submit(jobs):
            scheduler = self.scheduler
            away = scheduler.num_swapped_out
            others = f" ({away} others are half collected)" if away else ""
            raise QueueFullError(
                f"queue: {self.num_queued} texts wait{others}, and {len(jobs)} more would pass max_queue = "
                f"{scheduler.max_queue}; collect some first, or build the engine with more"
            )

    def try_submit(self, jobs: Sequence[Job]) -> bool:
        """Sends jobs if there is room for all of them; whether there was."""
        with self._lock:
            self.start()
            if len(jobs) > self.room:
                return False
            self._num_sent += len(jobs)
            loop = self._loop
            loop.inbox.put(lambda: loop.receive(jobs))
            return True

    def wait_for_room(self) -> None:
        """Waits until a job may be sent.

        Raises:
          QueueFullError: all texts wait for their consumers.
        """
        self.refuse_own_thread()
        reply: SimpleQueue[bool] = SimpleQueue()
        loop = self._loop
        self._send(lambda: loop.waiting_for_room.append(reply))
        if not reply.get():
            raise QueueFullError(
                f"queue: max_queue = {self.scheduler.max_queue}, and as many texts are half collected; collect or "
                "cancel some first, or build the engine with more"
            )

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function in the thread, between two steps, and returns its result or raises its error."""
        self.refuse_own_thread()
        reply: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def run() -> None:
            try:
                reply.put((function(), None))
            except BaseException as error:
                reply.put((None, error))

        self._send(run)
        result, error = reply.get()
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]

    def stats(self) -> EngineStats:
        """Read without waiting, so that numbers of one step may stand beside those of the next."""
        scheduler = self.scheduler
        return EngineStats(
            num_slots=scheduler.slots.count,
            num_running=scheduler.num_running,
            num_queued=self.num_queued,
            num_swapped_out=scheduler.num_swapped_out,
            prefix_bytes=scheduler.prefix_bytes,
            mask_seconds=scheduler.mask_seconds,
            **scheduler.counts,
        )

    def call_unless_closed(self, function: Callable[[], None]) -> None:
        """As `call`; no effect once closed, when all jobs have ended."""
        with contextlib.suppress(EngineClosedError):
            self.call(function)

    def wait_for_step(self) -> None:
        """Waits for the end of the step that is under way."""
        self.call_unless_closed(_nothing)

    def wake(self) -> None:
        """Has the thread look for something to do. Does not wait; finalizers may call it."""
        self._loop.inbox.put(_nothing)

    def announce(self) -> Announcement:
        """Announces texts; does not wait."""
        return Announcement(self._loop)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """No step begins meanwhile, so that all jobs sent start together."""
        self.call(self._loop.hold)
        try:
            yield
        finally:
            self._loop.inbox.put(self._loop.release)

    def _send(self, message: Message) -> None:
        with self._lock:  # nothing follows the closing message
            self.start()
            self._loop.inbox.put(message)

    def refuse_own_thread(self) -> None:
        """Raises RuntimeError in the thread itself: there is nobody to wait for."""
        if self.is_own_thread:
            raise RuntimeError("the engine is in the midst of a step: a finalizer (`__del__`) cannot wait for it")


def _nothing() -> None:
    pass


class _AtExit:
    """Closes a driver that is left when Python ends."""

    def __init__(self, driver: weakref.ref[Driver]) -> None:
        self._driver = driver

    def __call__(self) -> None:
        if (driver := self._driver()) is not None:
            driver.close()


class _Loop:
    """What the thread runs: messages, a step, messages, a step. It waits for messages when there is nothing to do."""

    def __init__(self, scheduler: Scheduler, settings: Callable[[], contextlib.ExitStack]) -> None:
        self.scheduler, self._settings = scheduler, settings
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.waiting_for_room: list[SimpleQueue[bool]] = []
        self.announced: set[Announcement] = set()
        self._num_received, self._num_holders = 0, 0
        self._is_idle, self._is_closed, self.has_ended = True, False, False
        self.status = Status(scheduler.room, 0)

    def run(self) -> None:
        """Until it is closed, or fails in a way that nobody has foreseen: then, too, nobody is left waiting."""
        reason = EngineClosedError("the engine was closed before this text's end")
        try:
            with self._settings():
                while not self._is_closed:
                    self._read_messages()
                    if self._is_idle:
                        self._gather()
                    self._is_idle = self._is_closed or self._num_holders > 0 or not self.scheduler.step()
                    self.status = Status(self.scheduler.room, self._num_received)
                    self._answer_waiting()
        except BaseException as error:
            reason = EngineClosedError(f"the engine's thread has failed: {type(error).__name__}: {error}")
            raise
        finally:
            self.has_ended = self._is_closed = True
            self.scheduler.close(reason)
            while not self.inbox.empty():
                self.inbox.get()()
            self.scheduler.close(reason)
            self._answer_waiting()

    def _read_messages(self) -> None:
        """Handles all messages that are there; when idle, waits for one first."""
        message = self.inbox.get() if self._is_idle else None
        while True:
            if message is not None:
                message()
            try:
                message = self.inbox.get_nowait()
            except Empty:
                break
        self.status = Status(self.scheduler.room, self._num_received)

    def _gather(self) -> None:
        """Waits for announced texts before an idle device begins, until a prefill call is full."""
        end = time.monotonic() + _GATHER_SECONDS
        while self.announced and not self.scheduler.has_batch and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(Empty):
                self.inbox.get(timeout=left)()

    def _answer_waiting(self) -> None:
        is_stuck = self._is_closed or (self._is_idle and not self._num_holders)
        if self.status.room or is_stuck:
            for reply in self.waiting_for_room:
                reply.put(self.status.room > 0)
            self.waiting_for_room.clear()

    # Messages.

    def close(self) -> None:
        self._is_closed = True

    def receive(self, jobs: Sequence[Job]) -> None:
        self.scheduler.queue(jobs)
        self._num_received += len(jobs)

    def hold(self) -> None:
        self._num_holders += 1

    def release(self) -> None:
        self._num_holders -= 1


def _jax_settings() -> Callable[[], contextlib.ExitStack]:
    """A context with this thread's settings, which others do not inherit where a `with` block has set them."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")
    x64, precision, promotion = (getattr(jax.config, name) for name in names)

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(jax.enable_x64(x64))
        stack.enter_context(jax.default_matmul_precision(precision))
        stack.enter_context(jax.numpy_dtype_promotion(promotion))
        return stack

    return enter
