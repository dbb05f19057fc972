"""WikiText: perplexity of articles (Merity et al. 2016, arXiv:1609.07843).

A page is detokenized before it is scored, but its words and bytes are counted before: perplexities of any tokenizers
compare, and are those of the published, tokenized text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.data.text.files import inner_suffix, read_text
from rwkv_jax.evaluation.requests import Rolling
from rwkv_jax.evaluation.statistics import bits, perplexity
from rwkv_jax.evaluation.tasks.base import Metric, Score, Task
from rwkv_jax.evaluation.tasks.records import Record, read_records


@dataclasses.dataclass(frozen=True)
class Page:
    """An article as it is published."""

    text: str


@dataclasses.dataclass(frozen=True)
class WikiText(Task[Page]):
    """Perplexity of a word and of a byte, and bits of a byte, over all pages together."""

    formats: ClassVar = "JSON lines with page, or wiki.test.raw and wiki.test.tokens, which are cut at their headings"
    source: ClassVar = "lm-eval wikitext 2.0"
    files: ClassVar = ("wiki.test.raw", "wiki.test.tokens", "test.jsonl")
    metrics: ClassVar = {
        "word_perplexity": Metric(perplexity, higher_is_better=False, unit="per word"),
        "byte_perplexity": Metric(perplexity, higher_is_better=False, unit="per byte"),
        "bits_per_byte": Metric(bits, higher_is_better=False, unit="bits per byte"),
    }
    takes_examples: ClassVar = False
    name: str = "wikitext"

    @override
    def read_file(self, file: Path) -> list[Page]:
        if inner_suffix(file.name) in (".jsonl", ".json", ".ndjson"):
            return [self.read_item(record) for record in read_records(file)]
        return [Page(page) for page in pages_of(read_text(file))]

    @override
    def read_item(self, record: Record) -> Page:
        return Page(record.text("page"))

    @override
    def requests(self, item: Page, prefix: str = "") -> tuple[Rolling, ...]:
        return (Rolling(prefix + detokenize(item.text)),)

    @override
    def score(self, item: Page, results: Sequence[float]) -> dict[str, Score]:
        logprob, num_bytes = float(results[0]), float(len(item.text.encode()))
        return {
            "word_perplexity": (logprob, float(len(re.split(r"\s+", item.text)))),
            "byte_perplexity": (logprob, num_bytes),
            "bits_per_byte": (logprob, num_bytes),
        }


def pages_of(text: str) -> list[str]:
    """The articles of a split, which begin at headings of the first level, such as ` = Title = `."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _plain(*pairs: tuple[str, str]) -> list[Callable[[str], str]]:
    return [lambda text, old=old, new=new: text.replace(old, new) for old, new in pairs]


def _pattern(pattern: str, replacement: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, replacement, text)


_STEPS: tuple[Callable[[str], str], ...] = (
    *_plain(("s '", "s'")),
    _pattern(r"/' [0-9]/", "/'[0-9]/"),  # as lm-eval has it: a pattern that was meant to lose its blank
    *_plain((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_plain(*((f" {mark} ", f"{mark} ") for mark in ":;.!?,")),
    _pattern(r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    _pattern(r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    _pattern(r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    _pattern(r'"\s*([^"]*?)\s*"', r'"\1"'),
    _pattern(r"'\s*([^']*?)\s*'", r"'\1'"),
    *_plain(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *_plain((" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}")),
    *_plain((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def detokenize(text: str) -> str:
    """A page as one would write it, as lm-eval 0.4 makes it: without the blanks around marks."""
    for step in _STEPS:
        text = step(text)
    return text
