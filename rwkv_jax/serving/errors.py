"""Errors as OpenAI's API has them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.engine.driver import EngineClosedError
from rwkv_jax.inference.engine.requests import NotFiniteError, QueueFullError
from rwkv_jax.inference.state.snapshot import StateError
from rwkv_jax.serving.states.store import ConflictError, StoreError, TooLargeError, UnavailableError

_LOG = logging.getLogger(__name__)
_MAX_PARAM_LENGTH = 200  # a name that is not ours may be of any length
_STORE_RETRY_SECONDS = 5  # a Redis that starts again
_RETRY_SECONDS = 1  # a queue of texts moves within seconds


class APIError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """With an HTTP status from 400 on.

        Args:
          kind: the `type` in the answer.
          param: the field of the request that is wrong.
          code: for programs, such as model_not_found.
        """
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The answer, as JSON; also an event of a stream that has begun."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> APIError:
    """The answer to any error; those that are not the client's are told without their insides, which are logged."""
    match error:
        case APIError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return APIError(error.status_code, str(error.detail), headers=error.headers)
        case StateError():
            return APIError(409, str(error), param="state", code="state_mismatch")
        case ConfigError():
            return APIError(400, str(error), param=_param(str(error)))
        case QueueFullError():
            headers = {"Retry-After": str(_RETRY_SECONDS)}
            return APIError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
        case EngineClosedError():
            return APIError(503, "the server is shutting down", kind="server_error", code="shutting_down")
        case NotFiniteError():
            return APIError(500, str(error), kind="server_error", code="not_finite")
        case ConflictError():
            return APIError(409, str(error), param="session", code="state_conflict")
        case TooLargeError():
            return APIError(413, str(error), param="state", code="state_too_large")
        case UnavailableError():
            headers = {"Retry-After": str(_STORE_RETRY_SECONDS)}
            return APIError(503, str(error), kind="server_error", code="state_store_unavailable", headers=headers)
    _LOG.error("a request failed", exc_info=error)
    return APIError(500, "the server made a mistake; its log says which", kind="server_error")


def _invalid(error: RequestValidationError) -> APIError:
    """The first of the errors of a body, named by its field: `messages.0.content`."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(path)[:_MAX_PARAM_LENGTH] or None
    if first["type"] == "extra_forbidden":
        message = f"{param}: is not supported by this server; leave it out (docs/serving.md lists the fields)"
        return APIError(400, message, param=param, code="unsupported_parameter")
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    return APIError(400, f"{param or 'body'}: {first['msg']}", param=param)


_FIELD = re.compile(r"(?P<name>[a-z_]+(\[\d+\]|\.\w+)*)( \d+)?(:| = | of id | names id | string \d)")
_RENAMED = {"stop_ids": "stop_token_ids"}  # of the engine's arguments, for the request's fields


def _param(message: str) -> str | None:
    """The field that a ConfigError starts with: `top_p` of `top_p = 2.0: must be ...`."""
    field = _FIELD.match(message)
    return None if field is None else _RENAMED.get(field["name"], field["name"])


class ErrorResponse(Response):
    """The response that tells an error. In ASCII, for what a message quotes of a request may be no valid Unicode."""

    media_type = "application/json"

    def __init__(self, error: APIError) -> None:
        super().__init__(json.dumps(error.body), error.status, error.headers)


async def _answer(request: Request, error: Exception) -> ErrorResponse:
    return ErrorResponse(as_api_error(error))


def install(app: FastAPI) -> None:
    """Answers all errors of an app in this form."""
    kinds = (
        APIError,
        RequestValidationError,
        HTTPException,
        ConfigError,
        QueueFullError,
        NotFiniteError,
        StoreError,
        Exception,
    )
    for kind in kinds:
        app.add_exception_handler(kind, _answer)
