"""The sampler writes what the model says, token by token, with one program and a state of constant size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.models import RWKV7, Transformer
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.sample import TOKENS_PER_CALL, Sampler
from tests.programs import compiled_quickly

CONFIG = ModelConfig(vocab_size=300, num_layers=3, width=32, head_dim=8)
GREEDY = SamplingParams(temperature=0.0)
LONGEST = 96


class CountedSampler(Sampler):
    """Counts how often its program is traced, and keeps the shapes of all that it carries between calls."""

    def __init__(self, *arguments: Any) -> None:
        self.traced = 0
        self.recurrent_state: list[Any] = []
        super().__init__(*arguments)

    def _advance_some(self, params: Any, cursor: Any, *arguments: Any) -> Any:
        self.traced += 1
        after, tokens = super()._advance_some(params, cursor, *arguments)
        self.recurrent_state += [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (cursor, after)]
        return after, tokens


class Small(NamedTuple):
    params: Any
    tokenizer: SentencePieceTokenizer
    sampler: CountedSampler
    greedy: Callable[[str, int], list[int]]
    """Continues a prompt by the likeliest token of the whole text so far, read in parallel each time."""


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
    """Compiles quickly: rounding is not the question here."""
    with compiled_quickly():
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small model, random also where the official initial values are zero and layers would not talk to each other."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece([f"def f{i}(x):\n    return x * {i} + {i * i}\n" for i in range(200)], 300, path)
    tokenizer = SentencePieceTokenizer(path.read_bytes(), str(path))
    graphdef, params = nnx.split(nnx.jit(lambda: RWKV7(CONFIG, rngs=nnx.Rngs(0)))(), nnx.Param)
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(params))
    draws = np.random.default_rng(1)
    params = structure.unflatten([leaf + 0.3 * draws.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])

    @jax.jit
    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens)[0]

    def greedy(prompt: str, num_tokens: int) -> list[int]:
        text = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        for _ in range(num_tokens):
            # What is behind a token does not reach it, so one length serves for all.
            padded = jnp.asarray([text + [0] * (LONGEST - len(text))], jnp.int32)
            text.append(int(jnp.argmax(forward(params, padded)[0, len(text) - 1])))
        return text[-num_tokens:]

    return Small(params, tokenizer, CountedSampler(RunModel(graphdef), CONFIG, tokenizer), greedy)


# Shorter than what is read in one call, exactly as long, longer, and three times as long.
PROMPTS = [
    "",
    "def",
    "def f1(x):\n    ",
    "def f1(x):\n    return x * 1 + 2\ndef f2(",
    "é日本\U0001f469\u200d\U0001f467",
]


def tokens_of(small: Small, prompt: str, num_tokens: int, sampling: SamplingParams, seed: int = 0) -> list[int]:
    return small.sampler.tokens(small.params, prompt, num_tokens, sampling, seed)


@pytest.mark.parametrize(
    "prompt", [pytest.param(prompt, marks=() if i in (1, 3) else pytest.mark.long) for i, prompt in enumerate(PROMPTS)]
)
def test_without_temperature_it_takes_the_likeliest_token_each_time(small: Small, prompt: str) -> None:
    expected = small.greedy(prompt, 40)
    if small.tokenizer.end_of_text in expected:
        expected = expected[: expected.index(small.tokenizer.end_of_text)]
    assert len(expected) > 3
    assert tokens_of(small, prompt, 40, GREEDY) == expected


def test_prompts_fall_on_both_sides_of_a_call(small: Small) -> None:
    """What the test above relies on."""
    lengths = [len(small.tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert min(lengths) == 0
    assert any(0 < length < TOKENS_PER_CALL for length in lengths)
    assert any(length > TOKENS_PER_CALL for length in lengths)


@pytest.mark.parametrize("count", [TOKENS_PER_CALL - 1, TOKENS_PER_CALL, TOKENS_PER_CALL + 1, 3 * TOKENS_PER_CALL])
def test_prompts_around_the_length_of_a_call(small: Small, count: int) -> None:
    prompt = "x" * count
    assert len(small.tokenizer.encode(prompt)) == count
    assert tokens_of(small, prompt, 5, GREEDY) == small.greedy(prompt, 5)


def test_top_k_of_one_is_greedy(small: Small) -> None:
    assert tokens_of(small, "def", 20, SamplingParams(1.5, top_k=1)) == tokens_of(small, "def", 20, GREEDY)


def test_same_seed_same_text_other_seed_other_text(small: Small) -> None:
    first, again, other = (tokens_of(small, "def", 30, SamplingParams(), seed) for seed in (1, 1, 2))
    assert first == again != other


def test_asking_for_less_gives_the_beginning_of_the_same_text(small: Small) -> None:
    long = tokens_of(small, "def", 40, SamplingParams(0.7), 3)
    assert len(long) == 40
    for count in (1, TOKENS_PER_CALL, 30):
        assert tokens_of(small, "def", count, SamplingParams(0.7), 3) == long[:count]


def test_one_program_and_a_state_of_constant_size_for_all_texts(small: Small) -> None:
    for prompt, count in (("", 1), ("def" * 30, 3), ("x", 70)):
        tokens_of(small, prompt, count, SamplingParams(0.5, 0.9, 7))
    assert small.sampler.traced == 1
    before, after = small.sampler.recurrent_state
    assert before == after


def test_ends_before_an_end_of_text_token(small: Small) -> None:
    """Made likely by force: its row of the head is the sum of all others', its logit therefore often the largest."""
    end = small.tokenizer.end_of_text
    head = small.params["head"]["weight"]
    params = small.params | {"head": {"weight": head.at[end].set(3 * head.sum(0))}}
    texts = [small.sampler.tokens(params, "def", 50, SamplingParams(), seed) for seed in range(20)]
    assert all(end not in text for text in texts)
    assert any(len(text) < 50 for text in texts)


def test_a_transformer_stops_where_its_state_is_full() -> None:
    config = ModelConfig(
        architecture="transformer", vocab_size=257, num_layers=2, width=16, head_dim=8, context_length=12
    )
    graphdef, params = nnx.split(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    sampler = Sampler(RunModel(graphdef), config, ByteTokenizer())
    assert len(sampler.tokens(params, "abc", 50, SamplingParams(), 0)) <= 8
    assert sampler.tokens(params, "a" * 30, 50, SamplingParams(), 0) == []


def test_the_prompt_is_not_repeated(small: Small) -> None:
    prompt = "def f1(x):\n"
    text = small.sampler.text(small.params, prompt, 20, GREEDY, 0)
    assert text == small.tokenizer.decode(small.greedy(prompt, 20))


def test_tokenizer_of_another_size_is_refused(small: Small) -> None:
    with pytest.raises(ConfigError, match="300 tokens where the model has 301"):
        Sampler(RunModel(None), dataclasses.replace(CONFIG, vocab_size=301), small.tokenizer)


def test_parameters_are_left_as_they_were(small: Small) -> None:
    before = jax.tree.map(np.array, small.params)
    tokens_of(small, "def", 20, SamplingParams())
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_array_equal(a, b)
