"""Engines of tiny random models, and what the model itself says when it reads a whole text at once."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.engine import assembly
from rwkv_jax.inference.engine.admission import Admission
from rwkv_jax.inference.engine.assembly import make_scheduler
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.engine.job import Job
from rwkv_jax.inference.engine.news import News
from rwkv_jax.inference.engine.programs import Programs
from rwkv_jax.inference.engine.requests import Chunk, Completion
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.prefix_cache import PrefixCache
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import unstacked
from tests.golden import AS_USERS, QUICK, relative_error
from tests.models.parameters import in_dtype, merge, random_params
from tests.programs import compiled_quickly

VOCAB_SIZE = 256
GREEDY = SamplingParams.greedy()
IDS = (1, 40, 41, 42, 43)
LONG_IDS = tuple(range(1, 61))
OPTIONS: dict[str, Any] = {"num_slots": 4, "prefill_length": 16, "short_prefill_length": 4, "burst_length": 4}

_SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "num_layers": 2, "width": 16, "head_dim": 8, "ffn_width": 32}
CONFIGS: dict[str, ModelConfig] = {
    "4": ModelConfig("4", **_SIZES),
    "5.0": ModelConfig("5.0", **_SIZES),
    "5.2": ModelConfig("5.2", **_SIZES),
    "6": ModelConfig("6", mix_rank=4, decay_rank=4, **_SIZES),
    "7": ModelConfig("7", decay_rank=4, iclr_rank=4, value_rank=4, gate_rank=4, **_SIZES),
    "7-rosa": ModelConfig("7-rosa", decay_rank=4, iclr_rank=4, value_rank=4, gate_rank=4, rosa_window=24, **_SIZES),
    "8-rosa": ModelConfig("8-rosa", rosa_window=24, **_SIZES),
    "8-rc00": ModelConfig("8-rc00", decay_rank=4, iclr_rank=4, value_rank=4, gate_rank=4, **_SIZES),
    "7a": ModelConfig("7a", decay_rank=4, iclr_rank=4, value_rank=4, gate_rank=4, deep_embed_rank=3, **_SIZES),
    "7b": ModelConfig(
        "7b",
        decay_rank=4,
        iclr_rank=4,
        value_rank=4,
        gate_rank=4,
        deep_embed_rank=3,
        dea_width=16,
        dea_rank=4,
        context_length=640,
        **_SIZES,
    ),
    "transformer": ModelConfig(architecture="transformer", context_length=640, **_SIZES),
    "llama": ModelConfig(
        architecture="llama", context_length=640, attention_heads=4, kv_heads=2, tied_head=True, qk_norm=True, **_SIZES
    ),
    "hybrid": ModelConfig(
        architecture="transformer",
        context_length=640,
        rwkv_layers=(1,),
        decay_rank=4,
        iclr_rank=4,
        value_rank=4,
        gate_rank=4,
        **_SIZES,
    ),
}
"""By generation."""


@functools.cache
def random_model(config: ModelConfig) -> LanguageModel:
    """A model all of whose parts matter."""
    return merge(config, jax.tree.map(jnp.asarray, in_dtype(random_params(config), config)))


_programs: dict[Any, tuple[LanguageModel, Programs]] = {}
"""By model and shapes, with the model, so that no other one gets its id."""


@contextlib.contextmanager
def shared_programs(model: LanguageModel, *, fresh: bool = False) -> Iterator[None]:
    """What is built of a model meanwhile compiles in a third of the time that users' programs take, and once."""

    def shared(used: LanguageModel, num_slots: int, burst_length: int, weights: Any, *others: Any) -> Programs:
        if fresh:
            return Programs(used, num_slots, burst_length, weights, *others)
        key = (id(model), nnx.graphdef(used), num_slots, burst_length, *others)
        if key not in _programs:
            _programs[key] = (model, Programs(used, num_slots, burst_length, weights, *others))
        return _programs[key][1]

    with compiled_quickly(), mock.patch.object(assembly, "Programs", shared):
        yield


def quick_engine(model: LanguageModel, mesh: Mesh | None = None, *, fresh: bool = False, **options: Any) -> Engine:
    """An engine that shares the programs of others of the same model and shapes, unless it is to be `fresh`."""
    with shared_programs(model, fresh=fresh):
        return Engine(model, ByteTokenizer(VOCAB_SIZE), EngineOptions(**(OPTIONS | options)), mesh=mesh)


