"""Normalizes the arguments of `Engine.generate`, `Engine.stream` and `Engine.score` to one `Request` per text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from rwkv_jax.checks import ConfigError, is_whole, require_whole, shown
from rwkv_jax.inference.engine.requests import MAX_SEED, Request
from rwkv_jax.inference.sampling.grammar import Grammar
from rwkv_jax.inference.sampling.params import Sampling, SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot

MAX_BEST_OF = 1024
"""Upper bound of `best_of`."""

_ELSEWHERE = {
    "conversation": "engine.generate has it, and engine.conversation(name).stream",
    "best_of": "engine.generate has it, of texts that are not streamed and belong to no session",
}


class SessionArguments(TypedDict, total=False):
    """Arguments of a continuation; `Engine.stream` documents them."""

    max_tokens: int
    sampling: Sampling | Sequence[Sampling]
    seed: int | Sequence[int]
    stop: str | Sequence[str]
    stop_ids: Iterable[int] | None
    top_logprobs: int
    guidance_scale: float
    negative_prompt: str | Sequence[int] | None
    client_id: str
    grammar: Grammar | Sequence[Grammar | None] | None


class Arguments(SessionArguments, total=False):
    """Arguments of a continuation with the states before and after it, which a session manages itself."""

    state: Snapshot | None
    return_state: bool
    adapter: str | None


_ARGUMENTS = frozenset(Arguments.__annotations__)  # including those of the base class


def is_one(prompts: Any) -> bool:
    """Whether this is one prompt (a text or token ids) rather than several.

    Raises:
      ConfigError: it is neither, or an iterator.
    """
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, bytes | bytearray | memoryview) or not _is_sequence(prompts):
        raise ConfigError(
            f"prompts = {shown(prompts)}: must be a text, a sequence of token ids, or a list of several such prompts"
        )
    if isinstance(prompts, jax.Array):
        return prompts.ndim == 1 and prompts.size > 0
    return len(prompts) > 0 and not _is_sequence(prompts[0])


def _is_sequence(value: Any) -> bool:
    """Whether it has a length; arrays without axes have none."""
    return value.ndim > 0 if isinstance(value, np.ndarray | jax.Array) else isinstance(value, Sequence)


def build_requests(
    encode: Callable[..., list[int]], end_of_text: int, prompts: Any, copies: int, arguments: Mapping[str, Any]
) -> list[Request]:
    """One request per prompt and copy, with copies adjacent.

    Args:
      encode: encode(text, begins=) -> ids.
      arguments: as in `Engine.stream`; NumPy's scalars are taken as Python's.

    Raises:
      ConfigError: incompatible or unknown arguments; values are checked by `Request.check`.
    """
    if unknown := sorted(arguments.keys() - _ARGUMENTS):
        remedy = _ELSEWHERE.get(unknown[0], "Engine.stream lists them")
        raise ConfigError(f"{', '.join(unknown)}: no such argument; {remedy}")
    given = {name: value.item() if isinstance(value, np.generic) else value for name, value in arguments.items()}
    if type(given.get("return_state", False)) is not bool:
        raise ConfigError(f"return_state = {shown(given['return_state'])}: must be True or False")
    state: Snapshot | None = given.pop("state", None)
    if state is not None and not isinstance(state, Snapshot):
        raise ConfigError(f"state = {shown(state)}: must be a Snapshot, such as Session.snapshot")
    prompts = np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts
    each: list[Any] = [prompts] if is_one(prompts) else list(prompts)
    if not each and state is not None:
        each = [""]  # no ids: nothing to prefill
    if not each:
        raise ConfigError("prompts: there are none; give at least one")
    if (state is not None or given.get("return_state")) and len(each) * copies > 1:
        raise ConfigError(f"state and return_state are for one text; there are {len(each) * copies}")
    sampling = given.pop("sampling", SamplingParams())
    is_for_all = isinstance(sampling, SamplingParams | str)
    samplings = [sampling] * len(each) if is_for_all else _one_each("sampling", sampling, len(each))
    samplings = [SamplingParams.preset(each) if isinstance(each, str) else each for each in samplings]
    grammar = given.pop("grammar", None)
    are_same = grammar is None or isinstance(grammar, Grammar)
    grammars = [grammar] * len(each) if are_same else _one_each("grammar", grammar, len(each))
    seeds = _seeds(given.pop("seed", 0), len(each), copies)
    stop, stop_ids, negative = given.pop("stop", ()), given.pop("stop_ids", None), given.pop("negative_prompt", None)
    strings = (stop,) if isinstance(stop, str) else _converted(tuple, "stop", stop)
    ends = _converted(frozenset, "stop_ids", [end_of_text] if stop_ids is None else stop_ids)
    begin, go_on = (functools.partial(encode, begins=begins) for begins in (True, False))
    negative_ids = () if negative is None else _ids("negative_prompt", negative, begin)
    requests = []
    for i, prompt in enumerate(each):
        # After a state the prompt may be empty.
        is_nothing = state is not None and isinstance(prompt, str) and not prompt
        ids = () if is_nothing else _ids(f"prompt {i}", prompt, begin if state is None else go_on)
        for seed in seeds[i * copies : (i + 1) * copies]:
            requests.append(
                Request(
                    ids,
                    sampling=samplings[i],
                    seed=seed,
                    stop=strings,
                    stop_ids=ends if grammars[i] is None else ends | {end_of_text},
                    grammar=grammars[i],
                    state=state,
                    negative_ids=negative_ids,
                    **given,
                )
            )
    return requests


def build_score_requests(
    encode: Callable[..., list[int]],
    begin: tuple[int, ...],
    beginning: tuple[int, ...],
    contexts: Any,
    continuations: Any,
    **given: Any,
) -> list[Request]:
    """One request per context, whose `scored_ids` are its continuation, or all of it if there are no continuations.

    A context that is a text begins as prompts do. Context and continuation, both texts, are encoded together if that
    begins with the context's own ids, as lm-eval does; where a token would lie across the border, each by itself, which
    lm-eval does not.

    Args:
      encode: encode(text, begins=) -> ids.
      begin: ids before those of a text, as a `Tokenizer` has them.
      beginning: a context without ids, at least one.
      given: other fields of the requests.

    Raises:
      ConfigError: neither texts nor token ids, not as many continuations as contexts, or nothing to score.
    """
    encode = functools.partial(encode, begins=False)
    befores = _each_of("contexts", contexts)
    if continuations is None:
        pairs = [(beginning, _scored_ids(f"context {i}", text, encode)) for i, text in enumerate(befores)]
    else:
        afters = _each_of("continuations", continuations)
        if is_one(contexts) != is_one(continuations) or len(befores) != len(afters):
            raise ConfigError(
                f"continuations: {len(afters)} for {len(befores)} contexts; give one for one, or a list of as many"
            )
        pairs = [_pair(i, *both, encode, begin, beginning) for i, both in enumerate(zip(befores, afters, strict=True))]
    return [Request(ids, max_tokens=0, scored_ids=scored, **given) for ids, scored in pairs]


def _each_of(name: str, texts: Any) -> list[Any]:
    texts = np.asarray(texts) if isinstance(texts, jax.Array) else texts
    each = [texts] if is_one(texts) else list(texts)
    if not each:
        raise ConfigError(f"{name}: there are none; give at least one")
    return each


def _pair(
    index: int,
    context: Any,
    continuation: Any,
    encode: Callable[[str], list[int]],
    begin: tuple[int, ...],
    beginning: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a context, and of its continuation."""
    scored = _scored_ids(f"continuation {index}", continuation, encode)
    if not isinstance(context, str):
        return _ids(f"context {index}", context, encode) or beginning, scored
    before = tuple(encode(context)) if context else ()
    if isinstance(continuation, str):
        together = tuple(encode(context + continuation))
        if len(together) > len(before) and together[: len(before)] == before:
            scored = together[len(before) :]
    return (*begin, *before) if before else beginning, scored


