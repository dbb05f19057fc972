"""lm-eval's model `rwkv_jax`: its tasks and metrics, with our engine (extra `eval`).

    python -m rwkv_jax.evaluation.lm_eval_model --model rwkv_jax --model_args pretrained=PATH --tasks lambada_openai

This is lm-eval's own command with the model registered: 0.4.13 has no place where others can add theirs. Its main
branch looks for the entry point `lm_eval.models`, which we declare: there `lm_eval --model rwkv_jax` does the same.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rwkv_jax.chat.choice import named_template
from rwkv_jax.checks import ConfigError, is_whole, require_whole, shown
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.evaluation.engine_scorer import EngineScorer, options_for
from rwkv_jax.evaluation.report import describe_model, versions
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, Rolling
from rwkv_jax.inference.chat.choice import choose_template
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.weights.pretrained import ComputeDtype, find_tokenizer, from_pretrained
from rwkv_jax.weights.quantized import Quantization
from rwkv_jax.weights.sources import find_weights

if TYPE_CHECKING:
    from pathlib import Path

    from rwkv_jax.chat.template import ChatTemplate

NAME = "rwkv_jax"
"""Of the model in lm-eval."""

_MISSING = "lm_eval: is not installed; pip install 'rwkv-jax[eval]'"
_SLOTS = 8  # as of `rwkv evaluate`
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
except ImportError:  # the module can be imported without the extra; its model cannot be made
    LM = None
_Base: Any = object if LM is None else LM


class RWKVJax(_Base):
    """A model of any generation, in an engine."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        tokenizer: str | None = None,
        dtype: ComputeDtype | None = None,
        quantize: Quantization | None = None,
        begin: bool = True,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        slots: int | None = None,
        template: str | None = None,
        revision: str | None = None,
        sha256: str | None = None,
        engine: Engine | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Loads the model, unless an engine has it.

        Args:
          pretrained: weights or a run, as of `from_pretrained`.
          tokenizer: as of `load_tokenizer`; None takes the one beside the weights.
          dtype, quantize: as of `from_pretrained`.
          begin: whether every context begins as texts do, World's with token 0.
          max_length: tokens at a time of whole texts; None carries the state over all of a text.
          max_gen_toks: most tokens of an answer for tasks that do not say.
          slots: texts on the device at once, 8 by default; a greater `batch_size` counts instead.
          template: of chats, as `rwkv chat --template` takes; None is the model's own.
          revision, sha256: of the weights, as of `from_pretrained`.
          engine: of a model that is loaded already, in place of all that is above of loading.
          batch_size: a number, possibly as text, or "auto", which leaves it to `slots`.
          max_batch_size, device: lm-eval gives them; where JAX runs is said by JAX_PLATFORMS.

        Raises:
          ConfigError: lm-eval is not installed; an engine with what only loading takes; or as `from_pretrained`,
            `load_tokenizer` and `EngineScorer`.
        """
        del max_batch_size, device
        if LM is None:
            raise ConfigError(_MISSING)
        super().__init__()
        if (engine is None) == (pretrained is None):
            raise ConfigError("pretrained: name weights, such as pretrained=PATH, or give an engine; one of the two")
        least = _least_slots(batch_size)
        if engine is not None:
            given = {"tokenizer": tokenizer, "dtype": dtype, "quantize": quantize, "slots": slots}
            _refuse_with_engine(engine, given, least)
        self._template: ChatTemplate | None = None if template is None else named_template(template)
        if pretrained is not None:
            place = find_weights(pretrained, revision=revision, sha256=sha256)
            model = from_pretrained(place, dtype=dtype, quantize=quantize)
            found = _tokenizer_of(place, tokenizer, model.config.vocab_size)
            if self._template is None:
                self._template = choose_template(place, found)
            num_slots = _SLOTS if slots is None else slots
            require_whole("slots", num_slots, 1)
            engine = Engine(model, found, options_for(model, max(num_slots, least)))
        assert engine is not None
        self.scorer = EngineScorer(engine, begin=begin, window=max_length)
        self._max_gen_toks = max_gen_toks

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        asked = [Loglikelihood(*request.args) for request in requests]
        with self._progress("loglikelihood", requests, disable_tqdm) as report:
            return [(logprob, is_greedy) for logprob, is_greedy in self.scorer.loglikelihood(asked, report)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        asked = [Rolling(*request.args) for request in requests]
        with self._progress("loglikelihood_rolling", requests, disable_tqdm) as report:
            return self.scorer.rolling(asked, report)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers. Raises ConfigError for a task that samples, before anything is generated."""
        asked = [self._generation(*request.args) for request in requests]
        with self._progress("generate_until", requests, disable_tqdm) as report:
            return self.scorer.generate(asked, report)

    def _generation(self, context: str, arguments: Mapping[str, Any]) -> Generate:
        if arguments.get("do_sample") or (arguments.get("do_sample") is None and arguments.get("temperature")):
            raise ConfigError(f"gen_kwargs = {shown(dict(arguments))}: answers are greedy here; leave do_sample out")
        until = arguments.get("until") or ()
        limits = (arguments[name] for name in _LIMITS if arguments.get(name) is not None)
        strings = (until,) if isinstance(until, str) else tuple(until)
        return Generate(context, strings, int(next(limits, self._max_gen_toks)))

    def _progress(self, kind: str, requests: Sequence[Any], is_silent: bool) -> _Progress:
        return _Progress(kind, requests, is_silent, self.cache_hook.add_partial)

    # What lm-eval asks about a model.

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.scorer.engine.tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer, by which lm-eval tells cached requests apart."""
        return self.scorer.engine.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model."""
        settings = {"begin": self.scorer.begin, "max_length": self.scorer.window}
        return {"rwkv_jax": {**describe_model(self.scorer.engine), **settings, "versions": versions()}}

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the results file says of the template."""
        return repr(self._template) if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model reads it. Raises ConfigError if an engine came without a template."""
        if self._template is None:
            raise ConfigError("template = None: name one, such as template=world")
        return self._template.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


