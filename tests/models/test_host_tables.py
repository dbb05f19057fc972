"""Tables by token in the host's memory give the same numbers, and their rows alone are fetched."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.bench.random_model import random_model as random_bench_model
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.inference.state.state_file import parameters_digest
from rwkv_jax.models.decoding import fetched_bytes, unstacked, with_host_tables
from rwkv_jax.models.folded_tables import with_folded_tables
from rwkv_jax.models.host_tables import HostTable
from rwkv_jax.weights.pretrained import from_pretrained, save_pretrained
from rwkv_jax.weights.quantized import WeightsError
from tests.golden import QUICK
from tests.inference.models import CONFIGS, GREEDY, quick_engine, random_model
from tests.models.parameters import table_row
from tests.models.small_models import TOKENS


def logits(model: Any) -> Any:
    graphdef, params = nnx.split(model, nnx.Param)
    program = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0], compiler_options=QUICK)
    return np.asarray(program(params, TOKENS))


@pytest.mark.parametrize("generation", [name for name, config in CONFIGS.items() if table_row(config)])
def test_numbers_are_those_of_tables_on_the_device(generation: str) -> None:
    model = random_model(CONFIGS[generation])
    on_host = with_host_tables(model)
    # What is read from the host is what was on the device, bit for bit.
    folded = with_folded_tables(model) if model.config.spec.table_maps else model
    expected = logits(folded)
    np.testing.assert_array_equal(logits(on_host), expected)
    np.testing.assert_allclose(logits(unstacked(on_host)), expected, rtol=0, atol=1e-5)
    config = model.config
    assert fetched_bytes(on_host) == 4 * config.num_layers * table_row(config)


def test_nothing_of_a_table_is_on_the_device() -> None:
    model = random_model(CONFIGS["7b"])
    own, on_host = (
        sum(x.nbytes for x in jax.tree.leaves(nnx.state(x, nnx.Param))) for x in (model, with_host_tables(model))
    )
    config = model.config
    rows = 4 * config.num_layers * config.spec.table_row(config)
    # Also without the matrices that were folded in; a number and a checksum are in place of each table.
    assert own - on_host == rows * (config.vocab_size + config.width) - 3 * config.num_layers * 12


def test_an_engine_writes_the_same_text() -> None:
    model = random_model(CONFIGS["7b"])
    texts = []
    for own in (model, with_host_tables(model)):
        with quick_engine(own, fresh=True, num_slots=2) as engine:
            texts.append(engine.generate((5, 6, 7), max_tokens=12, sampling=GREEDY).ids)
    assert texts[0] == texts[1]


def test_of_a_file_they_are_never_on_the_device(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS["7b"])
    save_pretrained(model, tmp_path / "x.safetensors")
    placed: list[tuple[int, ...]] = []
    place = jax.make_array_from_callback

    def noted(shape: tuple[int, ...], *others: Any) -> Any:
        placed.append(shape)
        return place(shape, *others)

    monkeypatch.setattr(jax, "make_array_from_callback", noted)
    loaded = from_pretrained(tmp_path / "x.safetensors", context_length=640, tables="host")
    vocab_size, width = model.config.vocab_size, model.config.width
    assert [shape for shape in placed if vocab_size in shape[:2]] == [(vocab_size, width)] * 2  # emb and head
    np.testing.assert_array_equal(logits(loaded), logits(with_host_tables(model)))
    digests = [parameters_digest(nnx.to_pure_dict(nnx.state(x, nnx.Param))) for x in (loaded, with_host_tables(model))]
    assert digests[0] == digests[1]
    with pytest.raises(WeightsError, match="tables = 'ram': must be one of device, folded, host"):
        from_pretrained(tmp_path / "x.safetensors", tables="ram")  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightsError, match="tables = 'folded': tables are packed by quantize = 'int8'"):
        from_pretrained(tmp_path / "x.safetensors", tables="folded", quantize="int8")


@pytest.mark.parametrize(("tables", "reason"), [("folded", "adds nothing to rows"), ("host", "has no tables by token")])
def test_without_tables_nothing_is_loaded(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, tables: Any, reason: str
) -> None:
    save_pretrained(random_model(CONFIGS["7"]), tmp_path / "x.safetensors")
    monkeypatch.setattr("rwkv_jax.weights.pretrained.place_params", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(ConfigError, match=f"tables = '{tables}': RWKV-7 {reason}.*; leave it out"):
        from_pretrained(tmp_path / "x.safetensors", tables=tables)


def test_models_with_other_rows_have_other_checksums() -> None:
    model = with_host_tables(random_model(CONFIGS["7a"]))
    first = model.first_block.ffn.s_emb.weight[...]
    assert isinstance(first, HostTable)
    stacked = model.blocks.ffn.s_emb.weight[...]
    assert not np.array_equal(first.checksum, stacked[0].checksum)


def test_what_has_no_host_tables(tmp_path: Any) -> None:
    packed = random_bench_model(ModelConfig("7a", vocab_size=64, num_layers=2, width=64, head_dim=32), "int8")
    with pytest.raises(ConfigError, match=r"^tables = 'host': the tables are quantized; load the model without"):
        with_host_tables(packed)
    with pytest.raises(ConfigError, match=r"^tables = 'host': RWKV-7 has no tables by token"):
        with_host_tables(random_model(CONFIGS["7"]))
    with pytest.raises(WeightsError, match=r"tables are in the host's memory; .* without tables='host'"):
        save_pretrained(with_host_tables(random_model(CONFIGS["7a"])), tmp_path / "x.safetensors")
