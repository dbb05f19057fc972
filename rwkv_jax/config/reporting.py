"""What a run reports and saves: evaluations, checkpoints, logs."""

from __future__ import annotations

import dataclasses

from rwkv_jax.checks import checker, require_positive


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss, samples and tasks."""

    every: int = 200
    """Steps between evaluations; the last step is always evaluated."""
    batches: int = 16
    """Batches of held-out text per evaluation; the last evaluation reads all of it. Of a synthetic task, each
    evaluation draws the same ones."""
    lengths: tuple[int, ...] = ()
    """Sequence lengths at which a synthetic task is evaluated besides training.sequence_length."""
    sample_prompts: tuple[str, ...] = ("def", "class", "import")
    """Prompts to sample from; one at each evaluation, all of them at the end. None for a synthetic task."""
    sample_tokens: int = 128
    """Tokens per sample."""
    sample_temperature: float = 0.8
    """Sampling temperature."""
    sample_top_p: float = 0.9
    """Top-p of the samples."""
    tasks: tuple[str, ...] = ()
    """Evaluation tasks as NAME=PATH, such as lambada=data/lambada_test.jsonl; docs/evaluation.md lists them."""
    task_every: int | None = None
    """Steps between runs of the tasks, which also run after the last step; None: at every evaluation."""
    task_items: int = 256
    """Items of each task, the first ones of its file."""
    task_num_fewshot: int | None = None
    """Examples in each prompt of the tasks; None: each task's own default."""
    task_examples: tuple[str, ...] = ()
    """Files of the examples as NAME=PATH; without one they are drawn from the task's folder, or the other items."""
    task_seed: int = 1234
    """Of the choice of examples; lm-eval's default."""
    best_by: str = "loss"
    """What the checkpoint in best/ is the best by: loss, the held-out one, or a figure of one of the tasks as
    metrics.jsonl has it, such as lambada.accuracy."""
    stop_after: int | None = None
    """Evaluations in a row that are no better than the best one, after which the run ends; None: it takes all its
    steps."""
    ema: bool = False
    """Evaluate, sample and choose the best by the averages of training.ema_decay in the place of the weights."""

    def __post_init__(self) -> None:
        require_positive(self, "evaluation", "every", "batches", "sample_tokens", "task_items")
        check = checker(self, "evaluation")
        check(self.stop_after is None or self.stop_after > 0, "stop_after", "must be greater than zero")
        check(self.task_every is None or self.task_every > 0, "task_every", "must be greater than zero")
        check(self.task_num_fewshot is None or self.task_num_fewshot >= 0, "task_num_fewshot", "must be >= 0")
        for field in ("tasks", "task_examples"):
            parts = [pair.partition("=") for pair in getattr(self, field)]
            check(all(name and path for name, _, path in parts), field, "must be NAME=PATH each")
            check(len({name for name, _, _ in parts}) == len(parts), field, "must name each task once")
        check(
            self.best_by == "loss" or self.best_by.partition(".")[0] in {task.partition("=")[0] for task in self.tasks},
            "best_by",
            "must be loss, or a figure of one of evaluation.tasks, such as lambada.accuracy",
        )
        check(
            not any("\ud800" <= character <= "\udfff" for prompt in self.sample_prompts for character in prompt),
            "sample_prompts",
            "is not UTF-8, or not to be read in this locale; set LC_ALL=C.UTF-8, or put them in the config file",
        )
        check(min(self.lengths, default=1) > 0, "lengths", "must be greater than zero")
        check(len(set(self.lengths)) == len(self.lengths), "lengths", "names one twice")
        check(self.sample_temperature >= 0, "sample_temperature", "must be >= 0")
        check(0 < self.sample_top_p <= 1, "sample_top_p", "must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved and when."""

    every: int = 200
    """Steps between checkpoints; the last step is always saved. RWKV-LM: epoch_steps, epoch_save."""
    keep: int = 2
    """Number of newest checkpoints to keep; the best one is kept in addition."""

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint", "every", "keep")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Where metrics are logged besides the console and metrics.jsonl."""

    every: int = 10
    """Steps between lines of metrics.jsonl; their losses are means over these steps."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl (needs the `tensorboard` extra)."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs the `wandb` extra). RWKV-LM: wandb."""

    def __post_init__(self) -> None:
        require_positive(self, "logging", "every")