class _Progress:
    """lm-eval's bar, and its cache of results, which hears of each as it comes."""

    def __init__(self, kind: str, requests: Sequence[Any], is_silent: bool, keep: Callable[..., None]) -> None:
        from tqdm import tqdm

        self._kind, self._requests, self._keep = kind, requests, keep
        self._bar = tqdm(total=len(requests), desc=kind, disable=is_silent)

    def __enter__(self) -> Callable[[int, Any], None]:
        return self._take

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def _take(self, index: int, result: Any) -> None:
        self._bar.update()
        self._keep(self._kind, self._requests[index].args, tuple(result) if isinstance(result, tuple) else result)


def _least_slots(batch_size: int | str | None) -> int:
    """What `batch_size` asks for, which lm-eval's command line gives as text; 1 if it leaves that to us."""
    if batch_size is None or batch_size == "auto":
        return 1
    if isinstance(batch_size, str) and batch_size.isdecimal():
        batch_size = int(batch_size)
    if not isinstance(batch_size, int) or not is_whole(batch_size) or batch_size < 1:
        raise ConfigError(f"batch_size = {shown(batch_size)}: must be a whole number, not less than 1, or auto")
    return batch_size


def _refuse_with_engine(engine: Engine, given: Mapping[str, Any], least_slots: int) -> None:
    """Raises ConfigError for what an engine has been told already, and for more slots than it has."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} = {shown(value)}: the engine has its own; leave it out, or give pretrained")
    if least_slots > (there := engine.options.num_slots):
        raise ConfigError(f"batch_size = {least_slots}: the engine has {there} slots; leave it out, or make more")


def _tokenizer_of(place: Path, named: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer that is named, or the one beside the weights. Raises ConfigError if there is none."""
    if (found := find_tokenizer(place, vocab_size, named)) is None:
        raise ConfigError(f"{place}: no tokenizer lies beside it; name one, such as tokenizer=world")
    return found


def main() -> None:
    """lm-eval's command line with the model registered, for releases that do not find it by themselves."""
    try:
        importlib.import_module("lm_eval.models")  # registers lm-eval's own
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit(f"rwkv: {_MISSING}")
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"rwkv_jax.evaluation.lm_eval_model:{RWKVJax.__name__}")
    cli_evaluate()


if __name__ == "__main__":
    main()
