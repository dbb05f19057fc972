"""The chat page as a document; tests/serving/test_page_browser.py has what it does."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import rwkv_jax
from rwkv_jax.serving.routes import page

FOLDER = Path(rwkv_jax.__file__).parent / "serving" / "page"


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page.router)
    return TestClient(app)


def inline(document: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", document, re.DOTALL)


def test_the_page_is_one_document_with_all_files(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    files = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    parts = inline(answer.text, "script") + inline(answer.text, "style")
    assert sorted(parts) == sorted(text for name, text in files.items() if name != "index.html")
    assert not re.search(r"<(script|style|link|img|iframe)[^>]*\b(src|href)=(?!\"data:)", answer.text)
    assert len(answer.content) < 80_000


def test_files_address_nobody_else() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        addresses = re.findall(r"(?:https?:|wss?:)?//\w[\w.]*\.\w+[^\s)]*", text)
        # Comments may name a standard.
        assert set(addresses) <= {"https://html.spec.whatwg.org/multipage/server-sent-events.html"}, path
        assert not re.search(r"@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|\beval\b|document\.write", text), (
            path
        )


def test_the_policy_lets_run_the_inline_files_and_nothing_else(client: TestClient) -> None:
    answer = client.get("/")
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        digests = [hashlib.sha256(text.encode()).digest() for text in inline(answer.text, tag)]
        expected = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        assert policy[f"{tag}-src"].split(" ") == expected
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    # Nor are there elements with styles or handlers of their own, which the policy would refuse.
    assert not re.search(
        r"<[^>]+\s(style|on\w+)=", re.sub(r"<(script|style)>.*?</\1>", "", answer.text, flags=re.DOTALL)
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_browser_keeps_the_page_while_it_is_the_same(client: TestClient) -> None:
    tag = client.get("/").headers["etag"]
    same = client.get("/", headers={"If-None-Match": tag})
    assert (same.status_code, same.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"another"'}).status_code == 200
    head = client.head("/")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)


def test_the_api_does_not_list_the_page(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


def test_files_are_short() -> None:
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 450 for path in FOLDER.iterdir())
