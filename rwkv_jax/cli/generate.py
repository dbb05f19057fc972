"""`rwkv generate`: generates text with a model."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rwkv_jax.checks import ConfigError, checker
from rwkv_jax.cli.flags import SamplingFlags, TunedFlags, WeightsFlags, require_text
from rwkv_jax.cli.speed import Speed

if TYPE_CHECKING:
    from rwkv_jax.inference.engine.engine import Engine
    from rwkv_jax.inference.engine.requests import Completion

_MAX_SLOTS = 16
"""Texts generated concurrently; others are queued."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample from a training run, or from weights of any generation in any format that `convert` reads."""

    weights: Annotated[WeightsFlags, tyro.conf.arg(name="")]
    tuned: Annotated[TunedFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TunedFlags)
    prompt: str = ""
    """Text to continue; an empty one starts from nothing, and - reads standard input."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File with the prompt instead."""
    tokens: int = 256
    """Maximum tokens to generate; the model may end the text earlier."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; not included in it."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SamplingFlags)
    seed: int = 0
    """Random seed: the same seed generates the same text."""
    num: int = 1
    """Number of texts to generate, each with its own seed."""
    best_of: int = 1
    """Texts to generate for each one printed, which is the one with the greatest mean logprob."""
    json: bool = False
    """Print one JSON object per text, each on its own line."""
    logprobs: bool = False
    """With --json: each token's id and its logprob under the unmodified distribution."""
    tune: Literal["auto", "never"] = "auto"
    """auto takes what is fastest by measurement on this device, measured now if need be; never, the tables' choices."""
    verbose: bool = False
    """Report the speed on standard error, as on a terminal."""

    def run(self) -> None:
        """Loads the model and prints its text; a single text token by token."""
        arguments = self._arguments()
        prompt = self._read_prompt()

        from rwkv_jax.inference.engine.engine import Engine, EngineOptions

        options = EngineOptions(num_slots=min(self.num * self.best_of, _MAX_SLOTS), tune=self.tune)
        tuned = self.tuned.arguments(self.weights)
        engine = Engine(
            *self.weights.load(self.tuned), options, **tuned
        )  # the engine copies each layer; the stacked arrays can be freed
        ids = engine.encode(prompt, begins=True) if prompt else engine.beginning
        is_streamed = self.num == self.best_of == 1 and not self.json
        speed = Speed(is_streamed=is_streamed)
        if is_streamed:
            self._stream(engine, prompt, ids, speed, arguments)
        else:
            completions = engine.generate([ids] * self.num, best_of=self.best_of, **arguments)
            speed.count(sum(len(completion.ids) for completion in completions))
            self._print(completions, prompt)
        if self.verbose or sys.stderr.isatty():
            print(speed, file=sys.stderr)

    def _arguments(self) -> dict[str, Any]:
        """Arguments for the engine. Raises ConfigError before weights are loaded."""
        from rwkv_jax.inference.engine.text import check_stop_strings

        check = checker(self)
        for name in ("tokens", "num", "best_of"):
            check(getattr(self, name) >= 1, name, "must be at least 1")
        check(0 <= self.seed < 2**32, "seed", "must fit in 32 bits and not be negative")
        if self.seed > (most := 2**32 - self.num * self.best_of):
            raise ConfigError(
                f"seed = {self.seed}: {self.num * self.best_of} texts take as many seeds from it on, which must all "
                f"fit in 32 bits; give at most {most}"
            )
        if self.logprobs and not self.json:
            raise ConfigError("logprobs: are printed with --json only; add it")
        stop = check_stop_strings(self.stop)
        return {"max_tokens": self.tokens, "sampling": self.sampling.sampling(), "seed": self.seed, "stop": stop}

    def _read_prompt(self) -> str:
        """The prompt. Raises ConfigError if it cannot be read or is not UTF-8."""
        if self.prompt and self.prompt_file is not None:
            raise ConfigError("prompt: is given, and --prompt-file too; leave one of them out")
        place, prompt = "prompt", self.prompt
        try:
            if self.prompt_file is not None:
                place = f"prompt_file = {str(self.prompt_file)!r}"
                prompt = self.prompt_file.read_text(encoding="utf-8")
            elif self.prompt == "-":
                place = "standard input"
                prompt = sys.stdin.read()
        except OSError as error:
            raise ConfigError(f"{place}: cannot be read ({error.strerror}); name a file of text") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{place}: is not UTF-8 ({error}); convert it") from error
        require_text(f"{place} = {prompt!r}", prompt)
        return prompt

    def _stream(self, engine: Engine, prompt: str, ids: list[int], speed: Speed, arguments: dict[str, Any]) -> None:
        print(prompt, end="", flush=True)
        with engine.stream(ids, **arguments) as chunks:
            for chunk in chunks:
                speed.count(len(chunk.ids))
                print(chunk.text, end="", flush=True)
        print()

    def _print(self, completions: list[Completion], prompt: str) -> None:
        for number, completion in enumerate(completions, start=1):
            if self.json:
                print(json.dumps(self._record(completion, prompt), ensure_ascii=False))
            else:
                heading = f"--- {number} of {self.num}\n" if self.num > 1 else ""
                print(f"{heading}{prompt}{completion.text}")

    def _record(self, completion: Completion, prompt: str) -> dict[str, Any]:
        """A completion as plain data."""
        record = {
            "index": completion.index,
            "prompt": prompt,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "stop": completion.stop,
            "num_prompt_tokens": completion.num_prompt_tokens,
            "num_tokens": len(completion.ids),
            "mean_logprob": completion.mean_logprob,
        }
        if self.logprobs:
            record |= {"ids": completion.ids, "logprobs": completion.logprobs}
        return record
