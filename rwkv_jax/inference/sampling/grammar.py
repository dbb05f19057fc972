"""Grammars that a text must match: JSON schemas, regular expressions and context-free grammars, by llguidance.

Before each token the grammar's parser says which tokens may come next: a mask of V bits. A text ends with the
end-of-text token where it may end by its grammar, and there alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.checks import ConfigError, shown
from rwkv_jax.data.tokenizers import Tokenizer

MAX_CHARACTERS = 2**16
"""Longest source of a grammar: rules may be nested as deep as it is long, and the parser's stack grows with that."""

_STACK_BYTES = 2**28  # for rules of that depth; 8 MiB overflow with 3000 rules in a chain, which would end the process
_MAX_COMPILED = 32
_MAX_REASON = 500
_STACK_SIZE_LOCK = threading.Lock()  # a process has one setting for threads to come
_WHITESPACE = r" |\n[ ]{0,32}"  # between JSON's tokens; without a bound a weak model writes nothing else


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What a text must match. Hashable; an engine checks and compiles it when it is first used.

    Raises:
      ConfigError: no text, or one that is too long.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    """A JSON schema, a regular expression of the whole text (Rust's syntax), or llguidance's form of Lark."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise ConfigError(f"grammar {self.kind} = {shown(self.source)}: must be a string")
        if len(self.source) > MAX_CHARACTERS:
            raise ConfigError(
                f"grammar {self.kind}: has {len(self.source)} characters, at most {MAX_CHARACTERS}; give a smaller one"
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Self:
        """JSON that a schema describes, with at most one space, or a line end and indentation, between its tokens.

        Args:
          schema: an object, or its JSON. Keywords that are not supported are refused, by name, when it is used.

        Raises:
          ConfigError: not JSON, or too long.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(parsed, Mapping):
                raise ConfigError(f"grammar json_schema = {shown(schema)}: must be an object")
            return cls("json_schema", json.dumps(parsed))
        except (RecursionError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"grammar json_schema = {shown(schema)}: is not JSON ({error})") from error

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Texts that match a regular expression from their first to their last character."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Self:
        """Texts of a context-free grammar, in llguidance's form of Lark, from the rule `start`."""
        return cls("lark", text)


class GrammarError(ConfigError):
    """The grammar is malformed, matches no text, or is too complex."""


