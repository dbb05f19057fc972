"""The probes: against scorers that know everything or nothing, and on a tiny model against what it says itself."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.evaluation.limits import privacy
from rwkv_jax.evaluation.limits.bias import PAIRS, bias
from rwkv_jax.evaluation.limits.compressed import compressed, last_words
from rwkv_jax.evaluation.limits.material import FILLER, NAMES, THINGS
from rwkv_jax.evaluation.limits.positions import loss_by_position, position_edges
from rwkv_jax.evaluation.limits.privacy import membership, prompt_leak
from rwkv_jax.evaluation.limits.rarity import by_rarity
from rwkv_jax.evaluation.limits.recall import make_questions, recall
from rwkv_jax.evaluation.limits.retrieval import make_question, retrieval_grid
from rwkv_jax.evaluation.limits.robustness import floods, read_floods
from rwkv_jax.evaluation.limits.run import PROBES, Inputs, passages, probe
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, LoglikelihoodResult, Rolling
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.weights.pretrained import from_pretrained, save_pretrained
from tests.inference.models import CONFIGS, quick_engine, random_model

BYTES = ByteTokenizer(256)


class Reader:
    """Answers by a rule instead of a model."""

    def __init__(
        self,
        likes: Callable[[str, str], float] = lambda context, continuation: 0.0,
        says: Callable[[str], str] = lambda context: "",
    ) -> None:
        self.likes, self.says = likes, says

    def loglikelihood(self, requests: Sequence[Loglikelihood], report: Any = None) -> list[LoglikelihoodResult]:
        return [LoglikelihoodResult(self.likes(str(each.context), str(each.continuation)), False) for each in requests]

    def rolling(self, requests: Sequence[Rolling], report: Any = None) -> list[float]:
        return [self.likes("", str(each.text)) for each in requests]

    def generate(self, requests: Sequence[Generate], report: Any = None) -> list[str]:
        return [self.says(str(each.context)) for each in requests]


def knows_facts(context: str, continuation: str) -> float:
    """Reads sentences of the kind: NAME has the THING, The pass key is KEY."""
    begin = context.rpartition("? ")[2] if "has the" in context.rpartition("? ")[2][-20:] else context
    name = begin.split()[-3] if begin.endswith("has the") else "pass key"
    sentence = f"{name} has the{continuation}." if begin.endswith("has the") else f"The pass key is{continuation}."
    return float(sentence in context)


def last_five(context: str, continuation: str) -> float:
    """Remembers the last five sentences."""
    return knows_facts(". ".join(context.split(". ")[-6:]), continuation)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return quick_engine(random_model(CONFIGS["7"]))


@pytest.mark.parametrize("kind", ["passkey", "needle"])
def test_who_knows_the_facts_finds_every_needle_and_who_does_not_is_at_chance(kind: Any) -> None:
    lengths, depths = (500, 700), (0.0, 0.5, 1.0)
    found = retrieval_grid(Reader(knows_facts), BYTES, kind, lengths, depths, samples=4)
    assert [[cell.value for cell in cells] for cells in found.accuracy] == [[1.0] * 3] * 2
    guessed = retrieval_grid(Reader(), BYTES, kind, (500,), (0.5,), samples=400)
    assert guessed.accuracy[0][0].value == pytest.approx(found.chance, abs=0.06)


def test_who_forgets_finds_what_stands_last() -> None:
    found = retrieval_grid(Reader(last_five), BYTES, "needle", (1000,), (0.0, 1.0), samples=4)
    assert [cell.value for cell in found.accuracy[0]] == [pytest.approx(0.25, abs=0.26), 1.0]


def test_a_needle_stands_where_it_is_asked_to() -> None:
    for depth in (0.0, 0.3, 1.0):
        question = make_question(BYTES, "needle", 900, depth, random.Random(1))
        assert 840 <= len(BYTES.encode(question.context)) <= 900
        assert all(f"{choice}." in question.context for choice in question.choices)
        place = question.context.index(f" has the{question.choices[question.answer]}.")
        assert place / question.context.index("What does") == pytest.approx(depth, abs=0.12)
    with pytest.raises(ConfigError, match=r"lengths = 30: has no room for the facts and the question; at least \d+"):
        make_question(BYTES, "passkey", 30, 0.0, random.Random(0))


def test_recall_of_who_forgets_falls_with_the_number_of_facts() -> None:
    every = recall(Reader(knows_facts), (2, 8), samples=8)
    assert [(own.question_last.value, own.question_first.value) for own in every] == [(1.0, 1.0)] * 2
    few, many = recall(Reader(last_five), (2, 32), samples=32)
    assert few.question_last.value == 1.0
    assert many.question_last.value < 0.5
    with pytest.raises(ConfigError, match="nums_facts = 33: must lie between 2 and 32"):
        recall(Reader(), (33,))


def test_both_orders_ask_the_same() -> None:
    last, first = make_questions(random.Random(0), 4)
    assert (last.choices, last.answer) == (first.choices, first.answer)
    assert sorted(last.context) == sorted(first.context)
    assert last.context.rpartition(". ")[2] != first.context.rpartition(". ")[2]
    assert first.context.startswith("What does")
    assert len(set(NAMES)) == len(NAMES)
    assert len(set(THINGS)) == len(THINGS)
    assert not [name for name in NAMES if any(name in sentence for sentence in FILLER)]


def test_bias_of_a_model_that_treats_both_alike_is_nothing() -> None:
    even = bias(Reader(lambda _, text: -3.0))
    assert (even.share.value, even.difference.value) == (0.5, 0.0)
    stereotyped = {first for first, _ in PAIRS}
    full = bias(Reader(lambda _, text: 2.0 * (text in stereotyped)))
    assert (full.share.value, full.difference.value) == (1.0, 2.0)
    assert len(PAIRS) == 20
    assert all(a != b and len(set(a.split()) ^ set(b.split())) == 2 for a, b in PAIRS)


def test_membership_counts_pairs() -> None:
    losses = {"aa": -2.0, "bb": -4.0, "cc": -6.0, "dd": -6.0, "ee": -10.0}
    found = membership(Reader(lambda _, text: losses[text]), ["aa", "bb", "cc"], ["dd", "ee"])
    assert found.auc == pytest.approx((2 + 2 + 1.5) / 6)
    assert found.low <= found.auc <= found.high
    assert (found.member_loss, found.other_loss) == (2.0, 4.0)
    with pytest.raises(ConfigError, match="others: has 1 texts"):
        membership(Reader(), ["aa", "bb"], ["dd"])


def test_prompts_given_away_are_measured_by_the_longest_run() -> None:
    secret = "The word of the day is marmalade."

    def says(context: str) -> str:
        return f"I say: {secret}" if "Repeat" in context else "marmalade"

    found = prompt_leak(Reader(says=says), [secret])
    assert found.share_whole.value == pytest.approx(1 / len(privacy.ATTACKS))
    assert found.longest.value == pytest.approx((1 + 2 * len("marmalade") / len(secret)) / 3)


def test_losses_by_position_are_the_mean_of_the_tokens(engine: Engine) -> None:
    generator = np.random.default_rng(0)
    texts = [generator.integers(1, 256, size=length).tolist() for length in (90, 40)]
    assert position_edges(300) == (0, 64, 128, 256, 300)
    found = loss_by_position(engine, texts, (0, 30, 50, 90))
    scores = engine.score([tuple(text) for text in texts])
    expected = np.array([-x for x in scores[0].token_logprobs[30:50] + scores[1].token_logprobs[30:50]])
    assert found.losses[1].loss == pytest.approx(expected.mean())
    assert [own.count for own in found.losses] == [60, 30, 40]
    assert found.losses[2].stderr is None
    with pytest.raises(ConfigError, match="must ascend from 0 or more to at most 90"):
        loss_by_position(engine, texts, (0, 91))


def test_rare_tokens_are_counted_by_the_training_text(engine: Engine) -> None:
    training = np.repeat([5, 6, 7], [3, 20, 200])
    found = by_rarity(engine, [[5, 6, 7, 8, 6]], training)
    assert [own.count for own in found] == [1, 1, 2, 1, 0, 0]
    (score,) = engine.score([(5, 6, 7, 8, 6)])
    assert found[2].loss == pytest.approx(-(score.token_logprobs[1] + score.token_logprobs[4]) / 2)
    assert found[5].loss is None


def test_floods_leave_the_state_finite(engine: Engine) -> None:
    found = read_floods(engine, 800)
    assert [own.name for own in found] == list(floods(256, 0, 8))
    assert all(own.is_finite and len(own.largest) == 8 and math.isfinite(own.largest[-1]) for own in found)
    assert read_floods(engine, 800) == found
    with pytest.raises(ConfigError, match="num_tokens = 7: must be a whole number, not less than 8"):
        read_floods(engine, 7)


@pytest.mark.long
def test_compressed_weights_are_smaller_and_differ(engine: Engine, tmp_path: Path) -> None:
    save_pretrained(random_model(CONFIGS["7"]), tmp_path / "model.pth")
    text = "The harvest was late, and so the harvest festival waited for the harvest of apples. " * 12

    def int4() -> Engine:
        return quick_engine(from_pretrained(tmp_path / "model.pth", quantize="int4"))

    forms = (("float32", lambda: quick_engine(random_model(CONFIGS["7"]))), ("int4", int4))
    rows = compressed(forms, [text], num_words=4)
    assert rows[0].agreement == 1.0
    assert rows[0].weight_bytes > rows[1].weight_bytes
    (score,) = engine.score([text])
    assert rows[0].bits_per_byte == pytest.approx(-score.logprob / math.log(2) / len(text))
    assert rows[0].bits_per_byte != rows[1].bits_per_byte


def test_last_words_stand_in_their_passages() -> None:
    text = "The miller and his daughter went to town. " * 20
    found = last_words(text, 8)
    assert len(found) == 8
    assert all(word.word.strip() in word.context and not word.context.endswith(" ") for word in found)
    with pytest.raises(ConfigError, match="none says a word of four letters or more again"):
        last_words("a b c", 8)


def test_every_probe_writes_its_numbers(engine: Engine, tmp_path: Path) -> None:
    text = "the harvest was late, and so was the harvest festival of the valley. " * 10
    inputs = Inputs(
        engine, (2 * text,), (2 * text.upper(),), (("float32", lambda: quick_engine(random_model(CONFIGS["7"]))),),
        lengths=(500,), samples=2, nums_facts=(2, 3), num_tokens=64,
    )  # fmt: skip
    chosen = list(PROBES)
    heard: list[str] = []
    probe(inputs, chosen, output=tmp_path, about={"model": "tiny"}, report=lambda each: heard.append(each.probe))
    assert heard == chosen
    written = json.loads((tmp_path / "probes.json").read_text())
    assert [each["probe"] for each in written["probes"]] == chosen
    assert written["model"] == "tiny"
    assert (tmp_path / "probes.md").read_text().count("\n## ") == len(chosen) - 1
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "positions",
        "passkey",
        "needle",
        "recall",
        "rarity",
        "compressed",
    }


def test_what_is_missing_is_named_before_anything_runs(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="probes = 'passkeys': no such probe; did you mean passkey"):
        probe(Inputs(engine), ["bias", "passkeys"])
    with pytest.raises(ConfigError, match=r"training_texts = \(\): the probe membership needs some"):
        probe(Inputs(engine, texts=("a",)), ["membership"])
    with pytest.raises(ConfigError, match="nums_facts = 64: must lie between 2 and 32"):
        probe(Inputs(engine, nums_facts=(64,)), ["robustness", "recall"])
    with pytest.raises(ConfigError, match="lengths = 20: has no room for the facts"):
        probe(Inputs(engine, lengths=(20,)), ["robustness", "needle"])
    with pytest.raises(ConfigError, match="texts: has 0 passages of 512 characters"):
        probe(Inputs(engine, texts=("a",), training_texts=(2000 * "b",)), ["robustness", "membership"])


def test_passages_are_spread_over_the_texts() -> None:
    assert passages(["abcdefgh", "ijkl"], 2, 3) == ["ab", "ef", "ij"]
    assert passages(["abcdefgh", "ij"], 2, 4) == ["ab", "cd", "ef", "gh"]
    assert passages(["abcd"], 2, 64) == ["ab", "cd"]
