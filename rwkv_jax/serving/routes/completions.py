"""/v1/completions: continuations of prompts."""

from __future__ import annotations

import dataclasses
import functools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import anyio.to_thread
from fastapi import APIRouter
from sse_starlette import EventSourceResponse

from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.chat.fim import FIM_STOP, fim_prompt
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.prompts import Arguments
from rwkv_jax.inference.engine.requests import Chunk, TopLogprobs
from rwkv_jax.inference.engine.requests import Completion as Text
from rwkv_jax.inference.engine.scoring import Score
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.serving.arrivals import has_arrived
from rwkv_jax.serving.grammars import grammar_of
from rwkv_jax.serving.logprobs import CompletionLogprobs
from rwkv_jax.serving.protocol.base import Usage
from rwkv_jax.serving.protocol.completions import Choice, Completion, CompletionBody, Logprobs
from rwkv_jax.serving.protocol.state_fields import KeptState
from rwkv_jax.serving.service import Service, ServiceOf, TenantOf
from rwkv_jax.serving.sse import event_stream
from rwkv_jax.serving.states.turns import Turn, open_turn
from rwkv_jax.serving.texts import Job, best, check_lengths, collect, opened, submit, usage_of

router = APIRouter(tags=["completions"])

_MAX_TOKENS = 16  # OpenAI's default


class Echo(NamedTuple):
    """A prompt in front of its continuations."""

    text: str
    ids: list[int]
    logprobs: list[float | None]
    """Of each of `ids`: None for the first. Empty if they are not asked for."""
    tops: list[TopLogprobs]


@router.post("/v1/completions", response_model=Completion)
async def complete(body: CompletionBody, service: ServiceOf, tenant: TenantOf) -> Completion | EventSourceResponse:
    """Continues one prompt or several."""
    adapter = service.check_model(body.model)
    with_usage = body.has_usage_chunk()
    turn = await open_turn(service, tenant, body, num_texts=body.num_texts(), adapter=adapter)
    with turn.closed_on_error():
        job = await anyio.to_thread.run_sync(as_job, body, service.engine, tenant, turn)
        check_lengths(service, job.prompts)  # before any of them is scored
        head = Completion(id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()), model=body.model, choices=[])
        answer = _Answer(body, service, job, turn, head)
        if not body.stream:
            return await answer.whole()
        echoes = await answer.echoes()
        stream = await submit(service, job)
    return event_stream(answer.pieces(stream, echoes, with_usage), omits=frozenset() if with_usage else {"usage"})


def as_job(body: CompletionBody, engine: Engine, tenant: str, turn: Turn | None = None) -> Job:
    """What the engine is asked, after a turn's state. Raises ConfigError for fields that do not go together."""
    prompts, stops = body.prompts(), body.stops()
    copies = body.best_of or body.n or 1
    if copies < (body.n or 1):
        raise ConfigError(f"best_of = {copies}: must be at least n = {body.n}")
    if body.stream and copies > (body.n or 1):
        raise ConfigError(f"best_of = {copies}: is known at the end only; leave stream out, or best_of")
    if body.suffix is not None:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError("suffix: needs a prompt of text, not of token ids")
        if body.echo:
            raise ConfigError("echo: shows prompts, of which a suffix makes another text; leave one of them out")
        prompts = [fim_prompt(str(prompt), body.suffix) for prompt in prompts]
        stops = [*stops, FIM_STOP]
    continues = turn is not None and turn.continues
    ids = [_encode(engine, prompt, continues) for prompt in prompts]
    asked = grammar_of(body)
    arguments: Arguments = {
        "max_tokens": _MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        "sampling": body.sampling(),
        "seed": body.seeds(len(ids) * copies),
        "stop": stops,
        "stop_ids": body.stop_ids(engine.tokenizer.ends),
        "top_logprobs": body.logprobs or 0,
        "client_id": tenant,
        "grammar": asked and asked.grammar,
    }
    if turn is not None:
        arguments.update(turn.arguments())
    if body.echo and body.logprobs is not None and "state" in arguments:
        raise ConfigError(
            "echo: logprobs of a prompt are those of a text that begins and may be cached; leave echo or logprobs out, "
            "or state, session, cache_prompt and no_store"
        )
    return Job([each for each in ids for _ in range(copies)], copies, arguments, asked and asked.field)


def _encode(engine: Engine, prompt: str | list[int], continues: bool) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    if prompt:
        return engine.encode(prompt, begins=not continues)
    return [] if continues else engine.beginning