def _scored_ids(name: str, text: Any, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    ids = () if isinstance(text, str) and not text else _ids(name, text, encode)
    if not ids:
        raise ConfigError(f"{name} = {shown(text)}: is empty; give at least one token to score")
    return ids


def _seeds(seed: Any, count: int, copies: int) -> list[int]:
    """Of one number on, or of a number for each prompt on."""
    if is_whole(seed):
        require_whole("seed", seed, 0, MAX_SEED)
        return [int(seed) + i for i in range(count * copies)]
    firsts = _one_each("seed", seed, count)
    for first in firsts:
        require_whole("seed", first, 0, MAX_SEED)
    return [int(first) + copy for first in firsts for copy in range(copies)]


def _ids(name: str, prompt: Any, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(encode(prompt))
    if isinstance(prompt, bytes | bytearray | memoryview | set | frozenset | Mapping):
        raise ConfigError(f"{name} = {shown(prompt)}: must be a text, or a sequence of token ids")
    return _converted(tuple, name, prompt)


def _converted(kind: type[Any], name: str, values: Any) -> Any:
    if not isinstance(values, Iterable):
        raise ConfigError(f"{name} = {shown(values)}: must be a sequence")
    try:
        return kind(np.asarray(values) if isinstance(values, jax.Array) else values)
    except TypeError as error:
        raise ConfigError(f"{name} = {shown(values)}: must be a sequence ({error})") from error


def _one_each(name: str, values: Any, count: int) -> list[Any]:
    values = _converted(list, name, values)
    if len(values) != count:
        raise ConfigError(f"{name}: {len(values)} for {count} prompts; give one, or one for each prompt")
    return values
