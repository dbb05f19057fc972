"""What a run of GRPO has besides its objective: draws, rewards and batches, their log and their throughput."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.atomic import replace_file
from rwkv_jax.config import ConfigError, GRPOConfig, TrainConfig
from rwkv_jax.data.preference.prompts import PromptCorpus, PromptRecord
from rwkv_jax.held_out import Measured
from rwkv_jax.parallel.coordination import global_array
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.tables import format_table
from rwkv_jax.training.continuations import Continuations, Drawn
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.log_probabilities import token_log_p
from rwkv_jax.training.objectives.grpo import GroupBatch, advantages
from rwkv_jax.training.rewards import Reward, Rewarded, give_rewards, load_rewards
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.state import TrainState
from rwkv_jax.weights.pretrained import initial_params

ROLLOUTS_FILE = "rollouts.jsonl"
"""In the run's folder: every reply that was drawn to train with, with its rewards."""


class Rollout(NamedTuple):
    """Replies to prompts, with what they are worth."""

    prompts: list[PromptRecord]
    """One for each reply."""
    drawn: Drawn
    replies: list[str]
    rewarded: Rewarded
    advantages: np.ndarray
    """float32 [B], zero where a group is skipped."""


@dataclasses.dataclass(eq=False)
class RolloutRows:
    """Draws the replies of each step, rewards them and makes the step's batch."""

    corpus: PromptCorpus
    config: TrainConfig
    functions: TrainFunctions
    rewards: list[Reward]
    report: Callable[[str], None]
    log: Path | None
    """Where replies are written; None in processes that write nothing."""

    def __post_init__(self) -> None:
        self._batch: GroupBatch | None = None
        self._reference: Any = None
        self._seconds = {"drawing replies": 0.0, "rewarding them": 0.0, "log-probabilities": 0.0}
        self._tokens = self._skipped = self._groups = self._alike = 0
        self._without = set[int]()  # draws no group of which has finite rewards
        self._reported = set[str]()
        self._begun = time.perf_counter()
        self.use(self.functions)

    def use(self, functions: TrainFunctions) -> None:
        """Takes other functions of the same run."""
        self.functions, config, grpo = functions, self.config, self.config.grpo
        self._continuations = Continuations(
            functions.run_model,
            config.model,
            self.corpus.tokenizer,
            config.training.sequence_length - grpo.max_tokens,
            grpo.num_generations,
            grpo.max_tokens,
            functions.state_shardings.step,
        )
        self._log_p = jax.jit(self._token_log_p, static_argnums=0)

    def prepare(self, state: TrainState, processes: Processes, *, is_new: bool, report: Callable[[str], None]) -> None:
        """Removes logged replies of steps that are taken again."""
        del is_new, report
        if processes.is_first:
            drop_rollouts_after(Path(self.config.run_dir), int(state.step))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the batches that are trained on; what is drawn comes on top."""
        return self.config.training.batch_size * self.config.training.sequence_length

    def load(self, step: int, params: Any) -> GroupBatch:
        """The batch of a step: of new replies, or those of the step before (`grpo.iterations`)."""
        batch = self._batch
        if batch is None or step % self.config.grpo.iterations == 0:
            jax.block_until_ready(params)  # the steps before, whose time is not that of the draw
            rollout = self._timed("drawing replies", lambda: self._roll_out(step, params))
            self._write(step, rollout)
            made = self._timed("log-probabilities", lambda: jax.block_until_ready(self._batch_of(rollout, params)))
            batch = self._batch = made
        return batch

    def row_locations(self, step: int) -> list[str]:
        """File and line of each prompt of a step, for messages."""
        return [prompt.place for prompt in self._prompts(step)]

    def why_skipped(self, step: int) -> str | None:
        """Why a step had to be skipped; None if not for its rewards."""
        draw = step // self.config.grpo.iterations
        return "no group of replies had finite rewards (grpo.rewards)" if draw in self._without else None

    def describe(self, num_steps: int) -> str:
        """What so many steps read."""
        grpo, size = self.config.grpo, len(self.corpus.training)
        drawn = num_steps // grpo.iterations * (self.config.training.batch_size // grpo.num_generations)
        return f"{grpo.num_generations} replies to each of {drawn:,} prompts, {drawn / size:.2f} epochs of {size:,}"

    def summary(self) -> str:
        """A table of where the time went, and what was skipped."""
        whole = time.perf_counter() - self._begun
        known = dict(self._seconds)
        known["drawing replies"] -= known["rewarding them"]
        parts = known | {"training, evaluation and saving": whole - sum(known.values())}
        rows = [("part of the run", "seconds", "share")]
        rows += [(name, f"{spent:.1f}", f"{spent / whole:.1%}") for name, spent in parts.items()]
        rate = self._tokens / max(known["drawing replies"], 1e-9)
        lines = [
            format_table(rows, "<>>"),
            f"{self._tokens:,} tokens drawn, {rate:,.0f} a second; {self._skipped} of {self._groups} groups skipped, "
            f"since a reward function failed; in {self._alike} all replies had one reward",
        ]
        if self._groups == self._skipped + self._alike > 0:
            lines.append(
                "nothing was learned from rewards: no step had a group of replies with finite rewards that differ; "
                f"look at the functions (grpo.rewards) and at {ROLLOUTS_FILE}"
            )
        return "\n".join(lines)

    def evaluation(self) -> Callable[[Any, int | None], Measured | None]:
        """Makes (params, number of batches or None for all) -> mean rewards of replies to held-out prompts."""
        held_out, num_prompts = self.corpus.held_out, self._num_prompts
        if not held_out:
            return lambda params, num_batches: None

        def evaluate(params: Any, num_batches: int | None) -> Measured:
            found = []
            for number in range(-(-len(held_out) // num_prompts))[:num_batches]:
                some = list(held_out[number * num_prompts : (number + 1) * num_prompts])
                count = len(some) * self.config.grpo.num_generations
                filled = [*some, *[some[0]] * (num_prompts - len(some))]
                found.append(self._rewarded(filled, params, seed=number)[2].values[:count])
            values = np.concatenate(found)
            totals = values @ np.array([reward.weight for reward in self.rewards])
            means = {f"reward_{reward.name}": _mean(values[:, i]) for i, reward in enumerate(self.rewards)}
            return Measured(-_mean(totals), {"reward": _mean(totals), **means})

        return evaluate

    @property
    def _num_prompts(self) -> int:
        return self.config.training.batch_size // self.config.grpo.num_generations

    def _prompts(self, step: int) -> list[PromptRecord]:
        draw = step // self.config.grpo.iterations
        return self.corpus.chosen(draw, num_prompts=self._num_prompts, seed=self.config.seed)

    def _rewarded(self, prompts: Sequence[PromptRecord], params: Any, seed: int) -> tuple[Drawn, list[str], Rewarded]:
        drawn = self._continuations.draw(params, [prompt.tokens for prompt in prompts], seed)
        size = self.config.grpo.num_generations
        replies = [self.corpus.tokenizer.decode(drawn.ids(row)) for row in range(len(drawn.lengths))]
        records = [prompt.record for prompt in prompts for _ in range(size)]
        rewarded = self._timed("rewarding them", lambda: give_rewards(self.rewards, records, replies, size))
        return drawn, replies, rewarded

    def _roll_out(self, step: int, params: Any) -> Rollout:
        grpo, prompts = self.config.grpo, self._prompts(step)
        seed = (self.config.seed * 1_000_003 + step + 1) % 2**32
        drawn, replies, rewarded = self._rewarded(prompts, params, seed)
        each = [prompt for prompt in prompts for _ in range(grpo.num_generations)]
        self._tokens += int(drawn.lengths.sum())
        self._groups += len(prompts)
        totals, usable = (x.reshape(len(prompts), -1) for x in (rewarded.totals, rewarded.usable))
        self._alike += int((usable.all(axis=1) & (np.ptp(totals, axis=1) == 0)).sum())
        if not usable.any():
            self._without.add(step // grpo.iterations)
        if skipped := int((~rewarded.usable).sum()) // grpo.num_generations:
            self._skipped += skipped
            for failure in rewarded.failures:
                if failure.partition(":")[0] not in self._reported:
                    self._reported.add(failure.partition(":")[0])
                    self.report(f"step {step}: {skipped} of {len(prompts)} groups skipped: {failure}")
        return Rollout(each, drawn, replies, rewarded, usable_advantages(rewarded, grpo))

    def _batch_of(self, rollout: Rollout, params: Any) -> GroupBatch:
        """Prompts and replies as rows, with log-probabilities where the objective needs them."""
        grpo, length = self.config.grpo, self.config.training.sequence_length
        shape = (len(rollout.prompts), length)
        tokens, targets = (np.zeros(shape, np.int32) for _ in range(2))
        mask = np.zeros(shape, np.float32)
        for row, prompt in enumerate(rollout.prompts):
            size, drawn = len(prompt.tokens), rollout.drawn
            ids = np.concatenate([prompt.tokens, drawn.tokens[row, : drawn.lengths[row]]])
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            counts = rollout.rewarded.usable[row] and (drawn.ended[row] or not grpo.mask_truncated)
            mask[row, size - 1 : len(ids) - 1] = counts
        usable, worth = rollout.rewarded.usable.astype(np.float32), rollout.advantages
        if not usable.any():  # a loss that is not finite, so that the step is skipped and counted
            worth = np.full_like(worth, np.nan)
        batch = self._placed(GroupBatch(tokens, targets, mask, worth, usable))
        run_model = self.functions.run_model
        if grpo.iterations > 1:
            batch = batch._replace(old_log_p=self._log_p(run_model, params, batch))
        if grpo.kl_weight:
            base = run_model.base(params) if run_model.tuning.is_partial else self._reference_params()
            batch = batch._replace(reference_log_p=self._log_p(RunModel(run_model.graphdef), base, batch))
        return batch

    def _token_log_p(self, run_model: RunModel, params: Any, batch: GroupBatch) -> Any:
        sharded, training = self.functions.sharded, self.config.training

        def local(params: Any, batch: GroupBatch) -> Any:
            return token_log_p(run_model, sharded, training, params, batch.tokens, batch.targets, batch.mask)

        specs = (sharded.select_param_specs(params), sharded.batch_specs(batch))
        return sharded.shard_map(local, specs, sharded.tokens_spec)(params, batch)

    def _reference_params(self) -> Any:
        if self._reference is None:
            assert self.config.initial_weights is not None  # as the config has checked
            placed = self.functions.state_shardings.params
            self._reference = initial_params(self.config.initial_weights, self.config.model, placed)
        return self._reference

    def _placed(self, batch: GroupBatch) -> GroupBatch:
        functions = self.functions

        def placed(x: Any) -> Any:
            sharding = functions.tokens_sharding if x.ndim == 2 else functions.rows_sharding
            return global_array(sharding, x.shape, lambda rows: x[rows])

        return jax.tree.map(placed, batch)

    def _timed(self, part: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = run()
        self._seconds[part] += time.perf_counter() - start
        return found

    def _write(self, step: int, rollout: Rollout) -> None:
        if self.log is None:
            return
        names = [reward.name for reward in self.rewards]
        with self.log.open("a", encoding="utf-8") as file:
            for row, prompt in enumerate(rollout.prompts):
                values = rollout.rewarded.values[row].tolist()
                line = {
                    "step": step,
                    "place": prompt.place,
                    "prompt": prompt.text,
                    "reply": rollout.replies[row],
                    "ended": bool(rollout.drawn.ended[row]),
                    "rewards": {name: _finite(value) for name, value in zip(names, values, strict=True)},
                    "reward": _finite(float(rollout.rewarded.totals[row])),
                    "advantage": float(rollout.advantages[row]),
                    "skipped": not bool(rollout.rewarded.usable[row]),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def usable_advantages(rewarded: Rewarded, grpo: GRPOConfig) -> np.ndarray:
    """The advantages among the replies of groups that are usable, float32 [R]; zero for the others."""
    worth, usable = np.zeros(len(rewarded.totals), np.float32), rewarded.usable
    if usable.any():
        totals = jnp.asarray(rewarded.totals[usable], jnp.float32)
        worth[usable] = advantages(totals, grpo.num_generations, grpo.scale)
    return worth


def rollout_rows(
    corpus: PromptCorpus,
    config: TrainConfig,
    functions: TrainFunctions,
    processes: Processes,
    report: Callable[[str], None],
) -> RolloutRows:
    """The rows of a run.

    Raises:
      ConfigError: a reward function that is not there, or several processes, which would have to draw the same replies.
    """
    if processes.count > 1:
        raise ConfigError(
            f"training.objective = 'grpo': runs in one process, and there are {processes.count}; start one for all "
            "devices of a host"
        )
    log = Path(config.run_dir) / ROLLOUTS_FILE if processes.is_first else None
    return RolloutRows(corpus, config, functions, load_rewards(config.grpo.rewards), report, log)


def drop_rollouts_after(run_dir: Path, step: int) -> None:
    """Removes replies of steps that a resumed run takes again, from `step` on."""
    path = run_dir / ROLLOUTS_FILE
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record: Mapping[str, Any] = json.loads(line)
        except ValueError:  # half a line of a killed run
            break
        if record["step"] < step:
            kept.append(line)
    replace_file(path, b"".join(kept))


def _mean(values: np.ndarray) -> float:
    """Mean of what is finite."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