class Stepped:
    """A scheduler whose steps a test takes itself."""

    def __init__(self, model: LanguageModel, **options: Any) -> None:
        chosen = EngineOptions(**(OPTIONS | options))
        self.admission = Admission(model.config, ByteTokenizer(VOCAB_SIZE), chosen.num_slots)
        self.prefix_cache = PrefixCache(chosen.prefix_bytes) if chosen.prefix_bytes else None
        with shared_programs(model):
            self.scheduler = make_scheduler(unstacked(model), self.admission.weights, chosen, self.prefix_cache)

    def queue(self, prompt: Any, **arguments: Any) -> Job:
        """A queued text, by the arguments of `Engine.stream`."""
        slots = self.scheduler.slots
        requests = self.admission.requests(prompt, 1, arguments, owner=slots.owner, empty_row=slots.empty_row)
        (job,) = self.admission.jobs(requests, News())
        self.scheduler.queue([job])
        return job

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.step()

    def finish(self, *jobs: Job) -> None:
        """Steps until these texts have ended."""
        while not all(job.is_done for job in jobs):
            assert self.scheduler.step()


def texts_in(engine: Engine) -> tuple[int, int, int]:
    """Texts with a slot, in the queue, and swapped out."""
    found = engine.stats()
    return found.num_running, found.num_queued, found.num_swapped_out


def assert_free(engine: Engine) -> None:
    """Fails if a text is in a slot or in the queue; those that were left a moment ago have a moment to go."""
    deadline = time.monotonic() + 10
    while (left := texts_in(engine)) != (0, 0, 0) and time.monotonic() < deadline:
        engine.generate("x", max_tokens=1)
    assert left == (0, 0, 0)


@functools.cache
def _whole(config: ModelConfig, quick: bool) -> Any:
    def run(params: Any, tokens: Any) -> Any:
        return merge(config, params)(tokens)[0][0]

    return jax.jit(run, compiler_options=QUICK if quick else AS_USERS)


def whole_logits(config: ModelConfig, ids: Sequence[int], *, room: int = 64, quick: bool = True) -> NDArray[Any]:
    """Logits [T, V] after each of T tokens, by one parallel forward pass of the stacked model without a state.

    Args:
      room: the pass has so many tokens, of which those behind the text are nobody's past.
    """
    tokens = np.zeros((1, room), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_whole(config, quick)(in_dtype(random_params(config), config), tokens))[: len(ids)]


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """float64, of the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def arrays(snapshot: Snapshot) -> list[NDArray[Any]]:
    """The state and the logits."""
    return [np.asarray(x) for x in jax.tree.leaves((snapshot.state, snapshot.logits))]


def assert_same(found: Snapshot | None, expected: Snapshot | None, bound: float = 1e-4) -> None:
    """Fails where two states are further apart than rounding explains; at the next token they are by far."""
    assert found is not None
    assert expected is not None
    assert found.num_tokens == expected.num_tokens
    errors = [relative_error(x, y) for x, y in zip(arrays(found), arrays(expected), strict=True)]
    assert max(errors) < bound


def texts_of(chunks: Sequence[Chunk]) -> tuple[str, tuple[int, ...]]:
    """Text and ids of chunks of one text."""
    return "".join(chunk.text for chunk in chunks), tuple(token for chunk in chunks for token in chunk.ids)


def what_was_read(said: Sequence[Chunk] | Completion) -> tuple[int, ...]:
    """Ids written, with the stop id."""
    stop = said.stop if isinstance(said, Completion) else said[-1].stop if said else None
    ids = said.ids if isinstance(said, Completion) else texts_of(said)[1]
    return (*ids, stop) if isinstance(stop, int) else ids


def some(stream: Stream, count: int) -> list[Chunk]:
    """The next chunks, at most so many."""
    return [chunk for _, chunk in zip(range(count), stream, strict=False)]


def prompts(seed: int, count: int, longest: int = 40) -> Iterator[tuple[int, ...]]:
    """Random prompts of random lengths."""
    draws = np.random.default_rng(seed)
    for _ in range(count):
        yield tuple(draws.integers(1, VOCAB_SIZE, draws.integers(1, longest + 1)).tolist())