class Constraint:
    """The parser of one text, and the mask of what may come next."""

    def __init__(self, grammar: Grammar, matcher: Any, mask: NDArray[np.int32]) -> None:
        self.grammar, self.matcher = grammar, matcher
        self.mask = mask
        """int32 [ceil(V / 32)]: token v may come next if bit v % 32 of word v // 32 is set."""

    @classmethod
    def begin(cls, grammar: Grammar, matcher: Any, vocab_size: int) -> Self:
        """At the start of a text. Raises GrammarError if no text matches."""
        mask = np.zeros(-(-vocab_size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        begun = cls(grammar, matcher, mask)
        if (error := begun.error()) is not None:
            raise error
        return begun

    def copy(self) -> Self:
        """For another text that goes on from here."""
        return type(self)(self.grammar, self.matcher.deep_copy(), self.mask.copy())

    def allows(self, token: int) -> bool:
        """Whether a token may come next; -1 is none."""
        return token >= 0 and bool(self.mask[token // 32] >> (token % 32) & 1)

    def error(self) -> GrammarError | None:
        """Why the text cannot go on; None if it can, or has ended."""
        if not self.matcher.is_error():
            return None
        reason = self.matcher.get_error()
        return grammar_error(self.grammar, "no text matches it" if reason.startswith("NoExtension") else reason)


def accept_tokens(constraints: Sequence[Constraint], tokens: Sequence[int]) -> list[GrammarError | None]:
    """Reads a token of each text and computes its next mask; all texts at once, while other threads may run.

    Returns:
      For each text why it cannot go on: its token was not allowed, or parsing takes too long; None where it can.
    """
    errors: list[GrammarError | None] = [None] * len(constraints)
    going_on: list[int] = []
    for i, (constraint, token) in enumerate(zip(constraints, tokens, strict=True)):
        if constraint.allows(token):
            going_on.append(i)
        else:  # all that are allowed have the bias -inf
            errors[i] = grammar_error(constraint.grammar, "sampling bans all tokens that it allows here; ban fewer")
    if not going_on:
        return errors
    matchers = [constraints[i].matcher for i in going_on]
    masks = np.zeros((len(matchers), len(constraints[0].mask)), np.int32)
    executor = _executor()
    executor.consume_token_par([(constraints[i].matcher, tokens[i]) for i in going_on])
    places = list(zip(matchers, range(len(matchers)), strict=True))
    executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks[0].nbytes, len(matchers))
    for i, mask in zip(going_on, masks, strict=True):
        constraints[i].mask = mask
        errors[i] = constraints[i].error()
    return errors


def grammar_error(grammar: Grammar, reason: str) -> GrammarError:
    """An error that names the grammar."""
    # Of what the library did not foresee it says where in its code; that is of no use here.
    reason = reason.replace("<non-verbose/>", "").partition("<backtrace>")[0].strip()
    if reason.startswith("panic"):
        reason = "the grammar's library cannot take it; simplify it"
    reason = reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON] + " ..."
    return GrammarError(f"grammar {grammar.kind} = {shown(grammar.source)}: {reason}")


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the last ones. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Does nothing yet: V strings take half a second.

        Args:
          vocab_size: V, of the model.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._begun: collections.OrderedDict[Grammar, Constraint] = collections.OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Raises as `constraint`, which then has less to do."""
        with self._lock:
            self._begin(grammar)

    def constraint(self, grammar: Grammar) -> Constraint:
        """The parser for a new text.

        Raises:
          GrammarError: the grammar is malformed, or no text matches it.
          ConfigError: llguidance is missing.
        """
        with self._lock:
            return self._begin(grammar).copy()

    def _begin(self, grammar: Grammar) -> Constraint:
        """At the start of any text."""
        if grammar not in self._begun:
            self._begun[grammar] = Constraint.begin(grammar, self._compile(grammar), self._vocab_size)
            if len(self._begun) > _MAX_COMPILED:
                self._begun.popitem(last=False)
        self._begun.move_to_end(grammar)
        return self._begun[grammar]

    def _compile(self, grammar: Grammar) -> Any:
        llguidance = _llguidance()
        if self._vocabulary is None:
            self._vocabulary = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size))
            )
        result: list[Any] = []

        def compile_it() -> None:
            try:
                limits = llguidance.LLParserLimits(verbose_errors=False)
                text = _in_its_form(grammar, llguidance.LLMatcher)
                result.append(llguidance.LLMatcher(self._vocabulary, text, log_level=0, limits=limits))
            except BaseException as error:
                result.append(error)

        thread = threading.Thread(target=compile_it)
        with _STACK_SIZE_LOCK:
            before = threading.stack_size(_STACK_BYTES)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
        thread.join()
        (matcher,) = result
        if isinstance(matcher, BaseException) and not isinstance(matcher, ValueError):
            raise matcher
        reason = str(matcher) if isinstance(matcher, ValueError) else matcher.get_error()
        if reason:
            raise grammar_error(grammar, reason)
        return matcher


def _in_its_form(grammar: Grammar, matcher: Any) -> str:
    if grammar.kind == "json_schema":
        return matcher.grammar_from_json_schema(grammar.source, defaults={"whitespace_pattern": _WHITESPACE})
    return (matcher.grammar_from_regex if grammar.kind == "regex" else matcher.grammar_from_lark)(grammar.source)


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id = tokenizer.end_of_text
        named = (token if tokenizer.is_named(token) else None for token in range(vocab_size))
        self.tokens = [b"" if token is None else tokenizer.token_bytes(token) for token in named]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


@functools.cache
def _executor() -> Any:
    return _llguidance().LLExecutor()


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError('grammar: needs the package llguidance: pip install "rwkv-jax[grammar]"') from error
    return llguidance
