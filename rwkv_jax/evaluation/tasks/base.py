"""What a task is: it reads items from its own files, makes requests of them, and metrics of the results.

Tasks know no model: `evaluation.requests` says what they may ask. Prompts, continuations and metrics are those of
lm-eval 0.4, whose task definitions each task names as its source.
"""

from __future__ import annotations

import abc
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from rwkv_jax.checks import ConfigError, require_whole
from rwkv_jax.evaluation.requests import Request
from rwkv_jax.evaluation.statistics import Estimate, estimate, mean_of
from rwkv_jax.evaluation.tasks.records import Record, find_file, find_in_folder, read_records

Item = TypeVar("Item")
Score = float | tuple[float, float]
"""An item's share of a metric: a value, or a value and its weight, such as a log-probability and a number of bytes."""

FEW_SHOT_SEED = 1234
"""lm-eval's default seed of few-shot examples."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """How scores of items become a number."""

    transform: Callable[[float], float] = mean_of
    """From sum(values) / sum(weights), where weights default to 1."""
    higher_is_better: bool = True
    unit: str = ""
    """Of the number, for tables and axes."""


class Summary(NamedTuple):
    """A task's metrics."""

    metrics: dict[str, Estimate]
    groups: dict[str, dict[str, Estimate]]
    """The same for each group of items, such as a subject; empty for tasks without groups."""


class Case(NamedTuple, Generic[Item]):
    """An item with what is asked about it."""

    index: int
    """Its place in the file, from 0."""
    item: Item
    requests: tuple[Request, ...]
    group: str | None
    """A subject, or whatever else is reported by itself."""


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC, Generic[Item]):
    """A task; subclasses say which. Instances hold options only."""

    version: ClassVar[int] = 1
    """Rises when prompts or metrics change: numbers of different versions do not compare."""
    formats: ClassVar[str]
    """The files that `read` takes, for messages and documentation."""
    source: ClassVar[str]
    """The lm-eval task, or the paper, whose prompts and metrics these are."""
    metrics: ClassVar[Mapping[str, Metric]]
    takes_examples: ClassVar[bool] = True
    """Whether the task has few-shot prompts."""
    default_num_fewshot: ClassVar[int] = 0
    draws_one_more: ClassVar[bool] = False
    """Whether lm-eval draws one example more than it shows, to be able to leave the item itself out: it does where the
    task's definition has no test split."""

    files: ClassVar[Sequence[str]]
    """What the file is called in a folder that is given instead."""
    example_files: ClassVar[Sequence[str]] = ()
    """What that of few-shot examples is called there, the training split."""

    name: str

    def read(self, path: Path) -> list[Item]:
        """Items of a file or folder. Raises ConfigError with file, line and field for a malformed one."""
        return self.read_file(find_file(path, self.files, self.name))

    def read_examples(self, path: Path) -> list[Item] | None:
        """Items for few-shot prompts that lie in the folder of the task's own files; None if there are none."""
        found = find_in_folder(path, self.example_files, self.name)
        return None if found is None else self.read_file(found)

    def read_file(self, file: Path) -> list[Item]:
        """Items of one file."""
        return [self.read_item(record) for record in read_records(file)]

    def read_item(self, record: Record) -> Item:
        """An item of a line of JSON."""
        raise NotImplementedError

    @abc.abstractmethod
    def requests(self, item: Item, prefix: str = "") -> tuple[Request, ...]:
        """What is asked about an item.

        Args:
          prefix: precedes the context: description and examples, each ending in a blank line.
        """

    @abc.abstractmethod
    def score(self, item: Item, results: Sequence[Any]) -> dict[str, Score]:
        """The item's share of each metric, from the results of its requests."""

    def example(self, item: Item) -> str:
        """An item with its answer, as part of a few-shot prompt; ends in a blank line."""
        raise NotImplementedError

    def description(self, item: Item) -> str:
        """What precedes the examples."""
        return ""

    def group(self, item: Item) -> str | None:
        """The group that an item is reported in, besides all."""
        return None

    def choose_examples(
        self, item: Item, pool: Sequence[Item], num: int, generator: random.Random, *, is_own: bool
    ) -> list[Item]:
        """Examples for an item, drawn as lm-eval 0.4 draws them; called for one item after another.

        Args:
          is_own: the pool are the items themselves, of which this one must not be shown.
        """
        if not (is_own or self.draws_one_more):
            return generator.sample(list(pool), num)
        chosen = [each for each in generator.sample(list(pool), num + 1) if each != item][:num]
        return chosen if len(chosen) == num else generator.sample([each for each in pool if each != item], num)

    def aggregate(self, scores: Sequence[Mapping[str, Score]], groups: Sequence[str | None] = ()) -> Summary:
        """Metrics of all items, at least one, and of groups.

        Args:
          groups: of each item; empty if there are none.
        """
        names = [str(group) for group in groups] if any(group is not None for group in groups) else None
        whole = {name: self._estimate(name, scores, names) for name in self.metrics}
        members: dict[str, list[Mapping[str, Score]]] = {}
        for name, score in zip(names or (), scores, strict=names is not None):
            members.setdefault(name, []).append(score)
        parts = {group: {name: self._estimate(name, own) for name in self.metrics} for group, own in members.items()}
        return Summary(whole, dict(sorted(parts.items())))

    def _estimate(
        self, name: str, scores: Sequence[Mapping[str, Score]], groups: Sequence[str] | None = None
    ) -> Estimate:
        own = [score[name] for score in scores]
        values = [float(each[0] if isinstance(each, Sequence) else each) for each in own]
        weights = [float(each[1]) for each in own if isinstance(each, Sequence)]
        return estimate(values, weights or None, self.metrics[name].transform, groups=groups)


