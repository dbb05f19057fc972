"""Whole evaluations: interrupted and resumed, refused where they do not belong together, and written down."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.engine_scorer import EngineScorer
from rwkv_jax.evaluation.journal import Journal
from rwkv_jax.evaluation.report import FORMAT, PICTURE, RESULTS, TABLE, TaskReport, picture
from rwkv_jax.evaluation.run import Progress, evaluate
from rwkv_jax.evaluation.statistics import Estimate
from rwkv_jax.evaluation.tasks.plans import plan_tasks
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.run_lock import take_lock
from tests.evaluation.piqa_file import GOALS, write_piqa
from tests.inference.models import CONFIGS, quick_engine, random_model

CONFIG = CONFIGS["7"]


@pytest.fixture(scope="module")
def engine(programs_on_disk: None) -> Iterator[Engine]:
    with quick_engine(random_model(CONFIG)) as engine:
        yield engine


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    return write_piqa(tmp_path / "valid.jsonl")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of requests that scorers were asked."""
    numbers: list[int] = []
    ask = EngineScorer.loglikelihood

    def count(self: EngineScorer, requests: Any, report: Any = None) -> Any:
        numbers.append(len(requests))
        return ask(self, requests, report)

    monkeypatch.setattr(EngineScorer, "loglikelihood", count)
    return numbers


class Interrupted:
    """Ctrl-C once some items are done."""

    def __init__(self, num_done: int) -> None:
        self._num_done = num_done

    def __call__(self, progress: Progress) -> None:
        if progress.num_done == self._num_done:
            raise KeyboardInterrupt


def metrics(folder: Path) -> dict[str, Any]:
    (task,) = json.loads((folder / RESULTS).read_text())["tasks"]
    return task["metrics"]


def journal(folder: Path) -> Path:
    return folder / "journal" / "piqa.jsonl"


def logprobs(folder: Path) -> list[float]:
    items = sorted(map(json.loads, journal(folder).read_text().splitlines()[1:]), key=lambda line: line["item"])
    return [logprob for line in items for logprob, _ in line["results"]]


@pytest.mark.parametrize("num_done", [1, 4, 5])
def test_an_interrupted_evaluation_goes_on_and_finds_the_same(
    engine: Engine, piqa: Path, tmp_path: Path, asked: list[int], num_done: int
) -> None:
    evaluate(engine, {"piqa": piqa}, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, {"piqa": piqa}, output=tmp_path / "parts", report=Interrupted(num_done))
    assert not (tmp_path / "parts" / RESULTS).exists()
    with journal(tmp_path / "parts").open("ab") as file:
        file.write(b'{"item": 4, "prompt": "12')  # as a power failure leaves it
    del asked[:]
    report = evaluate(engine, {"piqa": piqa}, output=tmp_path / "parts")
    assert asked == [2 * (len(GOALS) - num_done)] * (num_done < len(GOALS))
    assert report.tasks[0].num_resumed == num_done
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    np.testing.assert_allclose(logprobs(tmp_path / "parts"), logprobs(tmp_path / "whole"), atol=1e-4)


def test_a_finished_evaluation_takes_more_items_and_further_tasks(
    engine: Engine, piqa: Path, tmp_path: Path, asked: list[int]
) -> None:
    evaluate(engine, {"piqa": piqa}, output=tmp_path / "out", limit=2)
    evaluate(engine, {"piqa": piqa}, output=tmp_path / "out")
    written = journal(tmp_path / "out").read_bytes()
    report = evaluate(engine, {"piqa": piqa}, output=tmp_path / "out", limit=1)
    assert asked == [4, 6]
    assert (report.tasks[0].num_items, report.tasks[0].num_resumed) == (1, 1)
    assert journal(tmp_path / "out").read_bytes() == written
    with journal(tmp_path / "out").open("ab") as file:
        file.write(b'{"item": 4, "prompt": "12')  # the file is written anew without this
    evaluate(engine, {"piqa": piqa}, output=tmp_path / "out", limit=1)
    assert journal(tmp_path / "out").read_bytes() == written
    assert evaluate(engine, {"piqa": piqa}, output=tmp_path / "out").tasks[0].num_resumed == len(GOALS)
    assert asked == [4, 6]


def refusal(engine: Engine, piqa: Path, folder: Path, **changes: Any) -> str:
    before = journal(folder).read_bytes()
    with pytest.raises(ConfigError) as error:
        evaluate(engine, {"piqa": piqa}, output=folder, **changes)
    assert journal(folder).read_bytes() == before
    return str(error.value)


