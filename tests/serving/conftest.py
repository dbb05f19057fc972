"""A tiny random model that is served, once a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from starlette.testclient import TestClient

from rwkv_jax.cli.program_cache import programs_kept_in
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.service import Service
from tests.inference.models import CONFIGS, quick_engine, random_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps programs on disk: every module would compile the same ones again, for seconds."""
    with programs_kept_in(tmp_path_factory.getbasetemp() / "programs"):  # for all modules
        yield


@pytest.fixture(scope="module")
def engine(compiled_programs: None) -> Iterator[Engine]:
    with quick_engine(random_model(CONFIGS["7"]), max_queue=60) as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: Engine) -> Service:
    return Service(engine, "tiny")


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    """Calls the app in this process; a 500 is an answer, too."""
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.serving.browser import chromium  # with Playwright, which takes long to import

    with chromium() as found:
        yield found