def make_cases(
    task: Task[Item],
    path: Path,
    *,
    num_fewshot: int | None = None,
    examples: Path | None = None,
    seed: int = FEW_SHOT_SEED,
    limit: int | None = None,
) -> list[Case[Item]]:
    """A task's items with their requests, of files that are wholly read and checked.

    Args:
      num_fewshot: examples in each prompt; None takes the task's own default.
      examples: file or folder of the few-shot examples; None: of the task's folder, else of the items themselves, of
        which each is then left out of its own prompt.
      seed: of the choice of examples.
      limit: only the first items; None takes all.

    Raises:
      ConfigError: a file that is missing, malformed or empty; more examples than there are, or a file of
        examples where prompts have none.
    """
    num = task.default_num_fewshot if num_fewshot is None else num_fewshot
    require_whole("num_fewshot", num, 0)
    if limit is not None:
        require_whole("limit", limit, 1)
    if num and not task.takes_examples:
        raise ConfigError(f"num_fewshot = {num}: {task.name} has no few-shot prompts; leave it at 0")
    if examples is not None and not num:
        remedy = "give num_fewshot, too, or leave them out" if task.takes_examples else "leave them out"
        raise ConfigError(f"examples = {str(examples)!r}: prompts of {task.name} have no examples; {remedy}")
    items = task.read(path)
    if not items:
        raise ConfigError(f"tasks: {task.name} = {str(path)!r}: holds no items; {task.name} reads {task.formats}")
    pool: list[Item] = []
    is_own = False
    if num:
        own = task.read(examples) if examples is not None else task.read_examples(path)
        pool, is_own = (items, True) if own is None else (own, False)
        required = num + (is_own or task.draws_one_more)
        if len(pool) < required:
            raise ConfigError(f"num_fewshot = {num}: {task.name} has {len(pool)} examples to draw from; give more")
    generator = random.Random(seed)
    cases = []
    for index, item in enumerate(items[:limit]):
        chosen = task.choose_examples(item, pool, num, generator, is_own=is_own) if num else []
        prefix = task.description(item) + "".join(map(task.example, chosen))
        cases.append(Case(index, item, task.requests(item, prefix), task.group(item)))
    return cases
