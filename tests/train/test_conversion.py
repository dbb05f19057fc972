"""A Transformer converted into RWKV-7 in stages: copied, aligned, distilled, and trained on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax import from_pretrained
from rwkv_jax.config import ConfigError, DistillationConfig, ModelConfig, TrainConfig, student_of
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.rwkv7 import TimeMix
from rwkv_jax.models.stacks import is_stack, stacked_layers
from rwkv_jax.run_folder import load_run_tokenizer
from rwkv_jax.training import teacher as teacher_module
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.copying import check_copy, copied_params
from rwkv_jax.training.functions import make_train_functions
from rwkv_jax.training.loop import train
from rwkv_jax.training.partition import split_params
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.step import loss_and_gradients
from rwkv_jax.training.tuned import new_state
from rwkv_jax.weights.hugging_face import read_hub_config
from rwkv_jax.weights.official import named_tensors
from rwkv_jax.weights.sources import Weights
from rwkv_jax.weights.tensors import BFLOAT16, MappedTensors
from tests.golden import QUICK, relative_error
from tests.models.parameters import abstract, merge, random_params, to_official
from tests.small_runs import assert_same_bits, small_config
from tests.weights.hub_folders import LLAMA3, write_hub_folder

TEACHER = ModelConfig(
    architecture="transformer", vocab_size=300, num_layers=3, width=32, head_dim=16, ffn_width=64, context_length=64
)
STUDENT = dataclasses.replace(student_of(TEACHER, (0, 2)), decay_rank=9)
HYBRID = dataclasses.replace(student_of(TEACHER, (1,)), decay_rank=9)
"""A teacher whose layer 1 has time mixing already; in its student it is one array with layer 2."""
PAIRS = {"transformer": (TEACHER, STUDENT), "hybrid": (HYBRID, student_of(HYBRID))}
"""Teachers, which have attention in layers 0 and 2, and students, which have time mixing there."""

each_pair = pytest.mark.parametrize(("teacher_config", "model"), list(PAIRS.values()), ids=list(PAIRS))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The config of a Transformer's run that has ended."""
    config = small_config(TEACHER, tmp_path_factory.mktemp("teacher"))
    train(config)
    return config


def stage(taught: TrainConfig, name: str, objective: Any, model: ModelConfig = STUDENT, **fields: Any) -> TrainConfig:
    """The config of a student's run."""
    copy = fields.pop("copy", False)
    teacher = None if objective == "next_token" else taught.run_dir
    return dataclasses.replace(
        taught,
        run_dir=str(Path(taught.run_dir).parent / name),
        model=model,
        data=dataclasses.replace(taught.data, tokenizer=taught.run_dir),
        distillation=DistillationConfig(teacher, copy=copy),
        training=dataclasses.replace(taught.training, objective=objective, num_steps=8, **fields.pop("training", {})),
        optimizer=dataclasses.replace(taught.optimizer, learning_rate=3e-3, final_learning_rate=3e-3),
        **fields,
    )


