from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rwkv_jax.checkpoint_files import CheckpointError
from rwkv_jax.config import ConfigError, LoggingConfig
from rwkv_jax.held_out import Answers
from rwkv_jax.training.reporting.console import Console, format_duration
from rwkv_jax.training.reporting.metrics import MetricsWriter, read_metrics, refuse_lost_checkpoints, require_loggers
from rwkv_jax.training.reporting.plots import plot_losses
from rwkv_jax.training.reporting.throughput import Throughput


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def write_steps(run_dir: Path, steps: range, resume_step: int = 0) -> None:
    with MetricsWriter(run_dir, LoggingConfig(), resume_step) as writer:
        for step in steps:
            writer.write("train", step, {"loss": 10 / step, "bits_per_byte": 4 / step, "learning_rate": 1e-3})
            if step % 4 == 0:
                writer.write("evaluation", step, {"loss": 11 / step, "bits_per_byte": 4.4 / step})
                writer.write("sample", step, {"prompt": "def ", "text": f"step {step}: 日本 [bold]\u2028"})


# metrics.jsonl


def test_a_line_is_whole_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        writer.write("train", 1, {"loss": 2.5, "bad_steps": 0})
        assert writer.path.read_text() == '{"kind": "train", "step": 1, "loss": 2.5, "bad_steps": 0}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32(math.nan), np.array(math.inf)])
def test_numbers_that_are_not_finite_become_null(tmp_path: Path, value: object) -> None:
    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        writer.write("train", 1, {"loss": value})
        assert json.loads(writer.path.read_text())["loss"] is None


def test_arrays_of_one_element_are_numbers_and_others_are_refused_by_name(tmp_path: Path) -> None:
    import jax.numpy as jnp

    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        writer.write("train", 1, {"loss": jnp.float32(0.5), "bad_steps": np.int64(3), "norms": [np.float32(1), 2]})
        assert read_metrics(writer.path) == [
            {"kind": "train", "step": 1, "loss": 0.5, "bad_steps": 3, "norms": [1.0, 2]}
        ]
        with pytest.raises(TypeError, match="'gradients' is a ndarray"):
            writer.write("train", 2, {"gradients": np.zeros(2)})
        assert len(read_metrics(writer.path)) == 1


def test_text_that_utf8_cannot_hold_survives(tmp_path: Path) -> None:
    text = "broken \udce9 text\nand 日本"
    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        writer.write("sample", 1, {"text": text})
    with MetricsWriter(tmp_path, LoggingConfig(), resume_step=1) as writer:
        assert read_metrics(writer.path)[0]["text"] == text


@pytest.mark.parametrize("killed_after", [4, 6, 9])
def test_killed_and_resumed_equals_unbroken(tmp_path: Path, killed_after: int) -> None:
    write_steps(tmp_path / "unbroken", range(1, 13))
    broken = tmp_path / "broken"
    write_steps(broken, range(1, killed_after + 1))
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write('{"kind": "train", "step": 10, "text": "日'.encode()[:-1])
    write_steps(broken, range(5, 13), resume_step=4)
    assert (broken / "metrics.jsonl").read_bytes() == (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()
    assert [path.name for path in broken.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_a_checkpoint_starts_its_record_anew(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 9))
    write_steps(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_old_record_stays_whole_when_rewriting_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, range(1, 9))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written \(no space left\)"):
        MetricsWriter(tmp_path, LoggingConfig(), resume_step=4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_damage_before_the_last_line_is_reported_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(path)


# Loggers


@pytest.mark.parametrize(
    ("logging", "module", "command"),
    [
        (LoggingConfig(tensorboard=True), "tensorboardX", 'pip install "rwkv-jax[tensorboard]"'),
        (LoggingConfig(wandb="project"), "wandb", 'pip install "rwkv-jax[wandb]"'),
    ],
)
def test_a_logger_that_is_not_installed_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging: LoggingConfig, module: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=re.escape(command)):
        require_loggers(logging)
    with pytest.raises(ConfigError, match=re.escape(command)):
        MetricsWriter(tmp_path / "run", logging)
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    with pytest.raises(ConfigError, match="something else named"):
        require_loggers(logging)


def test_loggers_that_are_not_asked_for_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_steps(tmp_path, range(1, 5))


def test_tensorboard_writes_events_beside_the_metrics(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=True)) as writer:
        writer.write("train", 1, {"loss": 2.5, "gradient_norm": math.nan})
        writer.write("sample", 1, {"text": "def f():\n    pass"})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content
    assert b"sample/text" in content
    assert b"gradient_norm" not in content