def test_results_of_something_else_are_refused_and_the_difference_is_named(
    engine: Engine, piqa: Path, tmp_path: Path, asked: list[int]
) -> None:
    folder = tmp_path / "out"
    evaluate(engine, {"piqa": piqa}, output=folder, limit=3)
    del asked[:]
    assert "begin was True and is False" in refusal(engine, piqa, folder, begin=False)
    several = refusal(engine, piqa, folder, num_fewshot=2, seed=7, window=5)
    assert "num_fewshot was 0 and is 2; seed was 1234 and is 7; window was None and is 5; name another" in several
    with quick_engine(random_model(dataclasses.replace(CONFIG, ffn_width=64))) as other:
        assert "piqa.jsonl is of another evaluation: model was '" in refusal(other, piqa, folder)
    write_piqa(piqa, (GOALS[0], "dry shoes", *GOALS[2:]))
    assert "line 3: item 1 was asked otherwise: the task's file has changed" in refusal(engine, piqa, folder)
    lock, _ = take_lock(folder / ".lock", wait=0)
    assert "another process evaluates there" in refusal(engine, piqa, folder)
    lock.release()
    for content in (b"{}\n", b"nothing\n"):
        journal(folder).write_bytes(content)
        assert f"name another folder, or move {journal(folder)} away" in refusal(engine, piqa, folder)
    assert asked == []