def teach(monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> None:
    """Puts a random model of a config in the place of the run that teaches."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_params(config, 1))
    found = Weights(named_tensors(config, params), "official", lambda: None, MappedTensors({}, []), config)
    monkeypatch.setattr(teacher_module, "read_model", lambda *_: (config, "float32"))
    monkeypatch.setattr(teacher_module, "_open", lambda source: found)


@each_pair
def test_a_student_begins_as_its_teacher(
    taught: TrainConfig, monkeypatch: pytest.MonkeyPatch, teacher_config: ModelConfig, model: ModelConfig
) -> None:
    if teacher_config != TEACHER:
        teach(monkeypatch, teacher_config)
    config = stage(taught, "copied", "align", model, copy=True)
    params = new_state(config, make_train_functions(config), load_run_tokenizer(Path(taught.run_dir))).params
    teacher = params.pop("teacher")
    for part in ("emb", "ln_out", "head"):
        assert_same_bits(params[part], teacher[part])

    def layer(params: Any, number: int) -> Any:
        if number == 0:
            return params["first_block"]
        layers = {name: stacked_layers(name, 3) for name in params if is_stack(name)}
        name = next(name for name in layers if number in layers[name])
        return jax.tree.map(lambda x: x[layers[name].index(number)], params[name])

    for number in range(3):
        own, its = layer(params, number), layer(teacher, number)
        for name in ("ln1", "ln2", "ffn"):
            assert_same_bits(own[name], its[name])
        if number == 1:
            assert_same_bits(own["att"], its["att"])
            continue
        att = own["att"]
        for mine, theirs in {"receptance": "query", "key": "key", "value": "value", "output": "output"}.items():
            assert_same_bits(att[mine], its["att"][theirs])
        for name in (*(f"x_{x}" for x in "rwkvag"), "k_a", "r_k", "w1", "a1", "g1"):
            assert not np.any(att[name]), name
        gate = jax.nn.sigmoid(0.0) * jnp.sum(att["g2"], axis=0)
        np.testing.assert_allclose(gate, np.ones(32), rtol=0, atol=1e-6)
        assert np.ptp(np.asarray(att["g2"]), axis=0).min() > 1e-3  # rows differ, or they would learn alike
        decay = np.exp(-math.exp(-0.5) * np.asarray(jax.nn.sigmoid(att["w0"])))
        assert 0.98 < decay.min() < decay.max() < 1
        assert ("v0" in att) == (number > 0)
        if number:
            assert np.all(jax.nn.sigmoid(att["v0"]) < 0.01)


def test_heads_that_queries_share_are_repeated() -> None:
    """Of a Llama, whose norms of queries and biases time mixing does not have."""
    llama = ModelConfig(
        architecture="llama",
        vocab_size=40,
        num_layers=3,
        width=32,
        head_dim=8,
        kv_heads=2,
        qkv_bias=True,
        qk_norm=True,
        tied_head=True,
    )
    student = student_of(llama)
    check_copy(llama, student, "x")
    teacher = to_official(llama, random_params(llama))
    drawn = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract(student)[1])
    where = jax.tree.map(lambda x: x.sharding, drawn)
    found = to_official(student, copied_params(teacher, student, drawn, where))
    assert not {"head.weight", "blocks.1.att.key.bias"} & set(found)
    for name in ("emb.weight", "ln_out.weight", "blocks.2.ffn.gate.weight", "blocks.1.ln2.weight"):
        np.testing.assert_array_equal(found[name], teacher[name].astype(np.float32))
    for layer in range(3):
        of_layer = f"blocks.{layer}.att."
        for name in ("key", "value"):
            own = found[f"{of_layer}{name}.weight"].reshape(4, 8, 32)
            its = teacher[f"{of_layer}{name}.weight"].astype(np.float32).reshape(2, 8, 32)
            np.testing.assert_array_equal(own, its[[0, 0, 1, 1]])
        np.testing.assert_array_equal(
            found[f"{of_layer}receptance.weight"], teacher[f"{of_layer}query.weight"].astype(np.float32)
        )


def test_what_does_not_fit_the_teacher_is_refused_with_the_flags_that_do(taught: TrainConfig) -> None:
    wider = dataclasses.replace(STUDENT, ffn_width=96, num_layers=4)
    with pytest.raises(
        ConfigError, match=r"model.num_layers = 4 here and 3 there, model.ffn_width = 96 here and 64"
    ) as e:
        make_train_functions(stage(taught, "no", "distill", wider, copy=True))
    assert str(e.value).endswith("--model.num-layers 3 --model.ffn-width 64")
    with pytest.raises(ConfigError, match=r"its layers 0 have time mixing.*: --model.rwkv-layers 0 2$"):
        check_copy(student_of(TEACHER, (0,)), student_of(TEACHER, (2,)), "x")
    with pytest.raises(ConfigError, match=r"model.decay_rank = 9 here and 32 there; .* --model.decay-rank 32$"):
        check_copy(student_of(TEACHER, (0,)), STUDENT, "x")
    with pytest.raises(ConfigError, match=r"model.rwkv_layers: no layer of the student has time mixing where"):
        make_train_functions(stage(taught, "no", "align", TEACHER))
    with pytest.raises(
        ConfigError, match=r"model.width = 64: the layers of the teacher are aligned .* --model.width 32"
    ):
        make_train_functions(stage(taught, "no", "align", dataclasses.replace(STUDENT, width=64)))
    with pytest.raises(ConfigError, match=r"distillation.copy = True: .* initial_weights names others"):
        stage(taught, "no", "distill", copy=True, initial_weights=taught.run_dir)
    with pytest.raises(ConfigError, match=r"distillation.copy = True: training.objective = 'next_token' does not read"):
        stage(taught, "no", "next_token", copy=True)
    with pytest.raises(ConfigError, match=r"rwkv_layers = 0 2 here and  there; .* --model.rwkv-layers$"):
        train(stage(taught, "no", "next_token", initial_weights=taught.run_dir))


@pytest.mark.long  # each objective has runs of its own
def test_stages_follow_each_other(taught: TrainConfig) -> None:
    """Each begins where the one before ended; alignment trains mixers alone, and goes on bit for bit."""
    config = stage(taught, "s1", "align", copy=True)
    first = new_state(config, make_train_functions(config), load_run_tokenizer(Path(taught.run_dir))).params
    half = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=4))
    train(half)
    aligned = train(config).state.params
    for part in ("emb", "ln_out", "head", "blocks_1_1"):
        assert_same_bits(aligned[part], first[part])
    assert_same_bits(aligned["first_block"]["ffn"], first["first_block"]["ffn"])
    assert np.any(aligned["first_block"]["att"]["x_r"] != 0)
    records = [record for record in read_metrics(Path(config.run_dir) / "metrics.jsonl") if record["kind"] == "train"]
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert "bits_per_byte" not in records[0]  # its loss is a distance
    assert records[0]["loss"] == pytest.approx((records[0]["layer_0"] + records[0]["layer_2"]) / 2, rel=1e-5)

    distilled = stage(taught, "s2", "distill", initial_weights=config.run_dir)
    train(distilled)
    last = stage(taught, "s3", "next_token", initial_weights=distilled.run_dir, training={"sequence_length": 64})
    result = train(last)
    assert result.held_out is not None
    student = from_pretrained(last.run_dir)
    assert student.config.rwkv_layers == (0, 2)
    np.testing.assert_array_equal(student.emb.weight[...], result.state.params["emb"]["weight"])


@pytest.mark.long
def test_a_folder_of_hugging_face_is_converted(tmp_path: Path) -> None:
    """Its bfloat16 shards, with heads that queries share, teach a hybrid by bytes."""
    write_hub_folder(tmp_path / "hub", LLAMA3 | {"vocab_size": 257}, dtype=BFLOAT16, max_bytes=20_000)
    teacher = from_pretrained(tmp_path / "hub")
    model = student_of(read_hub_config(tmp_path / "hub" / "config.json"), (0, 2))
    config = small_config(model, tmp_path)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer="bytes"),
        distillation=DistillationConfig(str(tmp_path / "hub"), copy=True),
        training=dataclasses.replace(config.training, objective="align", num_steps=1),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0),
        evaluation=dataclasses.replace(config.evaluation, sample_prompts=()),
    )
    aligned = train(config).state.params
    assert_same_bits(aligned["head"]["weight"], teacher.head.weight[...].astype("float32"))
    distilled = dataclasses.replace(
        config,
        run_dir=str(tmp_path / "distilled"),
        initial_weights=config.run_dir,
        distillation=DistillationConfig(str(tmp_path / "hub")),
        training=dataclasses.replace(config.training, objective="distill"),
    )
    params = train(distilled).state.params
    assert np.any(params["head"]["weight"] != aligned["head"]["weight"])
    for run, name in ((config, "layer_2"), (distilled, "kl")):
        (record,) = [x for x in read_metrics(Path(run.run_dir) / "metrics.jsonl") if x["kind"] == "train"]
        assert math.isfinite(record["loss"])
        assert record[name] > 0
    assert from_pretrained(distilled.run_dir).config.rwkv_layers == (0, 2)


@each_pair
def test_the_loss_of_alignment_is_its_formula(
    float64: None,
    taught: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    teacher_config: ModelConfig,
    model: ModelConfig,
) -> None:
    """And its gradient, in float64: each layer on the teacher's own residual stream."""
    if teacher_config != TEACHER:
        teach(monkeypatch, teacher_config)
    model = dataclasses.replace(model, dtype="float64")
    config = stage(taught, "formula", "align", model, training={"batch_size": 2, "sequence_length": 12})
    trainer = make_train_functions(config)
    own, teacher_config = random_params(model), dataclasses.replace(teacher_config, dtype="float64")
    params = jax.tree.map(jnp.asarray, {**own, "teacher": random_params(teacher_config, 1)})
    rows = np.random.default_rng(3).integers(1, 300, (2, 13)).astype(np.int32)
    rows[1, 5] = 0
    mask = np.random.default_rng(4).integers(0, 2, (2, 12)).astype(np.float32)
    batch = make_batch(rows, end_of_text=0, mask=mask)
    context = SequenceContext(batch.segment_ids)
    trained, frozen = split_params(params, trainer.partition)
    assert {path[1].key for path, _ in jax.tree.leaves_with_path(trained)} == {"att"}
    assert set(trained) == {"first_block", "blocks" if teacher_config.rwkv_layers else "blocks_2_2"}

    def mixed(block: Any, x: jax.Array, v_first: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """What a layer's mixer gives, and the values of layer 0."""
        y = block.ln1(x)
        if isinstance(block.att, TimeMix):
            state = block.att.initial_state(2)
            found = block.att.mix_with_residual(y, state=state, v_first=v_first, context=context)
            return found.y, found.v_first if v_first is None else v_first
        return block.att.mix(y, state=None, context=context).y, block.att.values(y) if v_first is None else v_first

    def formula(trained: Any) -> jax.Array:
        student: Any = merge(model, {**own, **{name: {**own[name], **part} for name, part in trained.items()}})
        teacher: Any = merge(teacher_config, params["teacher"])
        x, own_first, its_first, losses = teacher.emb(batch.tokens, "float64"), None, None, []
        for number in range(3):
            block, other = teacher.block(number), student.block(number)
            expected, its_first = mixed(block, x, its_first)
            found, own_first = mixed(other, x, own_first)
            if number in (0, 2):
                distance = jnp.sqrt(jnp.sum((found - expected) ** 2, axis=-1))
                losses.append(jnp.sum(distance * mask) / mask.sum())
            x = x + expected
            x = x + block.ffn(block.ln2(x))
        return jnp.mean(jnp.stack(losses))

    def by_objective(trained: Any) -> Any:
        return loss_and_gradients(trained, frozen, batch, None, trainer.objective, trainer.sharded)

    (loss, _), gradients, _ = jax.jit(by_objective, compiler_options=QUICK)(trained)
    expected, by_formula = jax.jit(jax.value_and_grad(formula), compiler_options=QUICK)(trained)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)  # reported in float32
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(by_formula), strict=True):
        assert relative_error(x, y) < 1e-6


