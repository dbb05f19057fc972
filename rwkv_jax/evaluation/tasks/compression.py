"""Compression: bits that a byte of any text takes, of texts that no training data can hold since they are newer.

The idea is that of uncheatable_eval (github.com/Jellyfish042/uncheatable_eval): collect what was written yesterday.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from rwkv_jax.checks import ConfigError
from rwkv_jax.data.text.files import inner_suffix, read_text
from rwkv_jax.evaluation.requests import Rolling
from rwkv_jax.evaluation.statistics import bits
from rwkv_jax.evaluation.tasks.base import Metric, Score, Task
from rwkv_jax.evaluation.tasks.records import Record, read_records


@dataclasses.dataclass(frozen=True)
class Document:
    """A text."""

    text: str
    group: str | None
    """Name of the file of records or of the folder that it comes from; None where only one file is read."""


def percent_of_bytes(mean_logprob: float) -> float:
    """Size of what an arithmetic coder makes of a text, from log p of a byte: percent of the text's bytes."""
    return 100 * bits(mean_logprob) / 8


@dataclasses.dataclass(frozen=True)
class Compression(Task[Document]):
    """Bits of a byte over all documents together, each from its first byte, and as percent of their size."""

    formats: ClassVar = (
        "a text file, which is one document; JSON lines with text; .json with a list of texts or of objects with text "
        "(as uncheatable_eval has them); or a folder with such files at any depth"
    )
    source: ClassVar = "uncheatable_eval"
    files: ClassVar = ()
    metrics: ClassVar = {
        "bits_per_byte": Metric(bits, higher_is_better=False, unit="bits per byte"),
        "compression_rate": Metric(percent_of_bytes, higher_is_better=False, unit="% of bytes"),
    }
    takes_examples: ClassVar = False
    name: str = "compression"

    @override
    def read(self, path: Path) -> list[Document]:
        if path.is_file():
            return [Document(text, None) for text in _texts(path)]
        if not path.is_dir():
            raise ConfigError(f"tasks: {self.name} = {str(path)!r}: no such file or folder")
        items = []
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            inside = file.relative_to(path).parts
            hidden = any(part.startswith(".") for part in inside)
            is_list = inner_suffix(file.name) in (".json", ".jsonl", ".ndjson")
            group = file.name.partition(".")[0] if is_list else inside[0] if len(inside) > 1 else None
            items += [] if hidden else [Document(text, group) for text in _texts(file)]
        return items

    @override
    def requests(self, item: Document, prefix: str = "") -> tuple[Rolling, ...]:
        return (Rolling(prefix + item.text),)

    @override
    def score(self, item: Document, results: Sequence[float]) -> dict[str, Score]:
        share = (float(results[0]), float(len(item.text.encode())))
        return dict.fromkeys(self.metrics, share)

    @override
    def group(self, item: Document) -> str | None:
        return item.group


def _texts(file: Path) -> Iterator[str]:
    """Texts of a file that are not empty."""
    suffix = inner_suffix(file.name)
    if suffix in (".jsonl", ".ndjson"):
        texts = [record.text("text", may_be_empty=True) for record in read_records(file)]
    elif suffix == ".json":
        texts = _listed(file)
    else:
        texts = [read_text(file)]
    yield from filter(None, texts)


def _listed(file: Path) -> list[str]:
    try:
        entries = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise ConfigError(
            f"{file}: must be a list of texts, or of objects with text; name a file as .txt to read it whole"
        )
    records = [
        Record(each if isinstance(each, dict) else {"text": each}, f"{file}, entry {i}")
        for i, each in enumerate(entries)
    ]
    return [record.text("text", may_be_empty=True) for record in records]