def test_wandb_continues_its_run_when_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    logged: list[tuple[dict[str, object], int]] = []
    finished: list[bool] = []
    wandb = types.ModuleType("wandb")

    def init(**arguments: object) -> types.SimpleNamespace:
        calls.append(arguments)
        return types.SimpleNamespace(
            id=arguments["id"] or f"new{len(calls)}",
            log=lambda values, step: logged.append((values, step)),
            finish=lambda: finished.append(True),
        )

    monkeypatch.setattr(wandb, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_step in (0, 5, 0):
        with MetricsWriter(tmp_path, LoggingConfig(wandb="p"), resume_step, config={"seed": 1}) as writer:
            writer.write("train", resume_step + 1, {"loss": 1.0, "gradient_norm": math.nan})
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("new1", "allow"), (None, None)]
    assert calls[0]["project"] == "p"
    assert calls[0]["config"] == {"seed": 1}
    assert logged[1] == ({"train/loss": 1.0}, 6)
    assert len(finished) == 3


# Console


def test_plain_lines_every_so_many_steps_without_escape_codes() -> None:
    stream = io.StringIO()
    with Console(25, every=10, stream=stream) as console:
        for step in range(1, 26):
            figures = {"loss": 3.0, "bits_per_byte": 1.25, "tokens_per_second": 5300.4, "gradient_norm": 1.0}
            console.update(step, figures, time_left=192 if step > 1 else None)
        console.print("saved", "[1/2]")
    assert stream.getvalue().splitlines() == [
        "step 1/25  loss 3.0000  1.250 bits/byte  5,300 tokens/s  -:-- left",
        "step 10/25  loss 3.0000  1.250 bits/byte  5,300 tokens/s  3:12 left",
        "step 20/25  loss 3.0000  1.250 bits/byte  5,300 tokens/s  3:12 left",
        "step 25/25  loss 3.0000  1.250 bits/byte  5,300 tokens/s  3:12 left",
        "saved [1/2]",
    ]


@pytest.mark.parametrize("width", [1, 20, 80, 140])
def test_the_live_line_stays_one_line_and_messages_go_above_it(width: int) -> None:
    stream = io.StringIO()
    with Console(50, stream=stream, interactive=True, width=width) as console:
        console.update(1, {"loss": 3.0, "bits_per_byte": 1.25, "tokens_per_second": None})
        console.print("sample [bold]x[/bold] :smile:")
        console.update(50, {"loss": 2.0}, time_left=0)
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "sample [bold]x[/bold] :smile:\n" in text
    visible = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "\n", text)
    assert all(len(line) <= max(width, len("sample [bold]x[/bold] :smile:")) for line in visible.split("\n"))
    if width >= 80:
        assert "loss 3.0000  1.250 bits/byte  -:-- left" in visible


def test_control_characters_of_a_message_are_shown_not_obeyed() -> None:
    stream = io.StringIO()
    Console(1, stream=stream).print("a\x1b[2Jb\x07\tc\n")
    assert stream.getvalue() == "a\\x1b[2Jb\\x07\tc\n\n"


@pytest.mark.parametrize("interactive", [True, False])
def test_odd_terminals_do_not_stop_the_run(interactive: bool) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    raw = io.BytesIO()
    for stream in (Broken(), closed, io.TextIOWrapper(raw, encoding="ascii")):
        stdout = sys.stdout
        with Console(2, stream=stream, interactive=interactive) as console:
            console.update(1, {"loss": math.nan})
            console.print("日本\udce9")
        assert sys.stdout is stdout
    assert b"\\u65e5" in raw.getvalue()
    with Console(2, stream=closed) as console:
        console.update(1, {})


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console(2, stream=stream) as console:
        console.update(1, {"loss": 1.0})
    assert stream.getvalue() == "step 1/2  loss 1.0000  -:-- left\n"
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Console(2, stream=stream) as console:
        console.update(1, {"loss": 1.0})
    assert "\x1b[" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-:--"), (-1, "0:00"), (5.4, "0:05"), (59.6, "1:00"), (3723, "1:02:03"), (180000, "2d 2:00:00")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


# Throughput


def test_throughput_leaves_out_compilation_and_pauses() -> None:
    clock = Clock()
    meter = Throughput(1000, clock=clock)
    for seconds in (60.0, 5.0):
        clock.advance(seconds)
        meter.step()
        assert meter.tokens_per_second is None
        assert meter.time_left(10) is None
    for _ in range(3):
        clock.advance(2.0)
        with meter.pause():
            clock.advance(30.0)
            with meter.pause():
                clock.advance(30.0)
        meter.step()
    assert meter.seconds_per_step == pytest.approx(2.0)
    assert meter.tokens_per_second == pytest.approx(500.0)
    assert meter.time_left(10) == pytest.approx(20.0)
    assert meter.time_left(-1) == 0