@dataclasses.dataclass(frozen=True)
class _Answer:
    """Answers one request, whole or in pieces."""

    body: CompletionBody
    service: Service
    job: Job
    turn: Turn
    head: Completion
    """Without choices."""

    async def whole(self) -> Completion:
        """The answer to a request without `stream`."""
        echoes, count = await self.echoes(), self.body.n or 1
        with self.turn:
            stream = await submit(self.service, self.job)
            texts = await collect(self.service, stream)
            kept = await self.turn.keep(stream, self.job.prompts[0], texts[0])
        choices = []
        for prompt, group in enumerate(best(texts, self.job.copies, count)):
            choices += [await self._choice(prompt * count + i, text, echoes[prompt]) for i, text in enumerate(group)]
        usage = usage_of(stream, self.job.copies, sum(len(text.ids) for text in texts))
        return self._with(*choices, usage=usage, kept=kept)

    async def pieces(
        self, stream: Stream, echoes: Sequence[Echo | None], with_usage: bool
    ) -> AsyncIterator[Completion]:
        """The answer to a request with `stream`, in chunks."""
        makers = [self._maker() for _ in self.job.prompts]
        for index, maker in enumerate(makers):
            if (echo := echoes[index // self.job.copies]) is not None:
                yield self._with(Choice(index=index, text=echo.text, logprobs=self._of_echo(maker, echo)))
        generated: list[list[int]] = [[] for _ in makers]
        read: list[Chunk] = []
        async with opened(self.service, stream) as chunks:
            with self.turn:
                async for chunk in chunks:
                    maker, ids, reason = makers[chunk.index], generated[chunk.index], chunk.finish_reason
                    ids += chunk.ids
                    logprobs = self._of_tokens(maker, chunk)
                    if logprobs is not None and (end := await self._of_stop(maker, chunk.index, ids, chunk.stop)):
                        logprobs += end
                    kept = None
                    if self.turn.is_kept:
                        read.append(chunk)
                        if reason is not None:
                            kept = await self.turn.keep(stream, self.job.prompts[0], read)
                    if chunk.text or reason or (logprobs is not None and chunk.ids):
                        piece = Choice(index=chunk.index, text=chunk.text, logprobs=logprobs, finish_reason=reason)
                        yield self._with(piece, kept=kept)
        if with_usage:
            yield self._with(usage=usage_of(stream, self.job.copies, sum(map(len, generated))))

    async def echoes(self) -> list[Echo | None]:
        """For each prompt what is shown of it; None without `echo`."""
        prompts = self.job.prompts[:: self.job.copies]
        if not self.body.echo:
            return [None] * len(prompts)
        found: list[Echo | None] = []
        scores = iter(await self._score([ids[:1] for ids in prompts], [ids[1:] for ids in prompts]))
        for ids in prompts:
            logprobs: list[float | None] = [None]
            tops: list[TopLogprobs] = [()]
            if self.body.logprobs is not None and len(ids) > 1:
                score = next(scores)
                logprobs.extend(score.token_logprobs)
                tops.extend(score.top or [()] * len(score.ids))
            found.append(Echo(self.service.engine.tokenizer.decode(ids), ids, logprobs, tops))
        return found

    async def _score(self, contexts: list[list[int]], continuations: list[list[int]]) -> list[Score]:
        """Scores of those continuations that have tokens; none where no logprobs are asked for."""
        pairs = [pair for pair in zip(contexts, continuations, strict=True) if pair[1]]
        if self.body.logprobs is None or not pairs:
            return []
        own = self.job.arguments
        arguments = {
            "top_logprobs": self.body.logprobs,
            "client_id": own.get("client_id", ""),
            "adapter": own.get("adapter"),
        }
        has_arrived()  # what is scored does not wait for the text behind it
        score = functools.partial(self.service.engine.score, *map(list, zip(*pairs, strict=True)), **arguments)
        return await anyio.to_thread.run_sync(score, abandon_on_cancel=True)

    async def _of_stop(
        self, maker: CompletionLogprobs, index: int, ids: Sequence[int], stop: object
    ) -> Logprobs | None:
        """With `echo`, of the id that ended a text, so that all that was read has its logprob."""
        if not self.body.echo or not isinstance(stop, int):
            return None
        scores = await self._score([[*self.job.prompts[index], *ids]], [[stop]])
        return maker.piece([stop], scores[0].token_logprobs, scores[0].top) if scores else None

    async def _choice(self, index: int, text: Text, echo: Echo | None) -> Choice:
        maker = self._maker()
        before = None if echo is None else self._of_echo(maker, echo)
        logprobs = self._of_tokens(maker, text)
        if before is not None and logprobs is not None:
            end = await self._of_stop(maker, text.index, text.ids, text.stop)
            logprobs = before + logprobs if end is None else before + logprobs + end
        shown = text.text if echo is None else echo.text + text.text
        return Choice(index=index, text=shown, logprobs=logprobs, finish_reason=text.finish_reason)

    def _maker(self) -> CompletionLogprobs:
        return CompletionLogprobs(self.service.engine.tokenizer, self.body.logprobs or 0)

    def _of_echo(self, maker: CompletionLogprobs, echo: Echo) -> Logprobs | None:
        return None if self.body.logprobs is None else maker.piece(echo.ids, echo.logprobs, echo.tops)

    def _of_tokens(self, maker: CompletionLogprobs, of: Chunk | Text) -> Logprobs | None:
        return None if self.body.logprobs is None else maker.piece(of.ids, of.logprobs, of.top_logprobs)

    def _with(self, *choices: Choice, usage: Usage | None = None, kept: KeptState | None = None) -> Completion:
        return self.head.model_copy(update={"choices": list(choices), "usage": usage, "state": kept})
