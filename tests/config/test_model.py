"""Models: what is refused, and the sizes, parameters and operations that are computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from rwkv_jax.config import ConfigError, ModelConfig, ResolvedSizes
from tests.models.parameters import SMALL, abstract, named_config

# Values that cannot work

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "model.vocab_size = 0: must be greater than zero"),
    ({"width": -64}, "model.width = -64: must be greater than zero"),
    ({"head_dim": 0}, "model.head_dim = 0: must be greater than zero"),
    ({"width": 100}, "model.width = 100: must be a multiple of model.head_dim = 64; .* 64 and 128"),
    ({"width": 32}, "model.width = 32: must be a multiple of model.head_dim = 64; .* 64 and 128"),
    ({"width": 3, "head_dim": 1}, "model.head_dim = 1: must be at least 2"),
    ({"num_layers": 1}, "model.num_layers = 1: RWKV needs at least 2 layers"),
    ({"ffn_width": 0}, "model.ffn_width = 0: must be positive, or None"),
    *(
        ({"ffn_width": x}, f"model.ffn_width = {x!r}: must be positive, or None .*: a whole")
        for x in ("512", 1.5, True)
    ),
    ({"decay_rank": "64"}, "model.decay_rank = '64': must be positive, or None for the default: a whole number"),
    ({"generation": "4", "embedding_bound": "1"}, "model.embedding_bound = '1': must be positive, .*: a number"),
    *(
        ({f"{what}_implementation": value}, f"model.{what}_implementation = {value!r}: must be a name, or None")
        for what, value in (("wkv", 5), ("output", 5), ("output", ""), ("step", True))
    ),
    *(({f"{r}_rank": -1}, f"model.{r}_rank = -1: ") for r in ("decay", "iclr", "value", "gate")),
    ({"generation": "5"}, "model.generation = '5': must be one of 4, 5.0, 5.1, 5.2, 6, 7"),
    (
        {"generation": "transformer"},
        "model.generation = 'transformer': must be one of 4, 5.0, .* or set model.architecture to transformer",
    ),
    (
        {"generation": "6", "architecture": "transformer"},
        "model.generation = '6': a Transformer has no generations; leave it out",
    ),
    (
        {"architecture": "gru"},
        "model.architecture = 'gru': must be rwkv, transformer, llama, gla, mamba2, .*, rnn or lstm",
    ),
    ({"generation": "4", "width": 1}, "model.width = 1: must be at least 2"),
    *(
        ({"generation": generation, "width": 100}, "model.width = 100: must be a multiple of")
        for generation in ("5.0", "5.1", "5.2", "6")
    ),
    ({"generation": "6", "mix_rank": 0}, "model.mix_rank = 0: must be positive, or None"),
    *(
        (
            {"generation": generation, "decay_rank": 64},
            f"model.decay_rank = 64: RWKV-{generation} has no such size, only RWKV-6, 7, 7a, 7b, 7-rosa and 8-rc00;",
        )
        for generation in ("4", "5.0", "5.1", "5.2")
    ),
    *(
        (
            {"generation": "6", f"{rank}_rank": 8},
            f"model.{rank}_rank = 8: RWKV-6 has no such size, only RWKV-7, 7a, 7b, 7-rosa and 8-rc00; leave",
        )
        for rank in ("iclr", "value", "gate")
    ),
    *(
        (
            {"generation": generation, "mix_rank": 8},
            f"model.mix_rank = 8: RWKV-{generation} has no such size, only RWKV-6; leave it out",
        )
        for generation in ("5.2", "7")
    ),
    *(
        (
            {"generation": generation, "exponential_bonus": True},
            f"model.exponential_bonus = True: RWKV-{generation} has no such form, only RWKV-5.0 and 5.1; leave it out",
        )
        for generation in ("4", "5.2", "6", "7")
    ),
    *(
        (
            {"generation": generation, "unused_value_residual": True},
            f"model.unused_value_residual = True: RWKV-{generation} has no value residual, only RWKV-7",
        )
        for generation in ("4", "5.0", "5.1", "5.2", "6")
    ),
    *(
        (
            {"generation": generation, f"{what}_implementation": "xla"},
            f"model.{what}_implementation = 'xla': RWKV-{generation} has no such kernel, only RWKV-7",
        )
        for what in ("output", "step")
        for generation in ("4", "5.2", "6")
    ),
    *(
        (
            {"generation": generation, "context_length": 512},
            f"model.context_length = 512: RWKV-{generation} has no such size, only RWKV-7b, a Transformer and a Llama",
        )
        for generation in ("4", "5.2", "6", "7")
    ),
    ({"architecture": "transformer", "context_length": 0}, "model.context_length = 0: must be positive, or"),
    ({"architecture": "transformer", "width": 100}, "model.width = 100: must be a multiple of"),
    (
        {"architecture": "transformer", "width": 9, "head_dim": 3},
        "model.head_dim = 3: must be even: positions rotate pairs of channels",
    ),
    *(
        (
            {"architecture": "transformer", f"{rank}_rank": 8},
            f"model.{rank}_rank = 8: Transformer has no such size, only RWKV-",
        )
        for rank in ("mix", "decay", "iclr", "value", "gate")
    ),
    (
        {"architecture": "transformer", "exponential_bonus": True},
        "model.exponential_bonus = True: Transformer has no such form, only RWKV-5.0 and 5.1; leave it out",
    ),
    (
        {"architecture": "transformer", "unused_value_residual": True},
        "model.unused_value_residual = True: Transformer has no value residual, only RWKV-7",
    ),
    (
        {"architecture": "transformer", "wkv_implementation": "scan"},
        "model.wkv_implementation = 'scan': a Transformer has no WKV operator; leave it out",
    ),
    ({"kv_heads": 2}, "model.kv_heads = 2: RWKV-7 has no such size, only a Llama; leave it out"),
    (
        {"architecture": "transformer", "tied_head": True},
        "model.tied_head = True: Transformer has no such head, only a",
    ),
    ({"architecture": "llama", "kv_heads": 3}, "model.kv_heads = 3: must divide the 8 heads of the queries"),
    ({"architecture": "llama", "attention_heads": 0}, "model.attention_heads = 0: must be positive, or None for"),
    ({"architecture": "llama", "norm_epsilon": 0.0}, "model.norm_epsilon = 0.0: must be positive, or None"),
    ({"architecture": "llama", "rotary_base": True}, "model.rotary_base = True: must be positive, or None"),
    (
        {"architecture": "llama", "rotary_scaling": (8.0, 4.0, 1.0, 64.0)},
        r"model.rotary_scaling = \(8.0, 4.0, 1.0, 64.0\): must be four positive numbers",
    ),
    ({"architecture": "llama", "wkv_implementation": "scan"}, "model.wkv_implementation = 'scan': a Llama has no WKV"),
    ({"dtype": "float16"}, "model.dtype = 'float16': must be float32, bfloat16 or float64"),
    ({"architecture": "gla", "width": 9, "head_dim": 3}, "model.head_dim = 3: must be even: keys have half of it"),
    (
        {"architecture": "lstm", "wkv_implementation": "scan"},
        "model.wkv_implementation = 'scan': an LSTM has no WKV operator; leave it out",
    ),
    ({"state_size": 4}, "model.state_size = 4: RWKV-7 has no such size, only a Mamba-2; leave it out"),
    ({"architecture": "mamba2", "state_size": 0}, "model.state_size = 0: must be positive, or None"),
    (
        {"generation": "6", "negative_eigenvalues": True},
        "model.negative_eigenvalues = True: RWKV-6 has no such choice, only RWKV-7, 7a, 7b, 7-rosa and 8-rc00, a",
    ),
    ({"rosa_bits": 4}, "model.rosa_bits = 4: RWKV-7 has no such size, only RWKV-7-rosa and 8-rosa; leave it"),
    ({"generation": "8-rosa", "rosa_bits": 9}, "model.rosa_bits = 9: must be at most 8"),
    ({"generation": "8-rosa", "width": 90}, "model.width = 90: must be a multiple of model.rosa_bits = 4: channels of"),
    ({"generation": "8-rosa", "rosa_window": 0}, "model.rosa_window = 0: must be positive, or None"),
    (
        {"generation": "8-rosa", "rosa_implementation": "gpu"},
        "model.rosa_implementation = 'gpu': must be scan, host or None",
    ),
    (
        {"generation": "8-rosa", "wkv_implementation": "scan"},
        "model.wkv_implementation = 'scan': an RWKV-8 ROSA has no WKV operator; leave it out",
    ),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message.split(":")[0] for _, message in WRONG])
def test_wrong_values_are_refused_by_name_with_a_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ModelConfig(**values)


@pytest.mark.parametrize(("width", "head_dim"), [(100, 64), (32, 64), (2, 1)])
def test_rwkv4_has_no_heads_to_fit(width: int, head_dim: int) -> None:
    assert ModelConfig("4", width=width, head_dim=head_dim).sizes().ffn_width == 4 * width


# Sizes


@pytest.mark.parametrize(
    ("width", "decay", "iclr", "value", "gate"),
    [
        (768, 64, 64, 32, 128),
        (1024, 64, 64, 64, 160),
        (2048, 128, 128, 64, 224),
        (2560, 128, 128, 96, 256),
        (4096, 160, 160, 96, 320),
        (64, 32, 32, 32, 32),
    ],
)
def test_ranks_are_those_of_the_official_trainer(width: int, decay: int, iclr: int, value: int, gate: int) -> None:
    resolved = ModelConfig(width=width).resolved()
    assert (resolved.decay_rank, resolved.iclr_rank, resolved.value_rank, resolved.gate_rank) == (
        (decay, iclr, value, gate)
    )
    assert resolved.ffn_width == 4 * width
    assert resolved.sizes() == ModelConfig(width=width).sizes()
    assert resolved.mix_rank is None


@pytest.mark.parametrize(
    ("generation", "width", "sizes"),
    [
        ("4", 768, ResolvedSizes(3072)),
        ("4", 5120, ResolvedSizes(20480)),
        ("5.0", 1024, ResolvedSizes(4096)),
        ("5.1", 1024, ResolvedSizes(3584)),
        ("5.2", 2048, ResolvedSizes(7168)),
        ("5.2", 2560, ResolvedSizes(8960)),
        ("5.2", 320, ResolvedSizes(1120)),
        ("5.1", 64 * 3, ResolvedSizes(672)),
        ("6", 2048, ResolvedSizes(7168, mix_rank=32, decay_rank=64)),
        ("6", 4096, ResolvedSizes(14336, mix_rank=64, decay_rank=128)),
        ("6", 64, ResolvedSizes(224, mix_rank=32, decay_rank=64)),
        ("transformer", 768, ResolvedSizes(3072, context_length=2048)),
        (
            "llama",
            768,
            ResolvedSizes(
                2048, context_length=2048, attention_heads=12, kv_heads=12, rotary_base=10000.0, norm_epsilon=1e-5
            ),
        ),
    ],
)
def test_sizes_are_those_of_the_released_models(generation: Any, width: int, sizes: ResolvedSizes) -> None:
    config = named_config(generation, width=width)
    assert config.sizes() == sizes
    assert config.resolved().sizes() == sizes


@pytest.mark.parametrize(("generation", "head_dim"), [("5.1", 2), ("5.2", 4), ("6", 8)])
def test_the_ffn_of_a_narrow_model_is_rounded_down_but_never_to_nothing(generation: Any, head_dim: int) -> None:
    widths = {8: 32, 24: 64, 40: 128}  # 28, 84 and 140 before rounding
    assert {w: ModelConfig(generation, width=w, head_dim=head_dim).sizes().ffn_width for w in widths} == widths


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_sizes_that_are_given_stay(config: ModelConfig) -> None:
    assert config.resolved() == config


# Parameters and operations


@pytest.mark.parametrize(
    ("vocab_size", "layers", "width", "ranks", "published"),
    [
        (65536, 12, 768, (64, 64, 32, 128), 191_084_544),
        (50304, 12, 768, (64, 64, 32, 128), 167_688_192),
        (65536, 24, 1024, (64, 64, 32, 128), 450_834_432),
        (65536, 24, 2048, (96, 96, 64, 256), 1_527_668_736),
        (65536, 32, 2560, (96, 96, 64, 320), 2_948_065_280),
        (65536, 32, 4096, (128, 128, 96, 480), 7_199_932_416),
    ],
    ids=["0.1B", "0.168B", "0.4B", "1.5B", "2.9B", "7.2B"],
)
def test_released_models_have_their_published_number_of_parameters(
    vocab_size: int, layers: int, width: int, ranks: tuple[int, int, int, int], published: int
) -> None:
    decay, iclr, value, gate = ranks
    sizes: dict[str, Any] = {"decay_rank": decay, "iclr_rank": iclr, "value_rank": value, "gate_rank": gate}
    config = ModelConfig("7", vocab_size, layers, width, **sizes)
    # The published count includes v0, v1 and v2 of the first layer, which nothing reads.
    assert config.num_parameters() == published - (width + 2 * width * value)
    assert dataclasses.replace(config, unused_value_residual=True).num_parameters() == published


FLOPS_OF_RECURRENCE = {
    # A channel of numerator and denominator: each decayed, written, read with the bonus; the quotient.
    "4": lambda config: 12 * config.width,
    # Each state entry: decayed (1), the rank-one removal S a b^T (2 to read, 2 to add), v k^T added (2), read (2).
    "7": lambda config: 9 * config.num_heads * config.head_dim**2,
    # What scales an output is not counted.
    "8-rc00": lambda config: 9 * config.num_heads * config.head_dim**2,
    # And of ROSA a choice for each channel.
    "7-rosa": lambda config: 9 * config.num_heads * config.head_dim**2 + config.width,
    "8-rosa": lambda config: config.width,
    # And a token's own matrix of 3 x 3.
    "7a": lambda config: 9 * config.num_heads * config.head_dim**2 + 2 * 3**2,
    # And of a key of 10 numbers and a value, at 33 of 64 tokens in the mean, 2 operations a number: (S + 1) / 2.
    "7b": lambda config: 9 * config.num_heads * config.head_dim**2 + 2 * 3**2 + (10 + config.width) * 65,
}


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(config, id=f"small-{name}") for name, config in SMALL.items()),
        pytest.param(ModelConfig(num_layers=5, width=256), id="width-256"),
        pytest.param(ModelConfig("6", num_layers=5, width=256), id="width-256-of-6"),
    ],
)
def test_flops_are_two_a_weight_of_every_matrix_product_and_the_recurrence(config: ModelConfig) -> None:
    weights = 0
    for path, x in jax.tree.leaves_with_path(abstract(config)[1]):
        *folders, name = (entry.key for entry in path)
        is_matrix = (name == "weight" and not folders[-1].startswith("ln")) or name[-1] in "12"
        if is_matrix and not folders[-1].endswith(("emb", "enn")):  # an embedding is looked up
            weights += x.size

    def of_others(config: ModelConfig) -> int:
        """Each state entry of RWKV-5 and 6: decayed (1), k v^T added (2), read (2)."""
        return 5 * config.num_heads * config.head_dim**2

    recurrence = config.num_layers * FLOPS_OF_RECURRENCE.get(config.generation, of_others)(config)
    assert config.flops_per_token() == 2 * weights + recurrence
    if config.generation == "7":
        # What nothing reads costs nothing.
        assert dataclasses.replace(config, unused_value_residual=True).flops_per_token() == 2 * weights + recurrence


def test_architectures_have_names() -> None:
    assert ModelConfig("5.2").title == "RWKV-5.2"
    assert ModelConfig(architecture="transformer").title == "Transformer"


@pytest.mark.parametrize("generation", ["4", "5.0", "5.1", "5.2", "6", "7"])
@pytest.mark.parametrize(("num_layers", "width", "vocab_size"), [(12, 768, 50304), (4, 192, 2048), (32, 4096, 65536)])
def test_a_transformer_of_equal_size(generation: Any, num_layers: int, width: int, vocab_size: int) -> None:
    config = ModelConfig(generation, vocab_size, num_layers, width, dtype="bfloat16")
    equal = config.transformer_of_equal_size(4096)
    kept = ("vocab_size", "num_layers", "width", "head_dim", "dtype")
    assert [getattr(equal, name) for name in kept] == [getattr(config, name) for name in kept]
    assert (equal.architecture, equal.context_length) == ("transformer", 4096)
    assert equal.num_parameters() == pytest.approx(config.num_parameters(), rel=0.005)
    assert equal.sizes().ffn_width % 32 == 0


def test_a_model_without_heads_has_no_transformer_of_equal_size() -> None:
    with pytest.raises(ConfigError, match=r"model\.width = 100: must be a multiple of model\.head_dim = 64"):
        ModelConfig("4", width=100).transformer_of_equal_size()


def test_released_llamas_have_their_published_number_of_parameters() -> None:
    """Llama 3.2 1B, Qwen2.5 0.5B and Qwen3 0.6B, whose heads are wider than the residual stream."""
    common: dict[str, Any] = {"architecture": "llama", "tied_head": True}
    models = {
        1_235_814_400: ModelConfig("7", 128256, 16, 2048, ffn_width=8192, kv_heads=8, **common),
        494_032_768: ModelConfig("7", 151936, 24, 896, ffn_width=4864, kv_heads=2, qkv_bias=True, **common),
        596_049_920: ModelConfig(
            "7", 151936, 28, 1024, 128, 3072, attention_heads=16, kv_heads=8, qk_norm=True, **common
        ),
    }
    assert {config.num_parameters(): config for config in models.values()} == models


def test_attention_costs_what_its_tokens_see() -> None:
    config = ModelConfig(
        architecture="transformer", vocab_size=41, num_layers=3, width=32, head_dim=8, context_length=20
    )
    weights = 3 * 12 * 32**2 + 41 * 32
    # Each of H heads: a score of N products and sums for each key that is seen, and as many for its value.
    seen = [sum(4 * 8 * 4 for _ in range(position + 1)) for position in range(10)]
    assert config.flops_per_token(10) == 2 * weights + 3 * sum(seen) / 10
    assert config.flops_per_token() == config.flops_per_token(20) > config.flops_per_token(10)
    assert ModelConfig().flops_per_token(10) == ModelConfig().flops_per_token()
