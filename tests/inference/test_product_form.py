"""How a CPU multiplies many rows by packed matrices: chosen by measurement, once for each processor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_jax import autotune
from rwkv_jax.bench.random_model import random_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.inference.engine import assembly, product_form
from rwkv_jax.inference.engine.product_form import choose_form, faster_form
from rwkv_jax.models.packed import PackedMatrix
from rwkv_kernels.autotune import Trial
from tests.inference.models import GREEDY, LONG_IDS, VOCAB_SIZE, quick_engine


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The file of measurements, with nothing remembered from other tests."""
    monkeypatch.setenv(autotune.VARIABLE, str(tmp_path / "tuning.json"))
    faster_form.cache_clear()
    yield tmp_path / "tuning.json"
    faster_form.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What has been measured; converted int8 matrices are twice as fast as digits, int4 ones a tenth faster."""
    calls: list[tuple[object, ...]] = []

    def measure(kind: str, rows: int, width: int) -> tuple[Trial, ...]:
        calls.append((kind, rows, width))
        return Trial("digits", 0.0, 2.0, None), Trial("converted", 0.0, 1.0 if kind == "int8" else 1.8, None)

    monkeypatch.setattr(product_form, "measure", measure)
    return calls


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_both_forms_are_right_and_timed(kind: str) -> None:
    ticks = itertools.count()
    trials = product_form.measure(kind, 20, 64, lambda: float(next(ticks)))
    assert [(trial.name, trial.seconds, trial.failure) for trial in trials] == [
        ("digits", 1.0, None),
        ("converted", 1.0, None),
    ]
    assert all((trial.error or 1) < 1e-6 for trial in trials)


def test_a_processor_is_measured_once(measured: list[tuple[object, ...]], path: Path) -> None:
    for _ in range(2):
        assert faster_form("int8", 512) == "converted"
        assert faster_form("int4", 512) == "digits"  # which is almost as fast, and what it was
        faster_form.cache_clear()  # as in another process
    assert measured == [("int8", 512, 512), ("int4", 512, 512)]
    lines = autotune.describe(path)
    assert lines[1].startswith("  int8 product B1 T512 H1 N512 M512 float32 on ")
    assert lines[1].endswith(", forward: converted, 1000.000 ms")


def test_a_file_that_cannot_be_used_is_said_and_left(measured: list[tuple[object, ...]], path: Path) -> None:
    path.write_text("{}")
    with pytest.warns(UserWarning, match=r"not kept: .*tuning\.json: is no file of measurements"):
        assert faster_form("int8", 512) == "converted"
    assert path.read_text() == "{}"
    assert len(measured) == 1


def test_a_folder_that_cannot_be_written_is_measured_for_once(
    measured: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(autotune, "keep", keep)
    with pytest.warns(UserWarning, match="not kept: .*Read-only file system"):
        assert faster_form("int8", 512) == "converted"
    assert len(measured) == 1


def test_a_form_that_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = product_form.product
    monkeypatch.setattr(
        product_form, "product", lambda x, held: right(x, held) * (1.01 if held.many_rows == "converted" else 1)
    )
    digits, converted = product_form.measure("int8", 20, 64, itertools.count().__next__)
    assert digits.seconds == 1
    assert converted.seconds is None
    assert (converted.failure or "").startswith("WRONG: it is off by 1e-02, at most 1e-04")


def test_only_packed_models_of_some_width_on_a_cpu_are_measured(measured: list[tuple[object, ...]]) -> None:
    wide = ModelConfig("4", vocab_size=VOCAB_SIZE, num_layers=2, width=256, ffn_width=64)
    narrow = ModelConfig("4", vocab_size=VOCAB_SIZE, num_layers=2, width=64)
    int8 = random_model(wide, "int8")
    assert choose_form(random_model(narrow, "int8"), "cpu") == choose_form(random_model(wide), "cpu") == "digits"
    assert choose_form(int8, "gpu") == "digits"
    assert not measured
    assert choose_form(int8, "cpu") == "converted"
    assert measured == [("int8", 512, 256)]


def test_an_engine_says_the_same_in_either_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(ModelConfig("4", vocab_size=VOCAB_SIZE, num_layers=2, width=64), "int8")
    texts = []
    for form in ("digits", "converted"):
        monkeypatch.setattr(assembly, "choose_form", lambda *_, form=form: form)
        made = quick_engine(model, prefill_length=64)
        held = [x for x in product_form._leaves(made.model) if isinstance(x, PackedMatrix)]
        assert held
        assert {x.many_rows for x in held} == {form}
        texts.append(made.generate(LONG_IDS, max_tokens=3, sampling=GREEDY))
    assert texts[0].ids == texts[1].ids
    assert texts[0].logprobs == pytest.approx(texts[1].logprobs, abs=1e-4)
    assert {x.many_rows for x in product_form._leaves(model) if isinstance(x, PackedMatrix)} == {"digits"}
