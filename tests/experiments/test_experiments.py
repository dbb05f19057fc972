"""Every experiment: its smallest form runs and draws, and what is committed is what its script says."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import common
from rwkv_jax.config import ModelConfig
from tests.programs import compiled_quickly

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/run.py"))
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
NOT_RUN = "Not run yet"
SLOW = (
    *("baselines", "compressed", "conversion", "distillation", "fine_tuning_methods", "forecasting"),
    *("initialization", "listening", "quantized_adapters", "question_order", "rare_facts"),
    *("rosa_reversal", "tutorial_tables"),
)
"""Those whose smallest form takes more than 7 seconds."""


def load(name: str) -> Any:
    return importlib.import_module(f"experiments.{name}.run")


def test_there_are_experiments() -> None:
    assert {"runtime", "parallel_and_serial", "gradient_norms"} <= set(NAMES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in SLOW else ()) for n in NAMES])
def test_the_smallest_form_runs_and_draws(name: str, tmp_path: Path) -> None:
    experiment = load(name)
    with compiled_quickly():
        results = common.run(experiment.measure, experiment.SMALLEST)
    assert results["machine"]
    assert json.loads(json.dumps(results)) == results
    experiment.draw(results, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_of_the_committed_sizes_and_claims_what_its_numbers_show(name: str) -> None:
    experiment, folder = load(name), FOLDER / name
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert f"experiments/{name}" in PAGE
    assert f"python -m experiments.{name}.run" in readme
    if not (folder / common.RESULTS).exists():
        assert NOT_RUN in readme
        assert not (folder / common.FIGURE).exists()
        return
    assert NOT_RUN not in readme
    results = json.loads((folder / common.RESULTS).read_text())
    assert results["sizes"] == json.loads(json.dumps(dataclasses.asdict(experiment.SMALL)))
    claims = getattr(experiment, "claims", lambda results: {})
    assert results["claims"] == claims(results)
    for claim, holds in results["claims"].items():
        if not holds:
            assert claim in " ".join(readme.split()), f"README.md does not say that this did not hold: {claim}"
    assert f"experiments/{name}/{common.FIGURE}" in PAGE
    assert (folder / common.FIGURE).stat().st_size < 150_000
    assert str(ROOT) not in json.dumps(results)


def test_what_was_not_measured_is_not_shown() -> None:
    experiment = load("fidelity")
    results = json.loads((FOLDER / "fidelity" / common.RESULTS).read_text())
    assert set(experiment.claims(results).values()) == {True}
    assert experiment.refusal(results, dict.fromkeys(experiment.PACKAGES, "python")) is None
    assert "has 9 measured rows and would have 2" in experiment.refusal(results, {})
    names = ("peer", "model", "form")
    not_run = [
        row if row["peer"] == "ours" else {n: row[n] for n in names} | {"not_run": True} for row in results["rows"]
    ]
    assert set(experiment.claims({"rows": not_run}).values()) == {None}
    assert set(experiment.claims({"rows": []}).values()) == {None}
    wrong = [row | {"largest": 1.0} if row["peer"] == "ours" else row for row in not_run]
    assert False in experiment.claims({"rows": wrong}).values()


def run_main(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, **options: Any) -> int:
    """Status of the command of an experiment in a folder."""
    monkeypatch.setattr("sys.argv", ["run", *arguments])
    monkeypatch.setattr(common, "run", lambda measure, sizes: measure(sizes))
    with pytest.raises(SystemExit) as ended:
        common.main(lambda sizes: {"new": True}, small=None, smallest=None, file=str(folder / "run.py"), **options)
    return int(ended.value.code or 0)


def write_figure(results: Any, path: Path) -> None:
    path.write_text("<svg>")


@pytest.mark.parametrize(("holds", "said", "status"), [(True, "yes", 0), (False, "NO", 1), (None, "not shown", 0)])
def test_the_command_says_what_holds(
    holds: bool | None, said: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    assert run_main(monkeypatch, tmp_path, draw=write_figure, claims=lambda results: {"a claim": holds}) == status
    assert capsys.readouterr().out.split("  ")[0].strip() == said
    assert json.loads((tmp_path / common.RESULTS).read_text()) == {"new": True, "claims": {"a claim": holds}}


def test_the_command_does_not_replace_results_against_a_refusal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / common.RESULTS).write_text("{}")
    assert run_main(monkeypatch, tmp_path, draw=write_figure, refusal=lambda results: "no") == 2
    assert (tmp_path / common.RESULTS).read_text() == "{}"
    out = tmp_path / "out"
    assert run_main(monkeypatch, tmp_path, "--out", str(out), draw=write_figure, refusal=lambda results: "no") == 0
    assert (out / common.RESULTS).exists()


def test_a_failing_figure_leaves_the_results_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_main(monkeypatch, tmp_path, draw=write_figure) == 0
    (tmp_path / common.RESULTS).write_text("{}")

    def fail(results: Any, path: Path) -> None:
        path.write_text("half a")
        raise ValueError("no figure")

    for arguments in ((), ("--draw",)):
        with pytest.raises(ValueError, match="no figure"):
            run_main(monkeypatch, tmp_path, *arguments, draw=fail)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {common.RESULTS: "{}", common.FIGURE: "<svg>"}


def test_a_power_law_is_fitted() -> None:
    x = np.array([10, 100, 1000])
    fit = common.fit_power_law(x, 3 * x**1.5)
    np.testing.assert_allclose((fit.slope, np.exp(fit.intercept), fit.r_squared), (1.5, 3, 1), rtol=1e-9)
    assert common.fit_power_law(x, [1, 9, 2]).r_squared < 0.2


def test_numbers_are_rounded_for_json() -> None:
    given = {"a": np.float32(1 / 3), "b": [np.int64(7), float("nan")], 3: (True, None, np.arange(2))}
    assert common.rounded(given) == {"a": 0.333333, "b": [7, None], "3": [True, None, [0, 1]]}


@pytest.mark.parametrize("name", sorted(set(common.ALL_MODELS) - {"RWKV-7"}))
def test_a_model_gets_as_many_parameters_as_another(name: str) -> None:
    shape: dict[str, Any] = {"vocab_size": 35, "num_layers": 2, "width": 64, "head_dim": 16}
    target = ModelConfig(generation="7", **shape).num_parameters()
    found = ModelConfig(**common.ALL_MODELS[name], **shape).with_num_parameters(target, multiple=1).num_parameters()
    assert abs(found - target) < 300


def test_matrices_of_zeros_become_random_and_nothing_else_does() -> None:
    import jax
    from flax import nnx

    config = ModelConfig(generation="4", vocab_size=7, num_layers=2, width=8)
    before, after = (nnx.state(make(config), nnx.Param) for make in (common.initialized, common.randomized))
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    changed = [(x, y) for x, y in pairs if not np.array_equal(x, y)]
    assert changed
    assert all(not np.asarray(x).any() for x, _ in changed)
    assert all(0.1 < float(np.std(y)) < 0.8 for _, y in changed)
