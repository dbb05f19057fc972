"""/: the chat page, one document without a request to anywhere but this server."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import re
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

router = APIRouter()

_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')


class Page(NamedTuple):
    """The document as it is sent."""

    content: bytes
    """HTML, UTF-8."""
    headers: dict[str, str]
    """A policy that lets run only what is in the document, and what caches need."""


@router.get("/", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def get_page(request: Request) -> Response:
    """The chat page, or 304 where the browser has it."""
    page = assemble()
    if request.headers.get("If-None-Match") == page.headers["ETag"]:
        return Response(status_code=304, headers=page.headers)
    return Response(page.content, media_type="text/html", headers=page.headers)


@functools.cache
def assemble() -> Page:
    """Puts the files of `rwkv_jax/serving/page` into its index.html."""
    styles: list[str] = []
    scripts: list[str] = []

    def put_style(match: re.Match[str]) -> str:
        styles.append(_read(match[1]))
        return f"<style>{styles[-1]}</style>"

    def put_script(match: re.Match[str]) -> str:
        scripts.append(_read(match[1]))
        return f"<script>{scripts[-1]}</script>"

    content = _SCRIPT.sub(put_script, _STYLE.sub(put_style, _read("index.html"))).encode()
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(map(_hash, scripts)),
        "style-src": " ".join(map(_hash, styles)),
        "img-src": "data:",  # the empty icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # Strings never become HTML, whatever a script does.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",  # ask each time whether it is still the same
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }
    return Page(content, headers)


def _read(name: str) -> str:
    return importlib.resources.files("rwkv_jax.serving").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a policy names an inline element."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
