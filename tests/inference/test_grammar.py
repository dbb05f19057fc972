"""Texts that must match a grammar: always, in any batch, and without a trace in the other rows of it."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from rwkv_jax.inference import Engine, Grammar, GrammarError, NotFiniteError, SamplingParams
from rwkv_jax.inference.sampling.grammar import Constraint, GrammarCompiler, accept_tokens
from tests.inference.models import (
    CONFIGS,
    GREEDY,
    IDS,
    VOCAB_SIZE,
    assert_same,
    quick_engine,
    random_model,
    what_was_read,
)
from tests.inference.schemas import random_schema

PAIR = Grammar.regex(r"[a-f]{2,9} = (true|false|-?[0-9]{1,4});")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with quick_engine(random_model(CONFIGS["7"]), batch_invariant=True) as engine:
        yield engine


def written_by_chance(constraint: Constraint, tokenizer: Tokenizer, draws: np.random.Generator) -> str:
    """A text of random tokens among those that may come next."""
    ids: list[int] = []
    while True:
        bits = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")
        ids.append(int(draws.choice(np.flatnonzero(bits))))
        assert constraint.allows(ids[-1])
        if ids[-1] == tokenizer.end_of_text:
            return tokenizer.decode(ids)
        assert accept_tokens([constraint], [ids[-1]]) == [None]


# Schemas


@pytest.mark.parametrize("name", ["byte", "world"])
def test_whatever_the_mask_allows_is_what_the_schema_describes(name: str) -> None:
    tokenizer = ByteTokenizer(VOCAB_SIZE) if name == "byte" else load_tokenizer("world", 65536)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    for seed in range(30):
        draws = np.random.default_rng(seed)
        schema, check = random_schema(draws)
        text = written_by_chance(compiler.constraint(Grammar.json_schema(schema)), tokenizer, draws)
        assert check(json.loads(text)), (schema, text)


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 212), marks=pytest.mark.long)])
def test_greedy_texts_are_what_the_schema_describes(engine: Engine, seeds: range) -> None:
    """Unless `max_tokens` comes first, and then they are its beginning and say so."""
    schemas = [random_schema(np.random.default_rng(seed)) for seed in seeds]
    grammars = [Grammar.json_schema(schema) for schema, _ in schemas]
    prompts = [(1, seed % 100 + 1, seed % 7 + 1) for seed in seeds]
    completions = engine.generate(prompts, sampling=GREEDY, grammar=grammars, max_tokens=120)
    reasons = []
    for completion, grammar, (schema, check) in zip(completions, grammars, schemas, strict=True):
        reasons.append(completion.finish_reason)
        if completion.finish_reason == "stop":
            assert completion.stop == engine.tokenizer.end_of_text
            assert check(json.loads(completion.text)), (schema, completion.text)
        else:
            constraint = GrammarCompiler(engine.tokenizer, VOCAB_SIZE).constraint(grammar)
            assert [accept_tokens([constraint], [token]) for token in completion.ids] == [[None]] * 120
    assert reasons.count("stop") > 0.9 * len(reasons)


def test_any_object_is_an_object(engine: Engine) -> None:
    grammar = Grammar.json_object()
    assert grammar == Grammar.json_schema('{"type": "object"}')
    sampling = SamplingParams(logit_bias={ord("}"): 30.0})
    completion = engine.generate("x", grammar=grammar, max_tokens=200, sampling=sampling)
    assert (completion.finish_reason, type(json.loads(completion.text))) == ("stop", dict)


# Other grammars, and sampling


def test_a_text_is_the_whole_of_a_pattern(engine: Engine) -> None:
    samplings = [GREEDY, SamplingParams(top_k=2), SamplingParams.rwkv(), SamplingParams(repetition_penalty=50.0)]
    for sampling in samplings:
        completion = engine.generate("a", grammar=PAIR, sampling=sampling, max_tokens=40)
        assert re.fullmatch(PAIR.source, completion.text)


def test_a_context_free_grammar(engine: Engine) -> None:
    grammar = Grammar.lark('start: "(" start ")" | "[" start "]" | /[0-9]/')
    nested = SamplingParams(logit_bias={ord("("): 9.0, ord("["): 9.0}, frequency_penalty=1.0)
    text = engine.generate("a", grammar=grammar, sampling=nested, max_tokens=100).text
    assert len(text) > 3
    while len(text) > 1:
        assert text[0] + text[-1] in ("()", "[]")
        text = text[1:-1]
    assert text in "0123456789"


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    completion = engine.generate(IDS, grammar=PAIR, sampling=GREEDY, max_tokens=40, top_logprobs=2)
    (score,) = engine.score([IDS], [completion.ids], top_logprobs=2)
    np.testing.assert_allclose(completion.logprobs, score.token_logprobs, atol=1e-5)
    assert not score.is_greedy
    assert [[token for token, _ in top] for top in completion.top_logprobs] == [
        [token for token, _ in top] for top in score.top
    ]


def test_the_end_comes_where_it_may(engine: Engine) -> None:
    """Not before, even if the model would rather end; and `stop_ids` do not hide it."""
    eager = SamplingParams(logit_bias={engine.tokenizer.end_of_text: 100.0})
    completion = engine.generate("a", grammar=Grammar.regex("[ab]{3,50}"), sampling=eager, stop_ids=())
    assert (len(completion.text), completion.finish_reason, completion.stop) == (3, "stop", 0)
    short = engine.generate("a", grammar=Grammar.regex("[ab]{3,50}"), sampling=eager, max_tokens=2)
    assert (len(short.text), short.finish_reason) == (2, "length")


# In a batch


def test_other_rows_are_the_same_bit_by_bit(engine: Engine) -> None:
    samplings = [GREEDY, SamplingParams(top_p=0.9), SamplingParams.rwkv(presence_penalty=0.5)]
    given: dict[str, Any] = {"max_tokens": 30, "stop_ids": (), "seed": 3}
    prompts = ["one", "two two", "three"]
    alone = engine.generate(prompts, sampling=samplings, **given)
    *among, constrained = engine.generate(
        [*prompts, "four"], sampling=[*samplings, GREEDY], grammar=[None, None, None, PAIR], **given
    )
    assert among == alone
    assert re.fullmatch(PAIR.source, constrained.text)
    assert (
        constrained
        == engine.generate(
            [*prompts, "four"], sampling=[*samplings, GREEDY], grammar=[None, None, None, PAIR], **given
        )[-1]
    )


def test_a_guided_text_matches(engine: Engine) -> None:
    completion = engine.generate("a", grammar=PAIR, guidance_scale=2.0, negative_prompt="b", max_tokens=40)
    assert re.fullmatch(PAIR.source, completion.text)


def test_a_conversation_goes_on_after_it(engine: Engine) -> None:
    session = engine.session()
    session.append("Say something.")
    completion = session.generate(" Now.", grammar=PAIR, max_tokens=40)
    read = (*engine.encode("Say something.", begins=True), *engine.encode(" Now.", begins=False))
    assert_same(session.snapshot, engine.prefill(None, (*read, *what_was_read(completion))))


def test_masks_take_time_that_is_counted(engine: Engine) -> None:
    before = engine.stats().mask_seconds
    engine.generate("a", max_tokens=3)
    assert engine.stats().mask_seconds == before
    engine.generate("a", grammar=PAIR, max_tokens=3)
    assert engine.stats().mask_seconds > before


# Errors


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.regex("("), r"grammar regex = '\(': .*unclosed group"),
        (Grammar.regex(r"[^\s\S]"), "grammar regex = .*: no text matches it"),
        (Grammar.lark("start: nope"), "grammar lark = .*unknown name"),
        (Grammar.lark(""), "Empty grammar"),
        (Grammar.json_schema({"type": "string", "minLength": 2, "maxLength": 1}), "grammar json_schema = .*Unsat"),
        (Grammar.json_schema({"type": "nope"}), "Invalid type: nope"),
        (Grammar.json_schema({"not": {}}), r'Unimplemented keys: \["not"\]'),
        ("regex", "grammar = 'regex'|grammar: 5 for 1 prompts"),
        (7, "grammar = 7"),
    ],
)
def test_bad_grammars_are_refused(engine: Engine, grammar: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        engine.stream("a", grammar=grammar)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.regex("a" * 70000), "grammar regex: has 70000 characters"),
        (lambda: Grammar.regex(b"a"), "must be a string"),  # pyright: ignore[reportArgumentType]
        (lambda: Grammar.json_schema([1]), "must be an object"),  # pyright: ignore[reportArgumentType]
        (lambda: Grammar.json_schema('{"type": '), "is not JSON"),
        (lambda: Grammar.json_schema({"enum": [object()]}), "is not JSON"),
        (lambda: Grammar.json_schema("[" * 100000), "is not JSON"),
    ],
)
def test_what_is_no_grammar_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_long_chain_of_rules_does_not_overflow_the_stack() -> None:
    chain = "".join(f"a{i}:a{i + 1}\n" for i in range(5000))
    compiler = GrammarCompiler(ByteTokenizer(VOCAB_SIZE), VOCAB_SIZE)
    constraint = compiler.constraint(Grammar.lark(f'start: a0\n{chain}a5000: "b"'))
    assert constraint.allows(ord("b"))


def test_a_grammar_is_begun_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Grammar] = []
    begin = Constraint.begin

    def counted(grammar: Grammar, *given: Any) -> Constraint:
        begun.append(grammar)
        return begin(grammar, *given)

    monkeypatch.setattr(Constraint, "begin", counted)
    compiler = GrammarCompiler(ByteTokenizer(VOCAB_SIZE), VOCAB_SIZE)
    compiler.check(PAIR)
    one, other = (compiler.constraint(PAIR) for _ in range(2))
    assert begun == [PAIR]
    assert accept_tokens([one], [ord("a")]) == [None]
    assert accept_tokens([other], [ord("b")]) == [None]
    fresh = GrammarCompiler(ByteTokenizer(VOCAB_SIZE), VOCAB_SIZE).constraint(PAIR)
    np.testing.assert_array_equal(compiler.constraint(PAIR).mask, fresh.mask)


def test_bans_that_leave_nothing_end_one_text(engine: Engine) -> None:
    banned = SamplingParams(banned=[ord("b")])
    with engine.stream("other", max_tokens=20, stop_ids=()) as other:
        with pytest.raises(GrammarError, match="bans all tokens"):
            engine.generate("a", grammar=Grammar.regex("ab"), sampling=banned)
        assert len(list(other)) == 20


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r'pip install "rwkv-jax\[grammar\]"'):
        GrammarCompiler(ByteTokenizer(VOCAB_SIZE), VOCAB_SIZE).constraint(PAIR)


def test_a_wrong_grammar_is_refused_before_anything_is_run(engine: Engine) -> None:
    before = engine.stats().prompt_tokens
    with pytest.raises(GrammarError, match=r"^grammar regex = '\('"):
        engine.generate([IDS] * 12, max_tokens=2, grammar=[None] * 11 + [Grammar.regex("(")])
    assert engine.stats().prompt_tokens == before


@pytest.mark.parametrize("grammar", [Grammar.regex("a\0b"), Grammar.lark('start: <|endoftext|> "a"')])
def test_what_the_library_did_not_foresee_is_told_in_a_sentence(engine: Engine, grammar: Grammar) -> None:
    with pytest.raises(GrammarError) as error:
        engine.generate(IDS, grammar=grammar)
    assert len(str(error.value)) < 700
    assert "backtrace" not in str(error.value)


def test_a_token_that_sampling_bans_does_not_pass_for_the_end(engine: Engine) -> None:
    with pytest.raises(GrammarError, match="sampling bans all tokens that it allows here"):
        engine.generate(IDS, max_tokens=9, grammar=Grammar.regex("ab"), sampling=SamplingParams.greedy(banned=(0,)))


def test_a_model_that_is_broken_is_not_the_grammars_fault(engine: Engine) -> None:
    snapshot = engine.prefill(None, IDS)
    broken = dataclasses.replace(snapshot, logits=snapshot.logits * np.nan)
    with pytest.raises(NotFiniteError):
        engine.generate("", state=broken, max_tokens=3, grammar=Grammar.regex("[a-z]+"))
