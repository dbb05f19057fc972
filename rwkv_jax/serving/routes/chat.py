"""/v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import dataclasses
import functools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio.to_thread
from fastapi import APIRouter
from sse_starlette import EventSourceResponse

from rwkv_jax.chat.replies import ReplyParser
from rwkv_jax.chat.template import Thinking
from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.engine.prompts import Arguments
from rwkv_jax.inference.engine.requests import Chunk
from rwkv_jax.inference.engine.requests import Completion as Text
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.serving.grammars import Asked, call_grammar, grammar_of
from rwkv_jax.serving.logprobs import chat_logprobs
from rwkv_jax.serving.protocol.base import Usage
from rwkv_jax.serving.protocol.chat import (
    ChatBody,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    Choice,
    ChunkChoice,
    Delta,
    Effort,
    NamedTool,
)
from rwkv_jax.serving.protocol.state_fields import KeptState
from rwkv_jax.serving.replies import ReplyStream, finish_reason_of, message_of
from rwkv_jax.serving.service import Service, ServiceOf, TenantOf
from rwkv_jax.serving.sse import event_stream
from rwkv_jax.serving.states.turns import Turn, closing, open_turn
from rwkv_jax.serving.texts import Job, collect, opened, submit, usage_of

router = APIRouter(tags=["chat"])

_MAX_TOKENS = 2048  # as `rwkv chat`
_THINKING: dict[Effort, Thinking] = {
    "none": "empty",
    "minimal": "empty",
    "low": "think a bit",
    "medium": "think",
    "high": "think a lot",
}


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat(body: ChatBody, service: ServiceOf, tenant: TenantOf) -> ChatCompletion | EventSourceResponse:
    """Replies to a conversation."""
    with_usage = body.has_usage_chunk()
    answer = await prepare(body, service, tenant)
    with answer.turn.closed_on_error():
        if not body.stream:
            return await answer.whole()
        stream = await submit(service, answer.job)
    return event_stream(answer.pieces(stream, with_usage), omits=frozenset() if with_usage else {"usage"})


async def prepare(body: ChatBody, service: Service, tenant: str, *, keep_as: str | None = None) -> ChatAnswer:
    """Checks a request and finds what the engine is asked, and after which state; `keep_as` as in `open_turn`."""
    adapter = service.check_model(body.model)
    turn = await open_turn(service, tenant, body, num_texts=body.n or 1, keep_as=keep_as, adapter=adapter)
    with turn.closed_on_error():
        prompt = render(body, service, turn)
        job = await anyio.to_thread.run_sync(as_job, body, prompt, service, tenant, turn)
    return ChatAnswer(body, service, job, turn, prompt, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))


def render(body: ChatBody, service: Service, turn: Turn | None = None) -> str:
    """The messages as a prompt after a turn's state. Raises ConfigError for what the model's template cannot write."""
    tools, choice = _tools(body)
    write = service.template.render if turn is None else functools.partial(turn.render, service.template)
    return write(
        [message.model_dump(exclude_none=True) for message in body.messages],
        tools=tools,
        tool_choice="required" if choice == "required" else "auto",
        thinking=_thinking(body) or ("none" if grammar_of(body, body.response_format) else None),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )


def as_job(body: ChatBody, prompt: str, service: Service, tenant: str, turn: Turn | None = None) -> Job:
    """What the engine is asked. Raises ConfigError for fields that do not go together."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ConfigError("max_tokens: is the older name of max_completion_tokens; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        raise ConfigError("top_logprobs: needs logprobs = true; set it, or leave this out")
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    copies, engine, asked = body.n or 1, service.engine, _grammar(body, prompt)
    begins = turn is None or not turn.continues
    arguments: Arguments = {
        "max_tokens": _MAX_TOKENS if limit is None else limit,
        "sampling": body.sampling(),
        "seed": body.seeds(copies),
        "stop": [*service.template.stop_strings, *body.stops()],
        "stop_ids": body.stop_ids(engine.tokenizer.ends),
        "top_logprobs": body.top_logprobs or 0,
        "client_id": tenant,
        "grammar": asked and asked.grammar,
    }
    if turn is not None:
        arguments.update(turn.arguments())
    return Job([engine.encode(prompt, begins=begins)] * copies, copies, arguments, asked and asked.field)


def _grammar(body: ChatBody, prompt: str) -> Asked | None:
    """The grammar of a reply: of a call if there must be one, or of the form that is asked for."""
    tools, choice = _tools(body)
    asked = grammar_of(body, body.response_format)
    if asked is None:
        return call_grammar(tools) if tools and choice == "required" and prompt.endswith("```json") else None
    if tools:
        raise ConfigError(
            f"{asked.field}: is the form of an answer, not of calls; leave it out, or set tool_choice none"
        )
    if prompt.endswith(("<think", "</think")):
        raise ConfigError(f"{asked.field}: is the form of a whole reply; leave thinking out")
    return asked


