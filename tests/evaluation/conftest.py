"""What tests of whole evaluations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rwkv_jax.cli.program_cache import programs_kept_in


@pytest.fixture(scope="module")
def programs_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps programs for the modules that follow, which have engines of the same sizes."""
    with programs_kept_in(tmp_path_factory.getbasetemp() / "programs"):
        yield