def test_a_folder_holds_tasks_of_one_model_and_its_report_keeps_them(
    engine: Engine, piqa: Path, tmp_path: Path, asked: list[int]
) -> None:
    folder, text = tmp_path / "out", tmp_path / "text.jsonl"
    text.write_text('{"text": "a b"}\n{"text": "the end"}\n')
    evaluate(engine, {"piqa": piqa}, output=folder, limit=2)
    (first,) = json.loads((folder / RESULTS).read_text())["tasks"]
    report = evaluate(engine, {"lambada": text}, output=folder)
    added, kept = json.loads((folder / RESULTS).read_text())["tasks"]
    assert (added["task"], kept) == ("lambada", first)
    assert (folder / TABLE).read_text() == report.markdown()
    assert "| lambada | 1 | 0 | 2 |" in report.markdown()
    assert "| piqa | 1 | 0 | 2 |" in report.markdown()
    again = evaluate(engine, {"piqa": piqa}, output=folder, limit=3)
    assert [(task.task.name, task.num_items) for task in again.tasks] == [("piqa", 3), ("lambada", 2)]
    infinite = json.loads((folder / RESULTS).read_text())
    infinite["tasks"][1]["metrics"]["perplexity"]["value"] = "inf"
    assert TaskReport.from_json(infinite["tasks"][1]).as_json() == infinite["tasks"][1]
    before, num_asked = {path: path.read_bytes() for path in folder.rglob("*.*")}, len(asked)
    refused = pytest.raises(ConfigError, match=r"lambada.jsonl is of another evaluation: model was '.*; name another")
    with quick_engine(random_model(dataclasses.replace(CONFIG, ffn_width=64))) as other, refused:
        evaluate(other, {"compression": text}, output=folder)
    journal(folder).unlink()
    (folder / "journal" / "lambada.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"results.json is of another evaluation: begin was True and is False; name"):
        evaluate(engine, {"piqa": piqa}, output=folder, begin=False)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")}.items() <= before.items()
    assert len(asked) == num_asked
    for content in ('{"format": 1}', "nothing", '{"format": "FORMAT", "tasks": [{"task": "boolq"}]}'):
        (folder / RESULTS).write_text(content.replace("FORMAT", FORMAT))
        with pytest.raises(ConfigError, match=r"results.json.*name another folder, or move .*results.json away"):
            evaluate(engine, {"piqa": piqa}, output=folder)


def test_truncated_contexts_are_counted_over_resumptions(
    engine: Engine, piqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "parts", []

    def is_truncated(scorer: EngineScorer, request: Any) -> bool:
        seen.append(request)
        return request.continuation == " wait"  # one of each item's two

    monkeypatch.setattr(EngineScorer, "is_truncated", is_truncated)
    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, {"piqa": piqa}, output=folder, report=Interrupted(3))
    for _ in range(2):
        assert evaluate(engine, {"piqa": piqa}, output=folder).num_truncated == len(GOALS)
        assert len(seen) == 2 * len(GOALS)
    content = json.loads((folder / RESULTS).read_text())
    assert content["num_truncated"] == content["tasks"][0]["num_truncated"] == len(GOALS)
    table = (folder / TABLE).read_text()
    assert f"\npiqa: {len(GOALS)} of {2 * len(GOALS)} requests were cut at their beginning, since" in table
    assert evaluate(engine, {"piqa": piqa}, output=folder, limit=2).num_truncated == 2


def test_a_full_disk_is_said_and_what_was_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    path, prompts = tmp_path / "piqa.jsonl", {0: "a", 1: "b"}
    with contextlib.closing(Journal(path, {}, prompts)) as file:
        file.add(0, [1.5])
    with contextlib.closing(Journal(path, {}, prompts)) as file:
        vars(file)["_file"].close()
        monkeypatch.setattr(file, "_file", Full())
        with pytest.raises(ConfigError, match=r"output: .*piqa.jsonl cannot be written \(No space left on device\)"):
            file.add(1, [2.5])
    with contextlib.closing(Journal(path, {}, prompts)) as file:
        assert file.results == {0: [1.5]}


def test_what_an_evaluation_writes(engine: Engine, piqa: Path, tmp_path: Path) -> None:
    report = evaluate(engine, {"piqa": piqa}, output=tmp_path / "out", num_fewshot=1, name="tiny.pth", seed=5)
    content = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert content == json.loads(json.dumps(report.as_json()))
    assert content["model"]["hash"] == engine.identity.model
    assert content["model"]["tokenizer"] == engine.tokenizer.fingerprint
    assert content["model"]["name"] == "tiny.pth"
    assert content["model"]["parameter_dtypes"] == ["float32"]
    assert content["settings"] == {"begin": True, "window": None}
    assert {"rwkv-jax", "jax", "jaxlib", "flax", "numpy", "python"} == set(content["versions"])
    (task,) = content["tasks"]
    assert (task["task"], task["num_items"], task["num_requests"]) == ("piqa", len(GOALS), 2 * len(GOALS))
    assert (task["num_fewshot"], task["seed"], task["file"]) == (1, 5, "valid.jsonl")
    acc = task["metrics"]["acc"]
    assert 0 <= acc["low"] <= acc["value"] <= acc["high"] <= 1
    assert acc["count"] == len(GOALS)
    table = (tmp_path / "out" / TABLE).read_text()
    assert table == report.markdown()
    assert f"| piqa | 1 | 1 | {len(GOALS)} | acc | {acc['value']:.4f} | ± {acc['stderr']:.4f} |" in table
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(content)


def test_hashes_tell_prompts_and_answers_apart(engine: Engine, piqa: Path) -> None:
    first, again, other_shots = (evaluate(engine, {"piqa": piqa}, num_fewshot=num).tasks[0] for num in (0, 0, 1))
    assert first.prompt_hash == again.prompt_hash != other_shots.prompt_hash
    assert first.answer_hash == again.answer_hash == other_shots.answer_hash
    items = [json.loads(line) for line in piqa.read_text().splitlines()]
    items[2]["label"] ^= 1
    piqa.write_text("".join(json.dumps(item) + "\n" for item in items))
    other_label = evaluate(engine, {"piqa": piqa}).tasks[0]
    assert first.prompt_hash == other_label.prompt_hash
    assert first.answer_hash != other_label.answer_hash


def test_infinite_and_single_values_are_written_and_drawn(engine: Engine, piqa: Path) -> None:
    report = evaluate(engine, {"piqa": piqa}, limit=1)
    (task,) = report.tasks
    infinite = Estimate(float("inf"), None, None, None, 1)
    summary = task.summary._replace(metrics={"acc": infinite, "acc_norm": task.summary.metrics["acc_norm"]})
    report = dataclasses.replace(report, tasks=(dataclasses.replace(task, summary=summary),))
    assert report.as_json()["tasks"][0]["metrics"]["acc"]["value"] == "inf"
    assert "| piqa | 1 | 0 | 1 | acc | inf |  |  |" in report.markdown()
    assert picture(report.tasks).startswith(b"\x89PNG")


def test_plans_have_their_own_choices(engine: Engine, piqa: Path, asked: list[int]) -> None:
    several: list[tuple[dict[str, Any], str]] = [({"limit": 1}, "limit = 1"), ({"nonsense": 3}, "nonsense = 3")]
    for choices, message in several:
        with pytest.raises(ConfigError, match=f"{message}: the tasks are planned already; give it to plan_tasks"):
            evaluate(engine, plan_tasks({"piqa": piqa}), **choices)
    assert asked == []


def test_tasks_are_checked_before_anything_runs(piqa: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tasks = 'piqua': no such task; did you mean piqa"):
        plan_tasks({"piqua": piqa})
    with pytest.raises(ConfigError, match=r"nowhere.jsonl': no such file or folder; give a file, or one with"):
        plan_tasks({"piqa": tmp_path / "nowhere.jsonl"})
    with pytest.raises(ConfigError, match="tasks: there are none; give at least one, as NAME=PATH"):
        plan_tasks({})
    with pytest.raises(ConfigError, match="examples = 'arc': is not among the tasks piqa; name one of them"):
        plan_tasks({"piqa": piqa}, examples={"arc": piqa})
    piqa.write_text(piqa.read_text() + '{"goal": "x", "sol1": "y", "label": 0}\n')
    with pytest.raises(ConfigError, match=r"valid.jsonl, line 6: sol2: is missing"):
        plan_tasks({"piqa": piqa})