def _tools(body: ChatBody) -> tuple[list[dict[str, Any]] | None, str]:
    """The tools that the model is shown, and whether it must call one."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice = body.tool_choice or "auto"
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if not tools:
            raise ConfigError(f"tool_choice: names {choice.function.name!r}, which is none of the tools")
        return tools, "required"
    if choice == "required" and not tools:
        raise ConfigError("tool_choice = 'required': there are no tools; give some")
    return (None if choice == "none" else tools or None), choice


def _thinking(body: ChatBody) -> Thinking | None:
    """The way of thinking that a request asks for; None if it leaves that to the template."""
    asked: list[Thinking] = []
    if body.reasoning_effort is not None:
        asked.append(_THINKING[body.reasoning_effort])
    if (variables := body.chat_template_kwargs) is not None:
        if variables.thinking is not None:
            asked.append(variables.thinking)
        if variables.enable_thinking is not None:
            asked.append("open" if variables.enable_thinking else "empty")
    if len(asked) > 1:
        raise ConfigError("reasoning_effort: and chat_template_kwargs ask for thinking; give one of them")
    return asked[0] if asked else None


@dataclasses.dataclass(frozen=True)
class ChatAnswer:
    """Answers one request, whole or in pieces."""

    body: ChatBody
    service: Service
    job: Job
    turn: Turn
    prompt: str
    id: str
    created: int

    async def whole(self) -> ChatCompletion:
        """The answer to a request without `stream`."""
        with self.turn:
            stream = await submit(self.service, self.job)
            texts = await collect(self.service, stream)
            kept = await self._keep(stream, texts[0])
        choices = []
        for index, text in enumerate(texts):
            message = message_of(text.text, self._parser())
            reason = finish_reason_of(text.finish_reason, bool(message.tool_calls))
            choices.append(Choice(index=index, message=message, logprobs=self._logprobs(text), finish_reason=reason))
        usage = usage_of(stream, self.job.copies, sum(len(text.ids) for text in texts))
        model = self.body.model
        return ChatCompletion(id=self.id, created=self.created, model=model, choices=choices, usage=usage, state=kept)

    async def pieces(self, stream: Stream, with_usage: bool) -> AsyncIterator[ChatChunk]:
        """The answer to a request with `stream`, in chunks."""
        replies = [ReplyStream(self._parser()) for _ in range(self.job.copies)]
        num_generated, read = 0, []
        async with opened(self.service, stream) as chunks:
            with self.turn:
                for index in range(self.job.copies):
                    yield self._chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
                async for chunk in chunks:
                    num_generated += len(chunk.ids)
                    kept = None
                    if self.turn.is_kept:
                        read.append(chunk)
                        if chunk.finish_reason is not None:
                            kept = await self._keep(stream, read)
                    for choice in self._choices(chunk, replies[chunk.index]):
                        yield self._chunk(choice, kept=kept if choice.finish_reason else None)
        if with_usage:
            yield self._chunk(usage=usage_of(stream, self.job.copies, num_generated))

    async def _keep(self, stream: Stream, reply: Text | Sequence[Chunk]) -> KeptState | None:
        if not self.turn.is_kept:
            return None
        end = closing(self.service.template)
        return await self.turn.keep(stream, self.job.prompts[0], reply, closing=end)

    def _choices(self, chunk: Chunk, reply: ReplyStream) -> list[ChunkChoice]:
        """What is sent for one step of a text: its deltas, of which the first has the logprobs, and its end."""
        deltas = list(reply.push(chunk.text, is_last=chunk.finish_reason is not None))
        logprobs = self._logprobs(chunk) if chunk.ids else None
        if not deltas and logprobs is not None:
            deltas = [Delta()]
        choices = [
            ChunkChoice(index=chunk.index, delta=delta, logprobs=None if i else logprobs)
            for i, delta in enumerate(deltas)
        ]
        if chunk.finish_reason is not None:
            reason = finish_reason_of(chunk.finish_reason, reply.num_calls > 0)
            choices.append(ChunkChoice(index=chunk.index, delta=Delta(), finish_reason=reason))
        return choices

    def _parser(self) -> ReplyParser:
        tools, _ = _tools(self.body)
        return self.service.template.reply_parser(self.prompt, calls=tools is not None)

    def _logprobs(self, of: Chunk | Text) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.service.engine.tokenizer, of.ids, of.logprobs, of.top_logprobs)

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None, kept: KeptState | None = None) -> ChatChunk:
        model = self.body.model
        return ChatChunk(id=self.id, created=self.created, model=model, choices=list(choices), usage=usage, state=kept)
