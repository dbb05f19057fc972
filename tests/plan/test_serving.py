"""What a server keeps on its device, in closed form: as many bytes as the real arrays have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from rwkv_jax.cli import parse_plan
from rwkv_jax.cli.plan_serve import PlanServe
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.plan.serving import Format, describe_server, slot_bytes, state_bytes
from rwkv_jax.weights.official import official_tensors
from rwkv_jax.weights.pretrained import save_pretrained
from rwkv_jax.weights.quantized import QUANTIZATIONS, Quantization, packed_bytes, place_quantized_params
from tests.inference.models import CONFIGS, Stepped, random_model
from tests.models.parameters import table_row

WIDE = ModelConfig(vocab_size=96, num_layers=2, width=64, head_dim=32)


def num_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("generation", CONFIGS)
def test_states_and_slots(generation: str) -> None:
    for dtype in ("float32", "bfloat16") if generation in ("6", "transformer") else ("float32",):
        config = dataclasses.replace(CONFIGS[generation], dtype=dtype)
        scheduler = Stepped(random_model(config), num_slots=3).scheduler
        assert state_bytes(config) == scheduler.state_bytes
        slots = scheduler.slots
        assert 3 * slot_bytes(config) == num_bytes((slots._slots, slots._burst_start))


@pytest.mark.parametrize("generation", CONFIGS)
def test_weights(generation: str) -> None:
    config = CONFIGS[generation]
    assert 4 * config.num_parameters() == num_bytes(nnx.state(random_model(config), nnx.Param))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_packed_weights(quantization: Quantization) -> None:
    params = nnx.state(random_model(WIDE), nnx.Param)
    packed = place_quantized_params(official_tensors(WIDE, nnx.to_pure_dict(params)), WIDE, quantization)
    assert packed_bytes(WIDE, quantization) == num_bytes(packed)


@pytest.mark.parametrize("generation", CONFIGS)
def test_tables_by_token(generation: str) -> None:
    config = CONFIGS[generation]
    formats = {"--dtype bfloat16": Format(2**30, dataclasses.replace(config, dtype="bfloat16"))}
    text = describe_server(formats, num_slots=2, prefix_bytes=0, memory=None)
    row = table_row(config) * config.num_layers * 2
    assert ("tables by token" in text) == (row > 0) == (config.spec.table_row(config) > 0)
    if row:
        assert f"{config.vocab_size * row / 2**20:,.2f} MiB are tables by token" in text
        assert f"a token fetches {row / 1024:,.1f} KiB" in text


def test_what_a_device_holds() -> None:
    formats = {"as trained": Format(2**30, WIDE)}
    lines = describe_server(formats, num_slots=2, prefix_bytes=2**29, memory=2).splitlines()
    assert lines[0].endswith("2 slots, a prefix cache of 512.00 MiB")
    assert lines[2].endswith("slots in 2 GiB")
    assert lines[3].split()[-1] == str(2**29 // slot_bytes(WIDE))
    (none,) = describe_server(formats, num_slots=2, prefix_bytes=2**29, memory=1).splitlines()[3:4]
    assert none.split()[-1] == "0"


def test_a_config_file_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "rwkv7_0_1b.py"
    parse_plan([str(recipe), "--serve", "--slots", "4"]).run()
    shown = capsys.readouterr().out
    assert "RWKV-7, 12 layers of width 768, vocabulary 65536; 4 slots" in shown
    assert [line.split("  ")[1] for line in shown.splitlines()[3:9]] == [
        "as trained",
        "--dtype float32",
        "--dtype bfloat16",
        *(f"--quantize {name}" for name in QUANTIZATIONS),
    ]
    save_pretrained(random_model(CONFIGS["7"]), tmp_path / "tiny.safetensors")
    plan = parse_plan(["--serve", str(tmp_path / "tiny.safetensors"), "--memory", "1"])
    assert isinstance(plan, PlanServe)
    plan.run()
    assert "--dtype bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--slots", "0"), "slots = 0"), (("--memory", "nan"), "memory = nan: must be a number of GiB")],
)
def test_sizes_that_cannot_be(flags: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_plan(["none.py", "--serve", *flags]).run()
