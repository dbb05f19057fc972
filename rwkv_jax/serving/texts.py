"""From a request to the engine and back: what it is asked, what it generates while the client listens, and the cost."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import anyio
import anyio.to_thread

from rwkv_jax.inference.engine.prompts import Arguments
from rwkv_jax.inference.engine.requests import Chunk, Completion, join
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.inference.sampling.grammar import GrammarError
from rwkv_jax.serving.arrivals import has_arrived
from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.protocol.base import PromptTokensDetails, Usage
from rwkv_jax.serving.service import Service
from rwkv_jax.serving.token_counts import count_tokens


@dataclasses.dataclass(frozen=True)
class Job:
    """What a request asks of the engine."""

    prompts: list[list[int]]
    """Token ids, a prompt's copies next to each other."""
    copies: int
    """Texts of each prompt."""
    arguments: Arguments
    """As in `Engine.stream`."""
    grammar_field: str | None = None
    """The field of the request from which the grammar is."""


def check_lengths(service: Service, prompts: Sequence[Sequence[int]]) -> None:
    """Raises APIError for a prompt that is longer than the server allows."""
    longest, limit = max(map(len, prompts)), service.options.max_prompt_tokens
    if limit is not None and longest > limit:
        message = f"a prompt of {longest} tokens is longer than this server allows (max_prompt_tokens = {limit})"
        raise APIError(400, message, code="context_length_exceeded")


async def submit(service: Service, job: Job) -> Stream:
    """Asks the engine. Raises as `Engine.stream`: whatever is wrong with a request is known before it is answered.

    Raises:
      APIError: as `check_lengths`, or there is something wrong with a grammar.
    """
    check_lengths(service, job.prompts)
    count_tokens("prompt_tokens", sum(map(len, job.prompts[:: job.copies])))
    try:
        return await anyio.to_thread.run_sync(lambda: service.engine.stream(job.prompts, **job.arguments))
    except GrammarError as error:
        raise APIError(400, str(error), param=job.grammar_field, code="invalid_grammar") from error
    finally:
        has_arrived()


@contextlib.asynccontextmanager
async def opened(service: Service, stream: Stream) -> AsyncGenerator[AsyncIterator[Chunk]]:
    """A stream's chunks, timed; its texts end with the block, also where the task is cancelled."""
    try:
        async with contextlib.aclosing(service.metrics.timed(stream)) as chunks:
            yield chunks
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(stream.cancel)


async def collect(service: Service, stream: Stream) -> list[Completion]:
    """All texts of a stream, in the order of their prompts."""
    found: list[list[Chunk]] = [[] for _ in stream.num_prompt_tokens]
    async with opened(service, stream) as chunks:
        async for chunk in chunks:
            found[chunk.index].append(chunk)
    counts = stream.num_prompt_tokens
    return [join(own, index, counts[index]) for index, own in enumerate(found)]


def usage_of(stream: Stream, copies: int, num_generated: int) -> Usage:
    """What a stream has cost, once it has ended.

    Args:
      copies: texts of each prompt, which counts once.
    """
    read, cached = (sum(counts[::copies]) for counts in (stream.num_prompt_tokens, stream.num_cached_tokens))
    return Usage(
        prompt_tokens=read,
        completion_tokens=num_generated,
        total_tokens=read + num_generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def best(completions: Sequence[Completion], copies: int, count: int) -> list[list[Completion]]:
    """Of each prompt's copies the `count` with the greatest score, best first; in their order if those are all."""
    groups = [list(completions[i : i + copies]) for i in range(0, len(completions), copies)]
    if count == copies:
        return groups
    return [sorted(group, key=lambda completion: completion.score, reverse=True)[:count] for group in groups]
