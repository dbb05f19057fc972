"""How configs name tasks, and what is refused before anything is drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from rwkv_jax.config import ConfigError, DataConfig, EvaluationConfig, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.config.parallel import ParallelConfig
from rwkv_jax.data.synthetic.recall import MQAR, Recall
from rwkv_jax.data.synthetic.source import SyntheticCorpus, synthetic_rows, task_of
from rwkv_jax.data.synthetic.state_tracking import Parity, WordProblem
from rwkv_jax.data.synthetic.task import Task
from rwkv_jax.data.synthetic.tasks import TASKS, parse_task


def config_of(source: str, **others: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "data": DataConfig(source=source),
            "model": ModelConfig(vocab_size=121, num_layers=2, width=32, head_dim=16),
            "training": StepConfig(batch_size=4, sequence_length=32),
        }
        | others
    )


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("synthetic:parity", Parity()),
        ("synthetic: parity( ) ", Parity()),
        ("synthetic:mqar(num_pairs=2, power=0.5, show_answers=False)", MQAR(2, power=0.5, show_answers=False)),
        ("synthetic:mqar(power=1)", MQAR(power=1)),
        ("synthetic:recall(distances=(8, 64))", Recall(distances=(8, 64))),
        ("synthetic:recall(distances=[8])", Recall(distances=(8,))),
        ('synthetic:word_problem(items=3, inputs="all")', WordProblem(3, "all")),
    ],
)
def test_a_source_names_a_task(source: str, task: Task) -> None:
    assert parse_task(source) == task


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_named_as_it_is_written(name: str) -> None:
    task = TASKS[name]()
    assert parse_task(f"synthetic:{task}") == task
    assert all(field.name in str(task) for field in dataclasses.fields(task))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("synthetic:mqra", "task = 'mqra': no such task; did you mean mqar\\? there are mqar, recall, "),
        ("synthetic:zzz", "task = 'zzz': no such task; there are mqar, "),
        (
            "synthetic:mqar(pairs=4)",
            "field of mqar = 'pairs': no such field; did you mean num_pairs\\? there are num_pairs, ",
        ),
        ("synthetic:parity(bits=4)", "field of parity = 'bits': no such field; there are none"),
        ("synthetic:", "write synthetic:NAME"),
        ("synthetic:mqar(4)", "write synthetic:NAME"),
        ("synthetic:mqar(**{})", "write synthetic:NAME"),
        ("synthetic:mqar(num_pairs=2+2)", "write synthetic:NAME"),
        ("synthetic:mqar(num_pairs=open('x'))", "write synthetic:NAME"),
        ("synthetic:__import__('os').system('true')", "write synthetic:NAME"),
        ("synthetic:mqar(num_pairs=1, num_pairs=2)", "write synthetic:NAME"),
        ("synthetic:mqar(" + "(" * 500, "write synthetic:NAME"),
        ("synthetic:mqar(\0)", "write synthetic:NAME"),
    ],
)
def test_what_names_no_task_is_refused_with_the_nearest(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data.source = .*: {message}"):
        parse_task(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mqar(num_pairs=0)", "mqar.num_pairs = 0: must be at least 1"),
        ("mqar(num_pairs='4')", "mqar.num_pairs = '4': must be a whole number"),
        ("mqar(num_pairs=True)", "mqar.num_pairs = True: must be a whole number"),
        ("mqar(num_pairs=8, num_keys=7)", "mqar.num_keys = 7: must be at least num_pairs = 8"),
        ("mqar(power=0)", "mqar.power = 0: must be greater than zero"),
        ("mqar(power=1e999)", "mqar.power = inf: must be greater than zero"),
        ("recall(distances=())", "recall.distances = .*: give at least one"),
        ("recall(distances=(6,))", "recall.distances = .*: give at least one, each at least 7"),
        ("recall(distances=(8, 8))", "recall.distances = .*: names one twice"),
        ("recall(num_keys=4, noise=True)", "recall.noise = True: needs keys"),
        ("lookup(nums_pairs=())", "lookup.nums_pairs = .*: give at least one"),
        ("lookup(nums_pairs=(4, 4))", "lookup.nums_pairs = .*: names one twice"),
        ("lookup(num_keys=7)", "lookup.num_keys = 7: must be at least 8"),
        ("lookup(question='both')", "lookup.question = 'both': must be 'first', 'last' or 'either'"),
        ("facts(num_values=0)", "facts.num_values = 0"),
        ("facts(power=-1)", "facts.power = -1"),
        ("facts(ranks=(3,))", "facts.ranks = .*: must be two ascending ranks"),
        ("facts(num_facts=8, ranks=(4, 9))", "facts.ranks = .*: must be two ascending ranks"),
        ("needle(depth=2)", "needle.depth = 2: must lie in 0 to 1"),
        ("induction(num_symbols=0)", "induction.num_symbols = 0"),
        ("copying(count=0)", "copying.count = 0"),
        ("selective_copying(count=0)", "selective_copying.count = 0"),
        ("sorting(num_values=3, count=4)", "sorting.count = 4: must not exceed num_values = 3"),
        ("addition(digits=0)", "addition.digits = 0"),
        ("modular_addition(modulus=1)", "modular_addition.modulus = 1"),
        ("word_problem(items=7)", "word_problem.items = 7: must lie in 2 to 6"),
        ("word_problem(inputs='some')", "word_problem.inputs = 'some': must be swaps or all"),
    ],
)
def test_wrong_values_are_refused_by_field(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.source, {message}"):
        parse_task(f"synthetic:{source}")


def test_a_model_with_too_few_ids_is_refused_and_more_are_taken() -> None:
    assert task_of(config_of("synthetic:mqar")) == MQAR()
    assert task_of(config_of("text.txt")) is None
    with pytest.raises(ConfigError, match=r"^model.vocab_size = 121: mqar\(.*has 163 symbols.*set it to 163 or more"):
        task_of(config_of("synthetic:mqar(num_keys=128)"))


def test_lengths_without_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^training.sequence_length = 32: mqar\(.*at least 36"):
        task_of(config_of("synthetic:mqar(num_pairs=9)"))
    lengths = EvaluationConfig(lengths=(64, 8))
    with pytest.raises(ConfigError, match=r"^evaluation.lengths = 8: mqar\(.*at least 16"):
        task_of(config_of("synthetic:mqar", evaluation=lengths))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": DataConfig(source="x"), "evaluation": EvaluationConfig(lengths=(8,))}, "evaluation.lengths = "),
        (
            {"evaluation": EvaluationConfig(lengths=(64, 33)), "parallel": ParallelConfig(sequence=2)},
            "evaluation.lengths = .* multiples of parallel.sequence = 2",
        ),
        ({"training": StepConfig(carry_state=True)}, "training.carry_state = True: each row of synthetic:mqar"),
    ],
)
def test_runs_that_have_no_meaning_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        config_of("synthetic:mqar", **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "synthetic:mqar", "tokenizer": "world"}, "data.tokenizer = 'world': synthetic:mqar has symbols"),
        ({"source": "synthetic:mqar", "order": "official"}, "data.order = 'official': "),
        ({"mixture": (("synthetic:mqar", 1.0), ("x", 1.0)), "tokenizer": "world"}, "data.mixture = .*no part of"),
    ],
)
def test_settings_of_texts_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        DataConfig(**values)


def test_weights_need_no_tokenizer_to_start_a_run_on_symbols_from() -> None:
    assert config_of("synthetic:mqar", initial_weights="x.pth").data.tokenizer is None


def test_rows_are_functions_of_seed_part_step_and_row() -> None:
    config = config_of("synthetic:mqar")
    rows = synthetic_rows(MQAR(), config)
    whole, part = rows.read(5), rows.read(5, slice(1, 3))
    for ours, theirs in zip(whole.select(slice(1, 3)), part, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    others = [
        rows.read(6),
        synthetic_rows(MQAR(), dataclasses.replace(config, seed=1)).read(5),
        synthetic_rows(MQAR(), config, "held-out").read(5),
    ]
    assert all((other.tokens != whole.tokens).any() for other in others)
    assert synthetic_rows(MQAR(), config, length=48).read(0).tokens.shape == (4, 49)
    assert rows.row_locations(5, slice(1, 3)) == [f"{MQAR()}, row 21", f"{MQAR()}, row 22"]


def test_another_value_of_a_field_is_another_corpus() -> None:
    fingerprints = {SyntheticCorpus(task).fingerprint for task in (MQAR(), MQAR(power=0.5), Parity(), Recall())}
    assert len(fingerprints) == 4
