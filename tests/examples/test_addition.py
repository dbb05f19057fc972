"""Two-digit addition by rewards: what is rewarded, what is shown, and the smallest form of its two runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from examples.addition import run as addition
from examples.addition.rewards import formatted, right, success
from rwkv_jax.config import TrainConfig
from rwkv_jax.data.chat.source import prepare_chats
from rwkv_jax.data.preference.prompts import prepare_prompts
from rwkv_jax.run_folder import RUN_FILE
from rwkv_jax.training.schedule import learning_rate_schedule

RECORD = {"prompt": "34+57=", "sum": 91}


def ignored(line: str) -> None:
    """Reports nothing."""


@pytest.mark.parametrize(
    ("reply", "is_right", "is_formatted"),
    [
        ("[91]", True, True),
        ("91", True, False),
        ("[19]", False, True),
        ("91]", True, False),
        ("[91] ", False, False),
        ("[91][91]", False, False),
        ("[]", False, False),
        ("", False, False),
        ("\n[91]", False, False),
    ],
)
def test_rewards(reply: str, is_right: bool, is_formatted: bool) -> None:
    assert right(RECORD, reply) is is_right
    assert formatted(RECORD, reply) is is_formatted
    assert success(RECORD, reply) is (is_right and is_formatted)


def test_held_out_sums_are_in_no_other_file_and_half_of_the_demonstrations_have_brackets(tmp_path: Path) -> None:
    addition.write_data(tmp_path)
    shown, prompts, held_out = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("shown", "prompts", "held_out")
    )
    asked = {record["prompt"] for record in held_out}
    assert len(asked) == addition.NUM_HELD_OUT
    assert len(asked | {record["prompt"] for record in prompts}) == 90 * 90
    assert [record["prompt"] for record in shown] == [record["prompt"] for record in prompts]
    assert asked.isdisjoint(record["prompt"] for record in shown)
    for demonstration, record in zip(shown, prompts, strict=True):
        a, b = record["prompt"].removesuffix("=").split("+")
        assert record["sum"] == int(a) + int(b)
        assert right(record, demonstration["completion"])
    in_brackets = sum(success(record, each["completion"]) for record, each in zip(prompts, shown, strict=True))
    assert 0.47 < in_brackets / len(shown) < 0.53


def test_rows_have_room_for_the_longest_sum(tmp_path: Path) -> None:
    shown, rewarded = addition.shown(tmp_path, addition.WHOLE), addition.rewarded(tmp_path, addition.WHOLE)
    prompt, reply = len("\0" + "99+99="), len("[198]" + "\0")
    assert shown.training.sequence_length == prompt + reply - 1  # whose last token is no input
    assert rewarded.grpo.max_tokens == reply
    assert rewarded.training.sequence_length == prompt + reply


def test_prompts_are_read_as_they_were_shown(tmp_path: Path) -> None:
    addition.write_data(tmp_path)
    for path in (tmp_path / "shown.jsonl", tmp_path / "prompts.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:200]))
    shown = prepare_chats(addition.shown(tmp_path, addition.WHOLE), ignored)
    prompts = prepare_prompts(addition.rewarded(tmp_path, addition.WHOLE), ignored)
    asked = {tuple(prompt.tokens.tolist()) for prompt in (*prompts.training, *prompts.held_out)}
    for index in range(100):
        sample = shown.training[index]
        (counted,) = np.nonzero(sample.mask)
        assert tuple(sample.tokens[: counted[0] + 1].tolist()) in asked  # the last of these predicts the reply's first
        assert sample.targets[-1] == shown.tokenizer.end_of_text
        assert counted.tolist() == list(range(counted[0], len(sample.tokens)))


def test_the_demonstrations_schedule_is_that_of_twice_the_steps(tmp_path: Path) -> None:
    config = addition.shown(tmp_path, addition.WHOLE)
    rate = learning_rate_schedule(config.optimizer, config.training.num_steps)
    assert np.asarray(rate(config.training.num_steps - 1)) == pytest.approx(2.2e-3, rel=0.03)


@pytest.mark.parametrize(("drawn", "status"), [(0.95, 0), (0.94, 1)])
def test_the_command_fails_unless_rewards_have_helped(
    drawn: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = {
        "shown": {"likeliest": 0.3, "drawn": 0.44, "minutes": 1.0},
        "rewarded": {"likeliest": 1.0, "drawn": drawn, "minutes": 1.0},
    }
    monkeypatch.setattr("sys.argv", ["run"])
    monkeypatch.setattr(addition, "run", lambda folder, sizes: shares)
    monkeypatch.setattr(addition, "keep_programs", lambda: None)
    assert addition.main() == status
    assert ("NO" in capsys.readouterr().out) is bool(status)


def test_minutes_are_of_runs_trained_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: TrainConfig) -> SimpleNamespace:
        run_dir = Path(config.run_dir)
        run_dir.mkdir(exist_ok=True)
        (run_dir / RUN_FILE).touch()
        return SimpleNamespace(state=SimpleNamespace(step=config.training.num_steps))

    monkeypatch.setattr(addition, "train", train)
    monkeypatch.setattr(addition, "shares_of_success", lambda folder, run_dir: {"drawn": 1.0})
    assert all("minutes" in found for found in addition.run(tmp_path, addition.SMALLEST).values())
    (tmp_path / "rewarded" / RUN_FILE).unlink()
    again = addition.run(tmp_path, addition.SMALLEST)
    assert again["shown"] == {"drawn": 1.0}
    assert "minutes" in again["rewarded"]


@pytest.mark.long
def test_the_smallest_form_runs(tmp_path: Path) -> None:
    shares = addition.run(tmp_path, addition.SMALLEST)
    assert list(shares) == ["shown", "rewarded"]
    for found in shares.values():
        assert 0 <= found["likeliest"] <= 1
        assert 0 <= found["drawn"] <= 1
    lines = (tmp_path / "rewarded" / "rollouts.jsonl").read_text().splitlines()
    config = addition.rewarded(tmp_path, addition.SMALLEST)
    assert len(lines) == config.training.num_steps * config.training.batch_size
    assert set(json.loads(lines[0])["rewards"]) == {"right", "formatted"}
