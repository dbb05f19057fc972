"""Tables by token with what layers add to their rows folded in give the same numbers, and need no matrix."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.bench.random_model import random_model as random_bench_model
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models.decoding import unstacked, with_host_tables
from rwkv_jax.models.folded_tables import with_folded_tables
from rwkv_jax.models.host_tables import HostTable
from rwkv_jax.tuning.adapter import Adapter, AdapterError
from rwkv_jax.tuning.grafting import adapted_model
from rwkv_jax.weights.pretrained import save_pretrained
from rwkv_jax.weights.tensors import WeightsError
from tests.golden import QUICK
from tests.inference.models import CONFIGS, GREEDY, quick_engine, random_model
from tests.models.parameters import SMALL, merge, random_params
from tests.models.small_models import TOKENS


def logits_in_calls(model: Any) -> Any:
    """Of TOKENS in calls of 3, 1 and 16, whose states follow each other."""
    graphdef, params = nnx.split(model, nnx.Param)
    call = jax.jit(lambda params, *given: nnx.merge(graphdef, params)(*given), compiler_options=QUICK)
    state, logits = model.initial_state(len(TOKENS)), []
    for begin, end in itertools.pairwise((0, 3, 4, 20)):
        of_call, state = call(params, TOKENS[:, begin:end], state)
        logits.append(of_call)
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("generation", ["7b", pytest.param("7a", marks=pytest.mark.long)])
def test_numbers_stay(float64: None, generation: str) -> None:
    config = SMALL[generation]
    model = merge(config, jax.tree.map(jnp.asarray, random_params(config)))
    expected = logits_in_calls(unstacked(model))
    for other in (unstacked(with_folded_tables(model)), with_folded_tables(unstacked(model))):
        np.testing.assert_allclose(logits_in_calls(other), expected, rtol=0, atol=1e-10)


def test_a_step_reads_no_matrix_of_them() -> None:
    model = random_model(CONFIGS["7b"])
    folded = with_folded_tables(model)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(nnx.state(each, nnx.Param))) for each in (model, folded)]
    config = model.config
    assert sizes[0] - sizes[1] == 4 * config.num_layers * config.spec.table_row(config) * config.width
    assert with_folded_tables(folded).first_block.ffn.s_emb.weight[...] is folded.first_block.ffn.s_emb.weight[...]
    assert model.first_block.ffn.s_emb_x is not None  # the given one stays as it was


def test_bfloat16_is_rounded_as_it_was() -> None:
    config = ModelConfig("7a", vocab_size=300, num_layers=2, width=64, head_dim=32, dtype="bfloat16")
    model = random_bench_model(config)
    folded = with_folded_tables(model)
    rows = folded.first_block.ffn.s_emb.weight[...]
    assert rows.dtype == jnp.bfloat16
    embedded = model.first_block.ln0(model.emb(jnp.arange(300), "bfloat16"))
    expected = model.first_block.ffn.s_emb.weight[...] + model.first_block.ffn.s_emb_x(embedded)
    rows, expected = (np.asarray(x, np.float32) for x in (rows, expected))
    assert (rows != expected).mean() < 0.02
    assert np.abs(rows - expected).max() < 2**-7 * np.abs(expected).max()


@pytest.mark.long  # test_host_tables.py has an engine with folded tables each time
def test_an_engine_writes_the_same_text() -> None:
    model = random_model(CONFIGS["7b"])
    texts = []
    for own in (model, with_folded_tables(model)):
        with quick_engine(own, fresh=True, num_slots=2) as engine:
            texts.append(engine.generate((5, 6, 7), max_tokens=12, sampling=GREEDY).ids)
    assert texts[0] == texts[1]


def test_what_has_nothing_to_fold(tmp_path: Any) -> None:
    for generation in ("7", "8-rc00"):
        with pytest.raises(ConfigError, match=r"^tables = 'folded': RWKV-.* adds nothing to rows of tables; leave it"):
            with_folded_tables(random_model(CONFIGS[generation]))
    packed = random_bench_model(ModelConfig("7a", vocab_size=64, num_layers=2, width=64, head_dim=32), "int8")
    with pytest.raises(ConfigError, match=r"^tables = 'folded': the tables are quantized; load the model without"):
        with_folded_tables(packed)
    folded = with_folded_tables(random_model(CONFIGS["7a"]))
    with pytest.raises(WeightsError, match=r"the model's tables are folded; .* without tables='folded'"):
        save_pretrained(folded, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "name",
    ["blocks.0.ln0.weight", "emb.weight", "blocks.1.ffn.s_emb_x.weight", "blocks.0.ffn.s_emb.weight"],
)
def test_adapters_of_what_was_folded_are_refused(name: str) -> None:
    model = random_model(CONFIGS["7a"])
    adapter = Adapter("lora", {}, {}, replaced={name: np.zeros(3, np.float32)})
    for form in (with_folded_tables, with_host_tables):
        with pytest.raises(AdapterError, match=rf"{name}: the adapter changes it, .* with tables = 'device'"):
            adapted_model(form(model), adapter)


def test_a_table_of_rc00_in_the_host_is_refused_to_adapters() -> None:
    model = with_host_tables(random_model(CONFIGS["8-rc00"]))
    assert isinstance(model.first_block.ffn.enn.weight[...], HostTable)
    adapter = Adapter("lora", {}, {}, replaced={"blocks.1.ffn.enn.weight": np.zeros(3, np.float32)})
    with pytest.raises(AdapterError, match=r"blocks\.1\.ffn\.enn\.weight: the adapter changes it"):
        adapted_model(model, adapter)
