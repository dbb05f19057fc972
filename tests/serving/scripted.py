"""A server with the chat page whose answers are scripted by the questions, and a thread that runs an app."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from rwkv_jax.serving.routes import page

HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

<svg onload="window.hacked = 3"><style>body { display: none }</style>
# <b onclick="window.hacked = 4">heading</b>
- <iframe srcdoc="<script>parent.hacked = 5</script>"></iframe>
- [link](javascript:window.hacked=6) ![image](http://127.0.0.1:1/pixel.png)
> <a href="javascript:window.hacked=7">quote</a>

```html"><script>window.hacked = 8</script>
</code></pre><script>window.hacked = 9</script>
```
**<u>bold</u>** `</code><script>window.hacked = 10</script>` *<meta http-equiv=refresh content=0>*
"""
MARKDOWN = """# Squares

The **sum** of `n` odd numbers is *square*:

1. add the first
2. add the next
   - and so on
   - to the last

> It was known to Nicomachus.

```python
def squares(n):
    return [sum(range(1, 2 * k, 2)) for k in range(n)]
```

A line,
and another.
"""
SQUARES = """The first `n` odd numbers add up to **a square**:

- 1 + 3 = 4
- 1 + 3 + 5 = 9

```python
sum(range(1, 2 * n, 2)) == n**2
```
"""
THOUGHTS = "The user wants an example. Odd numbers add up to squares, as 1 + 3 + 5 = 9 shows."
NESTED = "- " * 3000 + "deep\n" + "> " * 3000 + "deep\n" + "*" * 3000 + "`" * 3000


def create_scripted_app() -> FastAPI:
    """The page, and endpoints that answer at once. `app.state.requests` and `.states` tell what was asked and kept."""
    app = FastAPI()
    app.include_router(page.router)
    app.state.requests, app.state.states, app.state.key, app.state.pause = [], {}, None, 0.0
    app.state.has_states = True
    numbers = itertools.count()

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if app.state.key and request.headers.get("Authorization") != f"Bearer {app.state.key}":
            return failure(401, "the API key is missing or unknown")
        return JSONResponse({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        app.state.requests.append(body)
        if "return_state" in body and not app.state.has_states:
            return failure(400, "return_state: is not supported by this server", param="return_state")
        if "state" in body and body["state"] not in app.state.states:
            return failure(404, f"state {body['state']!r} is unknown", param="state")
        question = body["messages"][-1]["content"]
        if question == "busy":
            return failure(429, "the queue is full", headers={"Retry-After": "7"})
        return StreamingResponse(events(app, body, question, next(numbers)), media_type="text/event-stream")

    @app.api_route("/v1/states/{name}", methods=["GET", "PUT", "DELETE"])
    async def states(name: str, request: Request) -> Response:
        if request.method == "PUT":
            app.state.states[name] = await request.body()
        elif name not in app.state.states:
            return failure(404, f"state {name!r} is unknown", param="state")
        elif request.method == "DELETE":
            del app.state.states[name]
        else:
            return Response(app.state.states[name], media_type="application/octet-stream")
        return JSONResponse({"id": name})

    return app


def failure(status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "param": param}}, status, headers)


async def events(app: FastAPI, body: dict[str, Any], question: str, number: int) -> AsyncIterator[str]:
    """A stream in the form of the real server's."""
    thoughts, text, pause = "", f"You said {question}.", app.state.pause
    match question:
        case "hostile":
            text = HOSTILE
        case "nested":
            text = NESTED
        case "markdown":
            thoughts, text = THOUGHTS, MARKDOWN
        case "How do odd numbers add up?":
            thoughts, text = THOUGHTS, SQUARES
        case "And without the code?":
            text = "The first n odd numbers add up to n times n: each next one frames a square in a greater square."
        case "slow":
            text, pause = "one two three four five six seven eight nine ten " * 100, 0.02
    yield event({"role": "assistant", "content": ""})
    has_tokens = bool(body.get("logprobs"))
    for piece in pieces(thoughts):
        yield event({"reasoning_content": piece}, tokens=[piece.encode()] * has_tokens)
    if thoughts and has_tokens:
        yield event({}, tokens=[b"</thi", b"nk>\n"])
    for i, piece in enumerate(pieces(text)):
        if question == "broken" and i == 2:
            yield f"data: {json.dumps({'error': {'message': 'the model made numbers that are not finite'}})}\n\n"
            return
        half = 0 if piece.isascii() else len(piece.encode()) // 2  # in the midst of a character, perhaps
        tokens = [token for token in (piece.encode()[:half], piece.encode()[half:]) if token]
        yield event({"content": piece}, tokens=tokens * has_tokens)
        await asyncio.sleep(pause)
    if question == "cut":
        return
    name = f"state-{number}"
    app.state.states[name] = f"after {question}".encode()
    yield event({}, finish="stop", state=name if "return_state" in body else None)
    usage = {"prompt_tokens": 1, "completion_tokens": len(pieces(text)), "total_tokens": 1 + len(pieces(text))}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def pieces(text: str) -> list[str]:
    return re.findall(r"\s*\S{1,7}|\s+$", text)


def event(
    delta: dict[str, str], *, tokens: Sequence[bytes] = (), finish: str | None = None, state: str | None = None
) -> str:
    choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    if tokens:
        choice["logprobs"] = {"content": [token_logprobs(token) for token in tokens]}
    chunk: dict[str, Any] = {"object": "chat.completion.chunk", "choices": [choice]}
    if state is not None:
        chunk["state"] = {"id": state, "num_tokens": 1}
    return f"data: {json.dumps(chunk)}\n\n"


def token_logprobs(content: bytes) -> dict[str, Any]:
    own = {"token": content.decode(errors="replace"), "logprob": -(content[-1] % 8) / 2, "bytes": list(content)}
    return own | {"top_logprobs": [own, {"token": "other", "logprob": -1.5, "bytes": list(b"other")}]}


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Serves an app on a free port of this machine; gives its address."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
