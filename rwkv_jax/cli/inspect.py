"""`rwkv inspect`: what is inside a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rwkv_jax.checks import ConfigError, checker, require
from rwkv_jax.cli.flags import WeightsFlags, require_text

if TYPE_CHECKING:
    from rwkv_jax.data.tokenizers import Tokenizer
    from rwkv_jax.evaluation.inspect.probes import Recall
    from rwkv_jax.evaluation.inspect.tracing import CausalTrace
    from rwkv_jax.models import LanguageModel

_TEXT = """\
The lighthouse keeper wrote down the weather every morning. On the first of March there was fog, on the second there \
was rain, and on the third the sun came out. Nobody else lived on the island, so nobody read what he wrote. When the \
new keeper came in spring, she opened the book and asked: what was the weather on the second of March?"""

_DISTANCES = (0, 1, 2, 4, 8, 16, 32)
_KINDS = 8
"""Different tokens of the texts for --recall."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what is inside a model: half-lives, state norms and ranks, attention maps; on request recall and a trace."""

    weights: Annotated[WeightsFlags, tyro.conf.arg(name="")]
    text: str | None = None
    """Text to read; None is a short one of ours, in English."""
    text_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File with the text instead."""
    tokens: int = 256
    """Tokens of the text to read, at most."""
    map_tokens: int = 48
    """Of these, tokens of the attention maps, at most."""
    recall: bool = False
    """Also read 512 random texts, and find by linear probes of the last layer's state how far back it knows them."""
    trace: str | None = None
    """Also trace this prompt, such as "The Eiffel Tower is in the city of": which layer knows, at which token?"""
    subject: str | None = None
    """With --trace: the part of the prompt that is corrupted by noise, such as "Eiffel Tower"."""
    answer: str | None = None
    """With --trace: the text whose first token is the answer; None is what the model would say."""
    noise: float = 3.0
    """With --trace: standard deviation of the noise, in those of the prompt's token vectors."""
    samples: int = 4
    """With --trace: draws of the noise."""
    seed: int = 0
    """Random seed of noise and random texts."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """New folder for inspection.json, which has all numbers, and the pictures; None prints the table only."""

    def run(self) -> None:
        """Loads the model, prints a line a layer, and writes the folder."""
        text = self._checked_text()

        from rwkv_jax.evaluation.inspect.report import as_json, as_table, inspect_text

        model, tokenizer = self.weights.load()
        ids = _begun(tokenizer, text)[: self.tokens]
        prompt, subject, answer = self._prompt(tokenizer)
        inspection = inspect_text(model, ids, self.map_tokens)
        print(f"{model.config.title}, {len(ids)} tokens of text; all lengths in tokens")
        print(as_table(inspection))
        recall, trace = self._recall(model, tokenizer) if self.recall else None, None
        if recall is not None:
            shown = ", ".join(f"{n}: {share:.0%}" for n, share in zip(recall.distances, recall.accuracy, strict=True))
            print(f"a probe of the last layer's state finds the token at distance {shown}; chance {recall.chance:.0%}")
        if prompt:
            from rwkv_jax.evaluation.inspect.tracing import causal_trace

            trace = causal_trace(model, prompt, subject, answer, noise=self.noise, samples=self.samples, seed=self.seed)
            print(_of_trace(trace, tokenizer, prompt))
        if self.out is not None:
            record = {
                "model": dataclasses.asdict(dataclasses.replace(model.config, **_no_implementations(model))),
                "pieces": _pieces(tokenizer, ids),
                **as_json(inspection),
                "recall": as_json(recall),
                "trace": None if trace is None else {"pieces": _pieces(tokenizer, prompt), **as_json(trace)},
            }
            self._write(record, inspection, trace)

    def _checked_text(self) -> str:
        """The text. Raises ConfigError for flags that cannot be, before weights are loaded."""
        from rwkv_jax.atomic import refuse_existing

        check = checker(self)
        for name in ("tokens", "map_tokens", "samples"):
            check(getattr(self, name) >= 1, name, "must be at least 1")
        check(self.noise >= 0, "noise", "must not be negative")
        check(0 <= self.seed < 2**32, "seed", "must fit in 32 bits and not be negative")
        if self.trace is None:
            for name in ("subject", "answer"):
                check(getattr(self, name) is None, name, "belongs to --trace; give that too, or leave it out")
        else:
            require_text(f"trace = {self.trace!r}", self.trace)
            check(bool(self.subject), "subject", "a trace needs one: give the part of the prompt to corrupt")
            check(self.answer != "", "answer", "must have a text; leave it out for what the model would say")
            check(str(self.subject) in self.trace, "subject", f"must be a part of the prompt {self.trace!r}")
        if self.out is not None:
            refuse_existing(self.out.expanduser(), label=f"out = {str(self.out)!r}")
        if self.text is not None and self.text_file is not None:
            raise ConfigError("text: is given, and --text-file too; leave one of them out")
        text, place = (_TEXT if self.text is None else self.text), f"text = {self.text!r}"
        if self.text_file is not None:
            place = f"text_file = {str(self.text_file)!r}"
            try:
                text = self.text_file.expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"{place}: cannot be read ({error.strerror}); name a file of text") from error
            except UnicodeDecodeError as error:
                raise ConfigError(f"{place}: is not UTF-8 ({error}); convert it") from error
        require_text(place, text)
        if not text:
            raise ConfigError(f"{place}: is empty; give some text")
        return text

    def _prompt(self, tokenizer: Tokenizer) -> tuple[list[int], tuple[int, int], int | None]:
        """Token ids of the traced prompt, where its subject lies in them, and the answer; an empty list for none."""
        if self.trace is None or self.subject is None:
            return [], (0, 0), None
        prompt = _begun(tokenizer, self.trace)
        ends = [0]
        for token in prompt:
            ends.append(ends[-1] + len(tokenizer.token_bytes(token)))
        first = len(self.trace[: self.trace.index(self.subject)].encode())
        last = first + len(self.subject.encode())
        if ends[-1] != len(self.trace.encode()):  # a tokenizer that rewrites its text: places cannot be told
            raise ConfigError(f"trace = {self.trace!r}: the tokenizer changes this text; take other characters")
        within = [i for i in range(len(prompt)) if ends[i] < last and ends[i + 1] > first]
        answer = None if self.answer is None else tokenizer.encode(self.answer)[0]
        return prompt, (within[0], within[-1] + 1), answer

    def _recall(self, model: LanguageModel, tokenizer: Tokenizer) -> Recall:
        import numpy as np

        from rwkv_jax.evaluation.inspect.probes import recall_by_distance

        named = [token for token in range(model.config.vocab_size) if tokenizer.is_named(token)]
        require(
            len(named) >= _KINDS, "recall", True, f"needs {_KINDS} different tokens; this tokenizer has {len(named)}"
        )
        kinds = np.random.default_rng(self.seed).choice(named, _KINDS, replace=False)
        last = model.config.num_layers - 1
        return recall_by_distance(
            model, _DISTANCES, tokens=kinds.tolist(), layers=[last], num_texts=512, seed=self.seed
        )

    def _write(self, record: dict[str, Any], inspection: Any, trace: CausalTrace | None) -> None:
        from rwkv_jax.atomic import new_folder
        from rwkv_jax.evaluation.inspect.pictures import draw_trace
        from rwkv_jax.evaluation.inspect.report import draw

        assert self.out is not None
        with new_folder(self.out.expanduser(), label=f"out = {str(self.out)!r}") as folder:
            (folder / "inspection.json").write_text(json.dumps(record, allow_nan=False) + "\n")
            draw(inspection, folder, record["pieces"])
            if trace is not None:
                draw_trace(trace, folder / "trace.png", pieces=record["trace"]["pieces"])
        print(f"{self.out}: inspection.json and pictures")


def _begun(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text, after the token that begins every text."""
    return [tokenizer.end_of_text, *tokenizer.encode(text)]


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


def _no_implementations(model: LanguageModel) -> dict[str, None]:
    """Names of implementations are no part of what a model is."""
    from rwkv_jax.config.model import IMPLEMENTATIONS

    return {name: None for name in IMPLEMENTATIONS if getattr(model.config, name) is not None}


def _of_trace(trace: CausalTrace, tokenizer: Tokenizer, prompt: list[int]) -> str:
    """The trace in a line: what the answer's probability was, and where putting back brings it nearest."""
    layer, place = divmod(int(abs(trace.restored[:-1] - trace.clean).argmin()), trace.restored.shape[1])
    return (
        f"{tokenizer.decode([trace.answer])!r}: probability {trace.clean:.3g}, {trace.corrupted:.3g} with the subject "
        f"corrupted; of the layers below the last, putting back layer {layer} at {tokenizer.decode([prompt[place]])!r} "
        f"brings it nearest, to {trace.restored[layer, place]:.3g}"
    )
