"""Models in fewer bits: how near they stay, how small they are, in files and back; and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.bench.random_model import RandomTensors, random_model
from rwkv_jax.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokens.batches import evaluation_windows
from rwkv_jax.models import LanguageModel, abstract_model
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.models.packed import PackedMatrix
from rwkv_jax.training import loop
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.quantized import QUANTIZATIONS, Quantization, pack, place_quantized_params, quantization_of
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors
from rwkv_jax.weights.tensors import WeightsError
from tests.golden import QUICK, load_tiny, relative_error, tiny_model
from tests.weights.files import CONFIGS, random_tensors, tensors_in

SMALLEST_AND_LARGEST_RATIO = {"int8": (0.26, 0.30), "int4": (0.14, 0.20)}
"""Bytes of a file against those in float32."""

WIDE = {
    key: dataclasses.replace(CONFIGS[key], width=64, ffn_width=96, head_dim=16 if key != "4" else 64)
    for key in ("4", "5.2", "6", "7")
}


def source(folder: Path, config: ModelConfig, dtype: str = "float32") -> Path:
    """A file of random weights."""
    path = folder / "float.safetensors"
    write_safetensors(path, random_tensors(config, dtype))
    return path


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _logits(graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params)(tokens)[0]


def logits(model: LanguageModel, tokens: NDArray) -> NDArray:
    return np.asarray(_logits(*nnx.split(model, nnx.Param), jnp.asarray(tokens)))


def packed_names(model: LanguageModel) -> set[str]:
    leaves = jax.tree.leaves_with_path(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), is_leaf=lambda x: isinstance(x, PackedMatrix)
    )
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, x in leaves if isinstance(x, PackedMatrix)}


@pytest.mark.parametrize(
    ("key", "quantize"),
    [
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in (("5.2", "int4"), ("6", "int8"), ("6", "int4"))),
        ("4", "int8"),
        *(("7", quantize) for quantize in QUANTIZATIONS),
    ],
)
def test_a_quantized_model_is_that_of_its_rounded_weights(tmp_path: Path, key: str, quantize: Quantization) -> None:
    config = WIDE[key]
    path = source(tmp_path, config)
    model = from_pretrained(path, quantize=quantize)
    saved = tmp_path / "packed.safetensors"
    save_pretrained(model, saved)
    convert(saved, tmp_path / "rounded.safetensors", dtype="float32")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 20))
    found = logits(model, tokens)
    assert relative_error(found, logits(from_pretrained(tmp_path / "rounded.safetensors"), tokens)) < 1e-4
    assert model.config.dtype == "float32"
    # Loaded again, it is the same model; said again, the quantization is no contradiction.
    for name, again in (("again", from_pretrained(saved)), ("said", from_pretrained(saved, quantize=quantize))):
        save_pretrained(again, tmp_path / f"{name}.safetensors")
        assert (tmp_path / f"{name}.safetensors").read_bytes() == saved.read_bytes()
    np.testing.assert_array_equal(logits(from_pretrained(saved), tokens), found)


def test_vectors_and_norms_stay_in_float32(tmp_path: Path) -> None:
    model = from_pretrained(source(tmp_path, WIDE["7"], "bfloat16"), quantize="int8")
    names = packed_names(model)
    assert {"emb.weight", "head.weight", "blocks.att.key.weight", "first_block.ffn.value.weight"} <= names
    assert not any(".ln" in name or name.rsplit(".", 1)[1] in ("w0", "a0", "k_k", "r_k", "x_r") for name in names)
    assert model.blocks.att.w0[...].dtype == model.blocks.ln1.weight[...].dtype == jnp.float32


def test_low_ranks_of_a_wide_model_stay_in_float32_and_the_decays_never_has_4_bits() -> None:
    def chosen(name: str, *shape: int) -> Quantization | None:
        return quantization_of(f"blocks.1.att.{name}", shape, "int4")

    assert chosen("w1", 768, 64) is None
    assert chosen("g1", 768, 128) == "int4"
    assert chosen("g2", 128, 768) == "int4"
    assert chosen("w2", 32, 64) == chosen("time_decay_w1", 64, 64) == "int8"
    assert chosen("a2", 32, 64) == chosen("time_maa_w2", 5, 32, 64) == "int4"
    assert chosen("a2", 24, 64) == "int8"  # no groups of 32
    assert chosen("r_k", 12, 64) is None
    assert quantization_of("blocks.1.att.w2", (32, 64), "bfloat16") == "bfloat16"
    assert quantization_of("blocks.1.ffn.s1", (64, 32), "int8") is None  # beside the time mixing


def bytes_in_file(config: ModelConfig, quantize: Quantization) -> int:
    """Of all tensors, from their shapes alone."""
    total = 0
    for name, shape in official_shapes(config).items():
        held, numbers = quantization_of(name, shape, quantize), math.prod(shape)
        total += int(numbers * {None: 4, "bfloat16": 2, "int8": 1, "int4": (16 + 2) / 32}[held])
        if held is not None:
            total += 4 * numbers // (shape[-1] if name.endswith(".weight") else shape[-2])
    return total


@pytest.mark.parametrize("generation", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_files_of_a_real_size_are_as_small_as_they_should_be(generation: str, quantize: Quantization) -> None:
    config = ModelConfig(generation=generation, vocab_size=65536, num_layers=12, width=768)  # pyright: ignore[reportArgumentType]
    ratio = bytes_in_file(config, quantize) / (4 * config.num_parameters())
    smallest, largest = SMALLEST_AND_LARGEST_RATIO[quantize]
    # Without low-rank maps there is nothing but matrices, and a file can only be smaller.
    assert (smallest if generation in ("6", "7") else 0.9 * smallest) <= ratio <= largest


TRAINED = {"4v0-660K": "p1", "5v2-730K": "p1", "6v0-1m": "p4"}
"""Small trained models, and a prompt of each that is like what it was trained on."""


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_lose_little_and_their_files_shrink(tmp_path: Path, name: str) -> None:
    numbers = load_tiny(f"{name}.golden.npz")
    tokens = numbers[f"tokens_{TRAINED[name]}"]
    reference = numbers[f"nll64_{TRAINED[name]}"].mean()
    path = tmp_path / "float.safetensors"
    convert(tiny_model(f"{name}.safetensors"), path, dtype="float32")
    bounds: dict[Quantization, float] = {"int8": 0.01, "int4": 0.08}
    for quantize, bound in bounds.items():
        model = from_pretrained(path, quantize=quantize)
        log_probabilities = jax.nn.log_softmax(logits(model, tokens[None])[0])
        loss = -log_probabilities[np.arange(len(tokens) - 1), tokens[1:]].mean()
        assert abs(math.exp(loss - reference) - 1) < bound, quantize
        save_pretrained(model, tmp_path / f"{quantize}.safetensors")
        ratio = (tmp_path / f"{quantize}.safetensors").stat().st_size / path.stat().st_size
        smallest, largest = SMALLEST_AND_LARGEST_RATIO[quantize]
        assert smallest <= ratio <= largest, quantize


@pytest.mark.long
def test_a_trained_rwkv7_loses_little_too(tmp_path: Path) -> None:
    """Nobody has published a small trained one: 150 steps on the standard library, and held-out files."""
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(vocab_size=1024, num_layers=4, width=128, head_dim=64),
        data=DataConfig(source="python-stdlib", cache_dir=str(tmp_path / "cache")),
        optimizer=OptimizerConfig(learning_rate=4e-3, final_learning_rate=2e-4, warmup_steps=20),
        training=StepConfig(num_steps=150, batch_size=8, sequence_length=256),
        evaluation=EvaluationConfig(every=150, batches=8, sample_prompts=()),
    )
    loop.train(config)
    held_out = prepare_corpus(config.data, config.model.vocab_size, lambda _: None).held_out
    assert held_out is not None
    windows = list(evaluation_windows(held_out.tokens, batch_size=8, sequence_length=256, num_batches=8))

    def loss(model: LanguageModel) -> float:
        losses = []
        for tokens, mask, _ in windows:
            assert mask is not None
            log_probabilities = np.asarray(jax.nn.log_softmax(logits(model, tokens[:, :-1])))
            losses.append(-np.take_along_axis(log_probabilities, tokens[:, 1:, None], -1)[..., 0][mask > 0].mean())
        return float(np.mean(losses))

    reference = loss(from_pretrained(tmp_path / "run"))
    assert reference < 4.5  # of log(1024) = 6.9: it has learnt something
    for quantize, bound in {"bfloat16": 0.01, "int8": 0.01, "int4": 0.08}.items():
        changed = loss(from_pretrained(tmp_path / "run", quantize=quantize))  # pyright: ignore[reportArgumentType]
        assert abs(math.exp(changed - reference) - 1) < bound, quantize


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.01), ("int4", 0.08)])
def test_packing_stays_near(quantize: Quantization, bound: float) -> None:
    matrix = np.random.default_rng(0).standard_normal((256, 768)).astype(np.float32)
    matrix[3], matrix[5, 7] = 0, 30  # a row of zeros, an outlier
    parts = pack(matrix, quantize)
    codes = parts["codes"]
    if quantize == "int4":
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(int)
        codes = (codes * parts["multiplier"][..., None] + parts["offset"][..., None]).reshape(matrix.shape)
    rounded = codes * parts["scale"][:, None]
    assert relative_error(np.delete(rounded, 5, 0), np.delete(matrix, 5, 0)) < bound
    assert np.abs(rounded[3]).max() < 1e-30
    assert abs(rounded[5, 7] - 30) < 30 * bound


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in (("int8", "float32"), ("bfloat16", "float32"))),
        ("int4", "float32"),
        (None, "bfloat16"),
    ],
)
def test_decoding_a_single_text_writes_neither_embedding_nor_head_out(
    quantize: Quantization | None, dtype: Any
) -> None:
    config = ModelConfig(vocab_size=8192, num_layers=2, width=256, dtype=dtype)
    model = unstacked(random_model(config, quantize))
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def decode(params: nnx.State, token: jax.Array, state: Any) -> Any:
        def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], None]:
            logits, state = nnx.merge(graphdef, params)(carry[0], carry[1])
            return (jnp.argmax(logits, -1).astype(jnp.int32), state), None

        return jax.lax.scan(step, (token, state), None, length=4)[0]

    program = decode.lower(params, jnp.zeros((1, 1), jnp.int32), model.initial_state(1)).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * config.vocab_size * config.width  # half a matrix in float32


# What is refused


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    path = source(tmp_path, WIDE["7"])
    with pytest.raises(WeightsError, match=r"quantize = 'int2': must be None or one of int8, int4, bfloat16"):
        from_pretrained(path, quantize="int2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightsError, match="does not go with dtype = 'float64'"):
        from_pretrained(path, quantize="int8", dtype="float64")
    with pytest.raises(WeightsError, match="packed matrices are on one device"):
        from_pretrained(path, quantize="int8", mesh=jax.make_mesh((1,), ("x",)))
    model = from_pretrained(path, quantize="int8")
    save_pretrained(model, tmp_path / "packed.safetensors")
    with pytest.raises(WeightsError, match=r"packed\.safetensors: quantize = 'int4': the file is int8 already"):
        from_pretrained(tmp_path / "packed.safetensors", quantize="int4")
    for target, options in (("a.pth", {}), ("a", {"layout": "flash-linear-attention"}), ("a", {"dtype": "float32"})):
        with pytest.raises(WeightsError, match="packed matrices are written as they are"):
            save_pretrained(model, tmp_path / target, **options)  # pyright: ignore[reportArgumentType]
        assert not (tmp_path / target).exists()


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    tensors = random_tensors(WIDE["7"])
    tensors["blocks.1.att.key.weight"][3, 4] = np.inf
    write_safetensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"blocks\.1\.att\.key\.weight: has numbers that are not finite"):
        from_pretrained(tmp_path / "bad.safetensors", quantize="int4")


def test_damaged_packed_files_are_refused_by_name(tmp_path: Path) -> None:
    save_pretrained(from_pretrained(source(tmp_path, WIDE["7"]), quantize="int4"), tmp_path / "packed.safetensors")
    whole = dict(tensors_in_file(tmp_path / "packed.safetensors"))
    head = "head.weight"

    def refused(change: dict[str, NDArray | None], message: str) -> None:
        changed = {name: x for name, x in (whole | change).items() if x is not None}
        path = tmp_path / f"{abs(hash(message))}.safetensors"
        write_safetensors(path, changed)
        with pytest.raises(WeightsError, match=message):
            from_pretrained(path)

    refused({f"{head}.offset": None}, r"parts of packed tensors are missing: head\.weight\.offset")
    refused(
        {f"{head}.scale": whole[f"{head}.scale"][1:]}, r"head\.weight\.scale is float32 \[28\], must be float32 \[29"
    )
    refused({f"{head}.multiplier": whole[f"{head}.multiplier"].astype(np.int32)}, "multiplier is int32")
    refused({head: np.zeros((29, 64), np.float32)}, r"head\.weight is there twice")
    refused({name: None for name in whole if name.startswith(head)}, r"missing +head\.weight \[29, 64\]")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scale", np.nan, r"head\.weight\.scale has numbers that are not finite"),
        ("multiplier", 0, r"head\.weight\.multiplier has numbers from 0 to \d+, must be from 1 to 17"),
        ("multiplier", 18, r"head\.weight\.multiplier has numbers from \d+ to 18, must be from 1 to 17"),
        ("offset", 127, r"head\.weight\.offset has numbers with which codes unpack to more than 127"),
    ],
)
def test_numbers_that_packing_does_not_make_are_refused(tmp_path: Path, part: str, change: float, message: str) -> None:
    save_pretrained(from_pretrained(source(tmp_path, WIDE["7"]), quantize="int4"), tmp_path / "packed.safetensors")
    tensors = {name: x.copy() for name, x in tensors_in_file(tmp_path / "packed.safetensors").items()}
    tensors[f"head.weight.{part}"].flat[3] = change
    write_safetensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(WeightsError, match=message):
        from_pretrained(tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=message):
        convert(tmp_path / "bad.safetensors", tmp_path / "rounded.safetensors")
    assert not (tmp_path / "rounded.safetensors").exists()


def test_a_packed_vector_is_read_as_the_numbers_it_stands_for(tmp_path: Path) -> None:
    name = "blocks.1.att.r_k"
    path = source(tmp_path, WIDE["7"])
    save_pretrained(from_pretrained(path, quantize="int8"), tmp_path / "packed.safetensors")
    tensors = tensors_in_file(tmp_path / "packed.safetensors")
    parts = pack(tensors.pop(name), "int8")
    tensors |= {f"{name}.int8": parts["codes"], f"{name}.scale": parts["scale"]}
    write_safetensors(tmp_path / "more.safetensors", tensors)
    model = from_pretrained(tmp_path / "more.safetensors")
    r_k = np.asarray(model.blocks.att.r_k[...])[0]
    assert r_k.dtype == np.float32
    np.testing.assert_array_equal(r_k, parts["codes"] * parts["scale"][:, None])


def test_a_matrix_that_is_packed_in_other_bits_is_refused(tmp_path: Path) -> None:
    save_pretrained(from_pretrained(source(tmp_path, WIDE["7"]), quantize="int4"), tmp_path / "packed.safetensors")
    tensors = tensors_in_file(tmp_path / "packed.safetensors")
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("head.weight")}
    parts = pack(np.ones((29, 64), np.float32), "int8")
    assert len(head) == 4
    tensors |= {"head.weight.int8": parts["codes"], "head.weight.scale": parts["scale"]}
    write_safetensors(tmp_path / "mixed.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"head\.weight: the file has it in int8 instead of int4"):
        from_pretrained(tmp_path / "mixed.safetensors")


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_what_was_read_is_given_back_after_each_tensor(quantize: Quantization) -> None:
    events: list[str] = []

    class Recording(dict[str, NDArray]):
        def __getitem__(self, name: str) -> NDArray:
            events.append(name)
            return super().__getitem__(name)

    tensors = Recording(random_tensors(WIDE["7"]))
    place_quantized_params(tensors, WIDE["7"], quantize, lambda: events.append("release"))
    assert events[1::2] == ["release"] * len(tensors)
    assert sorted(events[::2]) == sorted(tensors)


def test_a_packed_transformer_is_not_written(tmp_path: Path) -> None:
    config = ModelConfig(architecture="transformer", vocab_size=29, num_layers=2, width=64, head_dim=16)
    params = place_quantized_params(RandomTensors(config), config, "int8")
    model = nnx.merge(abstract_model(config)[0], params)
    with pytest.raises(WeightsError, match=r"model\.architecture = 'transformer'.*a Transformer stays in its run"):
        save_pretrained(model, tmp_path / "packed.safetensors")
    assert not list(tmp_path.iterdir())


def tensors_in_file(path: Path) -> dict[str, NDArray]:
    return dict(read_safetensors(path))


def test_a_converted_packed_file_is_a_float32_one(tmp_path: Path) -> None:
    path = source(tmp_path, WIDE["6"])
    save_pretrained(from_pretrained(path, quantize="int8"), tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "float.pth")
    tensors = tensors_in(tmp_path / "float.pth")
    assert {name: x.shape for name, x in tensors.items()} == official_shapes(WIDE["6"])
    original = tensors_in(path)
    assert max(relative_error(tensors[name], original[name]) for name in original) < 0.02
