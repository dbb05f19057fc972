"""`rwkv serve`: its flags; what it serves is in tests/serving."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jax.chat.formats import G1, RAVEN
from rwkv_jax.serving import server
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.service import Service
from tests.cli.commands import Command


def test_a_run_is_served_by_its_name(
    rwkv: Command, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    served: list[Service] = []
    monkeypatch.setattr(server, "run_server", served.append)
    rwkv("serve", run_dir, "--port", 0, "--slots", 2, "--max-queue", 3, "--tune", "never")
    rwkv("serve", run_dir, "--model-name", "mine", "--host", "::1", "--state-store", ":memory:", "--template", "raven")
    first, second = served
    assert (first.model_name, first.options) == ("run", ServeOptions(port=0))
    assert (first.engine.options.num_slots, first.engine.options.max_queue) == (2, 3)
    assert [path.name for path in (tmp_path / "rwkv-jax").iterdir()] == ["run.sqlite"]
    assert (second.model_name, second.options.host) == ("mine", "::1")
    assert (first.template, second.template) == (G1, RAVEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "0"], "--slots 0: must be a whole number"),
        (["--prefix-bytes", "-1"], "--prefix-bytes -1: must be a whole number"),
        (["--max-queue", "0"], "--max-queue 0: must be a whole number"),
        (["--port", "-1"], "--port -1: must be a whole number, from 0 to 65535"),
        (["--host", ""], "--host '': must be an address"),
        (["--host", "0.0.0.0"], "--host '0.0.0.0': other machines reach this address; give --api-keys FILE"),
        (["--api-keys", "nowhere"], "--api-keys 'nowhere': cannot be read"),
        (["--model-name", ""], "--model-name '': is empty"),
        (["--template", "vicuna"], "--template 'vicuna': is none of g1, world, raven, pile-qa"),
        (["--state-store", ""], "--state-store '': must be a file"),
        (["--state-bytes", "0"], "--state-bytes 0: must be a whole number"),
        (["--state-idle-days", "0"], "--state-idle-days 0.0: must be a positive number"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_named(rwkv: Command, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        rwkv("serve", "nowhere", *arguments)
    assert str(exit_.value.code).startswith(f"rwkv: {message}")
