"""A whole run: its sections and checks across them."""

from __future__ import annotations

import dataclasses
import operator

from rwkv_jax.checks import checker
from rwkv_jax.config.data import DataConfig
from rwkv_jax.config.distillation import DistillationConfig
from rwkv_jax.config.model import ModelConfig
from rwkv_jax.config.objective import OF_TEXT, PREFERENCES, WITH_REFERENCE, GRPOConfig, PreferenceConfig
from rwkv_jax.config.parallel import DistributedConfig, ParallelConfig
from rwkv_jax.config.reporting import CheckpointConfig, EvaluationConfig, LoggingConfig
from rwkv_jax.config.step import OptimizerConfig, StepConfig
from rwkv_jax.config.tuning import NO_MATRICES, TuningConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run_dir: str = "runs/default"
    """Folder of the run: checkpoints, metrics, samples. An existing run is resumed. RWKV-LM: proj_dir."""
    seed: int = 0
    """Seed of the initial parameters, of the order of the data and of the samples. RWKV-LM: random_seed."""
    initial_weights: str | None = None
    """Weights to fine-tune: a file, a folder, a run or a name on the hub, as `rwkv convert` reads them; data.tokenizer
    names their tokenizer. None starts from the official initial values. An existing run resumes from its own
    checkpoints. RWKV-LM: load_model."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: StepConfig = dataclasses.field(default_factory=StepConfig)
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    profile: tuple[int, int] | None = None
    """First and last step to trace; the trace is written to RUN_DIR/profile."""

    def __post_init__(self) -> None:
        check = checker(self)
        check(bool(self.run_dir), "run_dir", "name a folder")
        check(
            self.initial_weights is None
            or self.data.tokenizer is not None
            or self.data.is_synthetic
            or self.data.is_numbers,
            "data.tokenizer",
            f"initial_weights = {self.initial_weights!r} were trained with a tokenizer; name it, or its folder",
        )
        check(0 <= self.seed < 2**32, "seed", "must fit in 32 bits and not be negative")
        check(
            self.training.sequence_length % self.parallel.sequence == 0,
            "training.sequence_length",
            f"must be a multiple of parallel.sequence = {self.parallel.sequence}",
        )
        check(
            not self.evaluation.lengths or self.data.is_synthetic,
            "evaluation.lengths",
            f"data.source = {self.data.source!r} is no synthetic task, which alone has rows of other lengths",
        )
        check(
            all(length % self.parallel.sequence == 0 for length in self.evaluation.lengths),
            "evaluation.lengths",
            f"must be multiples of parallel.sequence = {self.parallel.sequence}",
        )
        check(
            not self.training.carry_state or not self.data.is_synthetic,
            "training.carry_state",
            f"each row of {self.data.source} is a text of its own; switch it off",
        )
        check(
            not self.evaluation.ema or self.training.ema_decay is not None,
            "evaluation.ema",
            "the run keeps no averages; set training.ema_decay, such as 0.999",
        )
        check(
            self.evaluation.stop_after is None or self.data.held_out > 0 or self.evaluation.best_by != "loss",
            "evaluation.stop_after",
            "there is no held-out text to be better on; set data.held_out, or evaluation.best_by",
        )
        self._check_tuning()
        check(
            self.data.chat is None
            or self.training.reset_at_documents
            or (self.data.chat_rows == "apart" and not self.training.carry_state),
            "training.reset_at_documents",
            "chats in a row would see each other; leave it on, or set data.chat_rows to apart",
        )
        self._check_objective()
        self.model.spec.check_run(self)
        check(
            not self.training.first_step or self.initial_weights is not None,
            "training.first_step",
            "takes up where other weights stopped; name them with initial_weights, or leave it out",
        )
        check(
            0 <= self.training.first_step < self.training.num_steps,
            "training.first_step",
            f"must not be negative, and less than training.num_steps = {self.training.num_steps}",
        )
        check(
            self.optimizer.warmup_steps < self.training.num_steps,
            "optimizer.warmup_steps",
            f"must be less than training.num_steps = {self.training.num_steps}",
        )
        check(
            not self.training.carry_state or self.data.order == "windows",
            "data.order",
            "training.carry_state reads each row on from where it stopped; leave data.order out, or switch it off",
        )
        if self.profile is not None:
            first, last = self.profile
            check(0 <= first <= last, "profile", "must be FIRST LAST with 0 <= FIRST <= LAST")

    def _check_tuning(self) -> None:
        check, tuning = checker(self), self.tuning
        if not tuning.is_partial:
            return
        check(
            self.initial_weights is not None,
            "initial_weights",
            "tuning trains a part of a model; name the weights of the rest, its base",
        )
        named = next(name for name in ("adapter", "also", "state") if getattr(tuning, name))
        check(
            not self.model.rwkv_layers,
            f"tuning.{named}",
            f"model.rwkv_layers = {self.model.rwkv_layers}, and models whose time mixing takes the place of attention "
            "are trained as a whole; leave it out, and freeze parts with optimizer.rates",
        )
        beyond = [layer for layer in tuning.layers if layer >= self.model.num_layers]
        check(not beyond, "tuning.layers", f"must be less than model.num_layers = {self.model.num_layers}")
        if tuning.state:
            self._check_tuned_state()

    def _check_tuned_state(self) -> None:
        check = checker(self)
        check(self.model.spec.has_matrix_state, "tuning.state", NO_MATRICES.format(self.model.spec.a_title))
        check(
            not self.training.carry_state,
            "training.carry_state",
            "a row that goes on does not begin in the tuned state, which would not be trained; switch it off",
        )
        check(
            self.data.is_synthetic or not self.training.reset_at_documents,
            "training.reset_at_documents",
            "a document that begins within a row would begin with zeros, not in the tuned state; switch it off, and "
            "each row is one text that does",
        )

    def _check_objective(self) -> None:
        check, training, data = checker(self), self.training, self.data
        objective = training.objective
        self.preference.check_objective(objective)
        self.grpo.check_objective(objective)
        reads_messages = data.chat is not None or objective in (*PREFERENCES, "grpo")
        check(
            reads_messages or data.chat_format == DataConfig.chat_format,
            "data.chat_format",
            "no chats are read; set data.chat, or leave it out",
        )
        self.distillation.check_run(self)
        if objective == "next_token":
            return
        only = f"training.objective = {objective!r} has none; leave it out"
        check(not training.fused_loss, "training.fused_loss", only)
        check(training.l2wrap in (StepConfig.l2wrap, 0), "training.l2wrap", only)
        if objective in OF_TEXT:
            return
        check(not self.tuning.dropout, "tuning.dropout", only)
        check(not training.carry_state, "training.carry_state", "each reply is a text of its own; switch it off")
        reads = f"training.objective = {objective!r} reads {'prompts' if objective == 'grpo' else 'preferences'}"
        given = data.source != DataConfig.source and not data.is_synthetic
        check(given, "data.source", f"{reads}; name their file or folder")
        check(data.chat is None, "data.chat", f"{reads}; leave it out")
        check(not data.mixture, "data.mixture", f"{reads} from one source; put the files into one folder")
        check(data.tokenizer is not None, "data.tokenizer", f"{reads}, which train none; name that of the model")
        check(data.order == "windows", "data.order", f"{reads}, which have an order of their own; leave this out")
        if objective in WITH_REFERENCE or self.grpo.kl_weight:
            self._check_reference()
        if objective == "grpo":
            self._check_grpo()

    def _check_reference(self) -> None:
        check, tuning = checker(self), self.tuning
        objective = self.training.objective
        check(
            self.initial_weights is not None,
            "initial_weights",
            f"training.objective = {objective!r} compares with a model; name its weights, with which training begins",
        )
        off = "an adapter without which the model is the base: a tuning.adapter other than pissa, and no tuning.also"
        switches = tuning.adapter not in (None, "pissa") and not tuning.also
        check(
            self.preference.reference != "adapter_off" or switches, "preference.reference", f"needs {off}; take stored"
        )
        check(
            objective != "grpo"
            or not tuning.is_partial
            or switches
            or (tuning.state and tuning.adapter is None and not tuning.also),
            "grpo.kl_weight",
            f"needs {off}; or train all weights",
        )
        begins_empty = self.preference.reference == "adapter_off" or (objective == "grpo" and tuning.is_partial)
        for name in ("initial_state", "initial_prompt"):
            check(
                not begins_empty or getattr(tuning, name) is None,
                f"tuning.{name}",
                "the reference model begins its texts with zeros, not in this state; leave it out",
            )
        check(
            objective != "kto" or self.training.accumulation_steps == 1,
            "training.accumulation_steps",
            "kto estimates a KL divergence over the rows of a step, which are then read at once; set it to 1",
        )

    def _check_grpo(self) -> None:
        check, grpo, training = checker(self), self.grpo, self.training
        check(bool(grpo.rewards), "grpo.rewards", "name at least one function, as FILE.py:NAME 1.0")
        check(
            training.batch_size % grpo.num_generations == 0,
            "training.batch_size",
            f"must be a multiple of grpo.num_generations = {grpo.num_generations}",
        )
        check(
            grpo.max_tokens < training.sequence_length,
            "grpo.max_tokens",
            f"must be less than training.sequence_length = {training.sequence_length}, of which prompts have the rest",
        )
        for name in ("checkpoint.every", "training.num_steps", "training.first_step"):
            check(
                operator.attrgetter(name)(self) % grpo.iterations == 0,
                name,
                f"must be a multiple of grpo.iterations = {grpo.iterations}: replies are not saved",
            )