def test_throughput_follows_a_change_of_speed() -> None:
    clock = Clock()
    meter = Throughput(1000, clock=clock, decay=0.5, skip_steps=0)
    for seconds in (1.0, 3.0):
        clock.advance(seconds)
        meter.step()
    assert meter.seconds_per_step == pytest.approx((0.25 * 1 + 0.5 * 3) / 0.75)


def test_a_pause_ends_with_an_error_too() -> None:
    clock = Clock()
    meter = Throughput(1000, clock=clock, skip_steps=0)
    with contextlib.suppress(RuntimeError), meter.pause():
        clock.advance(9.0)
        raise RuntimeError
    clock.advance(1.0)
    meter.step()
    assert meter.seconds_per_step == pytest.approx(1.0)


# Plot


def test_the_plot_is_a_png_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 20))
    with MetricsWriter(tmp_path, LoggingConfig(), resume_step=19) as writer:
        writer.write("train", 20, {"loss": math.nan, "learning_rate": 1e-3})
    (tmp_path / "loss.png").write_bytes(b"old")
    imported = set(sys.modules)
    path = plot_losses(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(tmp_path.glob("*.tmp"))
    assert "matplotlib.pyplot" not in set(sys.modules) - imported


@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_one_point_without_rate_or_bits_is_enough(tmp_path: Path, kind: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": kind, "step": 1, "loss": 2.0}) + "\n")
    assert plot_losses(tmp_path).stat().st_size > 1000


def test_accuracies_of_a_task_are_drawn_beside_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, print_figure = [], FigureCanvasAgg.print_figure

    def watched(canvas: FigureCanvasAgg, *arguments: Any, **options: Any) -> None:
        figures.append(canvas.figure)
        print_figure(canvas, *arguments, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_figure", watched)
    answers = Answers(1.0, 0.75, 0.5, 0.25)
    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        writer.write("evaluation", 2, answers._replace(parts={"length_96": answers._replace(accuracy=0.6)}).record())
    plot_losses(tmp_path)
    legends = [axes.get_legend() for axes in figures[0].axes]
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == [
        ["held out  1.000"],
        ["accuracy  75.0%", "whole answers  50.0%", "length 96  60.0%", "chance  25.0%"],
    ]


@pytest.mark.parametrize(
    ("objective", "labels"),
    [
        ("distill", ["loss (nats per token)"]),
        ("align", ["distance of mixers' outputs", "loss (nats per token)"]),
        ("dpo", ["loss of dpo"]),
    ],
)
def test_losses_of_other_units_are_not_drawn_as_nats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, labels: list[str]
) -> None:
    figures, print_figure = [], FigureCanvasAgg.print_figure

    def watched(canvas: FigureCanvasAgg, *arguments: Any, **options: Any) -> None:
        figures.append(canvas.figure)
        print_figure(canvas, *arguments, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_figure", watched)
    (tmp_path / "run.json").write_text(json.dumps({"config": {"training": {"objective": objective}}, "identity": {}}))
    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        writer.write("train", 2, {"loss": 7.0})
        writer.write("evaluation", 2, {"loss": 3.0})
    plot_losses(tmp_path)
    assert [axes.get_ylabel() for axes in figures[0].axes] == labels
    drawn = [[line.get_ydata()[-1] for line in axes.lines] for axes in figures[0].axes]
    assert sorted({value for values in drawn for value in values}) == [3.0, 7.0]
    assert (len(set(drawn[0])) == 1) == (objective == "align")


def test_nothing_to_draw_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no losses to draw"):
        plot_losses(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": null}\n{"kind": "tra')
    with pytest.raises(ValueError, match="no losses to draw"):
        plot_losses(tmp_path)


@pytest.mark.parametrize(
    ("first_step", "last", "refused"), [(0, 4, False), (0, 5, True), (9, 12, False), (9, 13, True)]
)
def test_checkpoints_are_missed_once_one_was_due(tmp_path: Path, first_step: int, last: int, refused: bool) -> None:
    write_steps(tmp_path, range(first_step + 1, last + 1))
    expected = pytest.raises(ConfigError, match=f"goes to step {last}") if refused else contextlib.nullcontext()
    with expected:
        refuse_lost_checkpoints(tmp_path, tmp_path / "checkpoints", first_step, 4)
