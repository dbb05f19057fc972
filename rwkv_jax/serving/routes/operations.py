"""For operators: /health, /metrics; for clients: /tokenize, /detokenize, /apply-template."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter, Response

from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.metrics import CONTENT_TYPE
from rwkv_jax.serving.protocol.operations import (
    DetokenizeRequest,
    Health,
    TemplateBody,
    Text,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
)
from rwkv_jax.serving.routes.chat import render
from rwkv_jax.serving.service import ServiceOf

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(service: ServiceOf, response: Response) -> Health:
    """Whether requests are welcome: 200; 503 until all programs are compiled and while the server shuts down."""
    if service.running.is_draining:
        response.status_code = 503
        return Health(status="shutting down")
    if not service.is_warm:
        response.status_code = 503
        return Health(status="warming up")
    return Health(status="ok")


@router.get("/metrics")
async def metrics(service: ServiceOf) -> Response:
    """Numbers for Prometheus."""
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.post("/tokenize")
async def tokenize(request: TokenizeRequest, service: ServiceOf) -> Tokens:
    """Token ids of a text."""
    if request.model is not None:
        service.check_model(request.model)
    begins, tokenizer = request.add_special_tokens, service.engine.tokenizer
    if request.prompt:
        ids = await to_thread.run_sync(lambda: service.engine.encode(request.prompt, begins=begins))
    else:
        ids = service.engine.beginning if begins else []
    texts = [tokenizer.decode([token]) for token in ids] if request.return_token_strs else None
    limit = service.options.max_prompt_tokens
    return Tokens(count=len(ids), max_model_len=limit, tokens=ids, token_strs=texts)


@router.get("/tokenizer_info")
async def tokenizer_info(service: ServiceOf) -> TokenizerInfo:
    """The tokenizer."""
    tokenizer = service.engine.tokenizer
    name, end_of_text = type(tokenizer).__name__, tokenizer.end_of_text
    return TokenizerInfo(tokenizer_class=name, vocab_size=tokenizer.vocab_size, eos_token_id=end_of_text)


@router.post("/detokenize")
async def detokenize(request: DetokenizeRequest, service: ServiceOf) -> Text:
    """Text of token ids."""
    if request.model is not None:
        service.check_model(request.model)
    try:
        return Text(prompt=await to_thread.run_sync(service.engine.tokenizer.decode, request.tokens))
    except IndexError as error:
        raise APIError(400, f"tokens: {error.args[0]}", param="tokens") from error


@router.post("/apply-template")
async def apply_template(body: TemplateBody, service: ServiceOf) -> Text:
    """The prompt that a conversation becomes."""
    if body.model is not None:
        service.check_model(body.model)
    return Text(prompt=render(body, service))