def test_alignment_leaves_the_mixers_that_the_teacher_has_as_they_are(
    taught: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay, too, which needs no gradient."""
    teacher_config, model = PAIRS["hybrid"]
    teach(monkeypatch, teacher_config)
    trainer = make_train_functions(stage(taught, "kept", "align", model))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_params(model))
    trained, _ = split_params(params, trainer.partition)
    state = trainer.optimizer.init(trained)
    updates, _ = trainer.optimizer.update(jax.tree.map(jnp.ones_like, trained), state, trained)
    after: Any = optax.apply_updates(trained, updates)
    assert_same_bits(*(jax.tree.map(lambda x: x[0], tree["blocks"]) for tree in (after, trained)))  # layer 1
    for name, x in after["blocks"]["att"].items():
        before = trained["blocks"]["att"][name]
        for now, was in zip(jax.tree.leaves(x), jax.tree.leaves(before), strict=True):
            assert np.any(now[1] != was[1]), name
    assert np.any(after["first_block"]["att"]["x_r"] != trained["first_block"]["att"]["x_r"])


def test_a_run_of_any_architecture_begins_with_another_one(taught: TrainConfig) -> None:
    config = stage(taught, "again", "next_token", TEACHER, initial_weights=taught.run_dir)
    state = new_state(config, make_train_functions(config), load_run_tokenizer(Path(taught.run_dir)))
    trained = from_pretrained(taught.run_dir)
    np.testing.assert_array_equal(state.params["head"]["weight"], trained.head.weight[...])
    assert set(abstract(TEACHER)[1]) == set(state.params)
