"""Tasks: who knows the answers gets full marks, metrics are what they are called, and malformed items are named."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, LoglikelihoodResult, Rolling, answer
from rwkv_jax.evaluation.tasks import TASKS, find_task
from rwkv_jax.evaluation.tasks.base import Case, make_cases
from rwkv_jax.evaluation.tasks.gsm8k import flexible_answer, strict_answer
from rwkv_jax.evaluation.tasks.wikitext import pages_of
from tests.evaluation.golden_items import FILES, FOLDER, golden_cases


class Oracle:
    """Knows the answers, and nothing else: the right continuation is certain, all others are hopeless."""

    def __init__(self, cases: Sequence[Case[Any]]) -> None:
        self.right: set[Any] = set()
        self.answers: dict[Any, str] = {}
        for case in cases:
            for i, request in enumerate(case.requests):
                if getattr(case.item, "answer", 0) == i:
                    self.right.add(request)
                if isinstance(request, Generate):
                    self.answers[request] = f" {case.item.answer}"

    def loglikelihood(self, requests: Sequence[Loglikelihood], report: Any = None) -> list[LoglikelihoodResult]:
        return [LoglikelihoodResult(0.0 if each in self.right else -1e4, each in self.right) for each in requests]

    def rolling(self, requests: Sequence[Rolling], report: Any = None) -> list[float]:
        return [0.0 for _ in requests]

    def generate(self, requests: Sequence[Generate], report: Any = None) -> list[str]:
        return [self.answers[each] for each in requests]


@pytest.mark.parametrize("num_fewshot", [0, 2])
@pytest.mark.parametrize("name", FILES)
def test_an_oracle_gets_full_marks(name: str, num_fewshot: int) -> None:
    task = TASKS[name]
    if name == "mmlu":
        examples = FOLDER / "mmlu_dev.jsonl" if num_fewshot else None
        cases = make_cases(task, FILES[name], num_fewshot=num_fewshot, examples=examples)
    else:
        cases = make_cases(task, FILES[name], num_fewshot=num_fewshot if task.takes_examples else 0)
    oracle = Oracle(cases)
    summary = task.aggregate([task.score(case.item, answer(oracle, case.requests)) for case in cases])
    best = {"bits_per_byte": 0.0}
    assert {name: each.value for name, each in summary.metrics.items()} == {
        name: best.get(name, 1.0) for name in task.metrics
    }


@pytest.mark.parametrize("name", ["piqa", "hellaswag", "arc_easy"])
def test_accuracies_are_those_of_brute_force(name: str) -> None:
    task, cases = golden_cases(name)
    generator = np.random.default_rng(3)
    scores, right, right_by_length = [], 0, 0
    for case in cases:
        logprobs = [float(value) for value in generator.normal(-40, 10, size=len(case.requests))]
        scores.append(task.score(case.item, [(value, False) for value in logprobs]))
        best = max(range(len(logprobs)), key=lambda i: logprobs[i])
        lengths = [len(choice) for choice in case.item.choices]
        best_by_length = max(range(len(logprobs)), key=lambda i: logprobs[i] / lengths[i])
        right += best == case.item.answer
        right_by_length += best_by_length == case.item.answer
    metrics = task.aggregate(scores).metrics
    assert metrics["acc"].value == right / len(cases)
    assert metrics["acc_norm"].value == right_by_length / len(cases)
    deviation = np.std([score["acc"] for score in scores], ddof=1) / math.sqrt(len(cases))
    assert metrics["acc"].stderr == pytest.approx(deviation, rel=1e-12)


def test_perplexity_of_words_does_not_ask_for_the_tokenizer() -> None:
    """Pages count by their own words and bytes, so that only the sum of log-probabilities matters."""
    task, cases = golden_cases("wikitext")
    logprobs = [-100.0 - i for i in range(len(cases))]
    metrics = task.aggregate(
        [task.score(case.item, [value]) for case, value in zip(cases, logprobs, strict=True)]
    ).metrics
    words = sum(len(case.item.text.split()) + 2 for case in cases)  # blanks at both ends divide, too
    assert metrics["word_perplexity"].value == pytest.approx(math.exp(-sum(logprobs) / words), rel=1e-12)
    num_bytes = sum(len(case.item.text.encode()) for case in cases)
    assert metrics["bits_per_byte"].value == pytest.approx(-sum(logprobs) / num_bytes / math.log(2), rel=1e-12)


def test_articles_begin_at_headings_of_the_first_level() -> None:
    pages = [f" \n = Town {i} = \n \n It is . \n = = History = = \n It was . \n" for i in range(3)]
    assert pages_of("".join(pages)) == [
        page.removeprefix(" \n") + (" " if i < 2 else "") for i, page in enumerate(pages)
    ]


def write_mmlu(folder: Path) -> Path:
    """A folder as released: CSV files by subject."""
    rows = {
        "test/toy_words_test.csv": 'Which is short?,a,"bb, bb",ccc,dddd,A\n"Two\nlines?",1,2,3,4,D\n',
        "test/toy_numbers_test.csv": "1 + 1 =,1,2,3,4,B\n",
        "dev/toy_words_dev.csv": "Which is long?,a,bb,ccc,dddd,D\n",
        "dev/toy_numbers_dev.csv": "0 + 1 =,1,2,3,4,A\n",
    }
    for name, text in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_mmlu_as_released(tmp_path: Path) -> None:
    cases = make_cases(TASKS["mmlu"], write_mmlu(tmp_path), num_fewshot=1)
    assert [case.group for case in cases] == ["toy_numbers", "toy_words", "toy_words"]
    assert [case.item.answer for case in cases] == [1, 0, 3]
    assert cases[1].requests[1] == Loglikelihood(
        "The following are multiple choice questions (with answers) about toy words.\n\n"
        "Which is long?\nA. a\nB. bb\nC. ccc\nD. dddd\nAnswer: D\n\n"
        "Which is short?\nA. a\nB. bb, bb\nC. ccc\nD. dddd\nAnswer:",
        " B",
    )
    summary = TASKS["mmlu"].aggregate([{"acc": 1.0}, {"acc": 0.0}, {"acc": 1.0}], [case.group for case in cases])
    assert summary.metrics["acc"].value == pytest.approx(2 / 3)
    assert {group: each["acc"].value for group, each in summary.groups.items()} == {"toy_numbers": 1, "toy_words": 0.5}
    with pytest.raises(ConfigError, match=r"num_fewshot = 2: mmlu has 1 examples of toy_numbers; give more"):
        make_cases(TASKS["mmlu"], tmp_path, num_fewshot=2)


def test_mmlu_compressed_and_where_it_is_looked_for(tmp_path: Path) -> None:
    plain = make_cases(TASKS["mmlu"], write_mmlu(tmp_path), num_fewshot=1)
    for file in tmp_path.glob("*/toy_words_*.csv"):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert make_cases(TASKS["mmlu"], tmp_path, num_fewshot=1) == plain  # nothing is read twice
    for file in tmp_path.glob("*/toy_words_*.csv"):
        file.unlink()
    assert make_cases(TASKS["mmlu"], tmp_path, num_fewshot=1) == plain
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"holds none of test.jsonl, \*_test.csv, test/\*_test.csv, data/test/\*_te"):
        make_cases(TASKS["mmlu"], tmp_path / "none")


def test_labels_of_piqa_are_as_many_as_items(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n' * 2)
    for labels, message in (
        ("1\n", r"valid-labels.lst, line 2: label is missing"),
        ("1\n0\n1\n", r"valid-labels.lst: has 3 labels for 2 items; must have one for each"),
    ):
        (tmp_path / "valid-labels.lst").write_text(labels)
        with pytest.raises(ConfigError, match=message):
            make_cases(TASKS["piqa"], tmp_path)


def test_other_forms_of_the_same_items(tmp_path: Path) -> None:
    released = {
        "id": "x",
        "question": {"stem": "Hot?", "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]},
        "answerKey": "2",
    }
    (tmp_path / "ARC-Challenge-Test.jsonl").write_text(json.dumps(released))
    (case,) = make_cases(TASKS["arc_challenge"], tmp_path)
    assert (case.requests[1], case.item.answer) == (Loglikelihood("Question: Hot?\nAnswer:", " fire"), 1)
    (tmp_path / "valid.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n' * 2)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    assert [case.item.answer for case in make_cases(TASKS["piqa"], tmp_path)] == [1, 0]
    (tmp_path / "plain.txt").write_text("we took the kite\nthe end\n")
    cases = make_cases(TASKS["lambada"], tmp_path / "plain.txt")
    assert [case.requests[0] for case in cases] == [Loglikelihood("we took the", " kite"), Loglikelihood("the", " end")]


def test_compression_reads_files_lists_and_folders(tmp_path: Path) -> None:
    task = TASKS["compression"]
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "a.md").write_text("a\u00e9")
    (tmp_path / "news" / ".hidden").write_text("no")
    (tmp_path / "code.json").write_text('["x", {"text": "yy"}]')
    (tmp_path / "web.jsonl").write_text('{"text": "zzz"}\n{"text": ""}\n')
    (tmp_path / "b.txt").write_text("bbbb")
    (tmp_path / "empty.txt").write_text("")
    cases = make_cases(task, tmp_path)
    assert [(case.item.text, case.group) for case in cases] == [
        ("bbbb", None),
        ("x", "code"),
        ("yy", "code"),
        ("a\u00e9", "news"),
        ("zzz", "web"),
    ]
    assert all(case.requests == (Rolling(case.item.text),) for case in cases)
    scores = [task.score(case.item, [-math.log(2) * len(case.item.text.encode())]) for case in cases]
    metrics = task.aggregate(scores, [case.group for case in cases]).metrics
    assert metrics["bits_per_byte"].value == pytest.approx(1)
    assert metrics["compression_rate"].value == pytest.approx(12.5)
    assert [case.group for case in make_cases(task, tmp_path / "code.json")] == [None, None]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 5.\n#### 1,234.", "1,234.", "1,234."),
        ("#### 7\n#### 8", "7", "8"),
        ("it costs $12.50 in all", "[invalid]", "$12.50"),
        ("-3 is it", "[invalid]", "-3"),
        ("none", "[invalid]", "[invalid]"),
    ],
)
def test_numbers_are_found_in_answers(text: str, strict: str, flexible: str) -> None:
    assert (strict_answer(text), flexible_answer(text)) == (strict, flexible)


def test_an_item_is_no_example_of_itself() -> None:
    for seed in range(8):
        cases = make_cases(TASKS["gsm8k"], FILES["gsm8k"], num_fewshot=3, seed=seed)
        for case in cases:
            (request,) = case.requests
            assert isinstance(request, Generate)
            assert str(request.context).count(case.item.question) == 1
    with pytest.raises(ConfigError, match=r"num_fewshot = 4: gsm8k has 4 examples to draw from"):
        make_cases(TASKS["gsm8k"], FILES["gsm8k"], num_fewshot=4)


GOOD = {
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    "hellaswag": {"activity_label": "A", "ctx_a": "B.", "ctx_b": "c", "endings": list("defg"), "label": "3"},
    "winogrande": {"sentence": "The _ is.", "option1": "a", "option2": "b", "answer": "1"},
    "arc_easy": {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "lambada": {"text": "a b"},
    "wikitext": {"page": "a"},
    "mmlu": {"question": "q", "subject": "s", "choices": list("abcd"), "answer": 3},
    "gsm8k": {"question": "q", "answer": "#### 1"},
    "compression": {"text": "t"},
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"label": 2}, "label = 2: must be a whole number from 0 to 1"),
        ("piqa", {"label": True}, "label = True: must be a whole number from 0 to 1"),
        ("piqa", {"sol1": None}, "sol1 = None: must be a text"),
        ("piqa", {"sol2": ""}, "sol2 = '': must not be empty"),
        ("hellaswag", {"label": ""}, "files without answers, as of test sets, cannot be scored"),
        ("hellaswag", {"endings": ["a"]}, "endings = ['a']: has 1 entries, must have 4"),
        ("winogrande", {"sentence": "No blank."}, "sentence = 'No blank.': has no blank"),
        ("winogrande", {"answer": 3}, "answer = 3: must be 1 or 2"),
        ("arc_easy", {"answerKey": "C"}, "answerKey = 'C': must be the label of a choice: A, B"),
        ("arc_easy", {"choices": {"text": ["a", "b"]}}, "choices.label: is missing; the fields are text"),
        ("lambada", {"text": "word"}, "text: must have a blank before its last word"),
        ("lambada", {"text": "a \ud800"}, "is not Unicode"),
        ("mmlu", {"choices": list("abc")}, "has 3 entries, must have 4"),
        ("mmlu", {"answer": "E"}, "answer = 'E': must be a whole number from 0 to 3"),
        ("gsm8k", {"answer": "1"}, "answer = '1': must end in #### and the number"),
        ("compression", {"text": 1}, "text = 1: must be a text"),
    ],
)
def test_malformed_items_are_named(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, (GOOD[name], GOOD[name] | change))))
    with pytest.raises(ConfigError) as error:
        make_cases(TASKS[name], file, num_fewshot=0)
    assert str(error.value).startswith(f"{file}, line 2: ")
    assert message in str(error.value)


@pytest.mark.parametrize("name", GOOD)
def test_missing_fields_broken_lines_and_files_are_named(tmp_path: Path, name: str) -> None:
    task, file = TASKS[name], tmp_path / "items.jsonl"
    for field in GOOD[name]:
        file.write_text(json.dumps({key: value for key, value in GOOD[name].items() if key != field}))
        with pytest.raises(ConfigError, match=rf"items.jsonl, line 1: {field}: is missing"):
            make_cases(task, file, num_fewshot=0)
    for line, problem in (("[1]", "must be an object"), ("{", "is not JSON")):
        file.write_text(f"\n{json.dumps(GOOD[name])}\n{line}\n")
        with pytest.raises(ConfigError, match=f"items.jsonl, line 3: .*{problem}"):
            make_cases(task, file, num_fewshot=0)
    file.write_text("\n")
    with pytest.raises(ConfigError, match=f"{name} = '.*items.jsonl': holds no items; {name} reads "):
        make_cases(task, file, num_fewshot=0)
    with pytest.raises(ConfigError, match=f"{name} = '.*nowhere': no such file or folder"):
        make_cases(task, tmp_path / "nowhere")
    if task.files:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match=f"the folder holds none of {task.files[0]}"):
            make_cases(task, tmp_path / "empty")


def test_a_damaged_csv_file_is_named(tmp_path: Path) -> None:
    file = write_mmlu(tmp_path) / "test" / "toy_words_test.csv"
    file.write_text("q,1,2,3,4,A\nq,1,2,3,4\n")
    with pytest.raises(ConfigError, match=r"toy_words_test.csv, line 2: has 5 columns, must have 6: question, A, B"):
        make_cases(TASKS["mmlu"], file)
    file.write_text(f'q,1,2,3,4,A\n"{"x" * 140_000},1,2,3,4,A\n')
    with pytest.raises(ConfigError, match=r"toy_words_test.csv, line 2: is not CSV \(field larger than field limit"):
        make_cases(TASKS["mmlu"], file)
    file.write_text("q,1,2,3,4,F\n")
    with pytest.raises(ConfigError, match=r"toy_words_test.csv, line 1: answer = 'F'"):
        make_cases(TASKS["mmlu"], file)


def test_unknown_tasks_and_impossible_options() -> None:
    with pytest.raises(
        ConfigError, match=r"tasks = 'hellswag': no such task; did you mean hellaswag\? there are lambada"
    ):
        find_task("hellswag")
    with pytest.raises(ConfigError, match=r"num_fewshot = 1: wikitext has no few-shot prompts"):
        make_cases(TASKS["wikitext"], FILES["wikitext"], num_fewshot=1)
    with pytest.raises(ConfigError, match=r"num_fewshot = -1"):
        make_cases(TASKS["piqa"], FILES["piqa"], num_fewshot=-1)
    for name, remedy in (("piqa", "give num_fewshot, too, or leave them out"), ("wikitext", "leave them out")):
        with pytest.raises(ConfigError, match=f"examples = '.*': prompts of {name} have no examples; {remedy}"):
            make_cases(TASKS[name], FILES[name], examples=FILES[name])
    with pytest.raises(ConfigError, match=r"limit = 0"):
        make_cases(TASKS["piqa"], FILES["piqa"], limit=0)
    assert len(make_cases(TASKS["piqa"], FILES["piqa"], limit=3)) == 3
