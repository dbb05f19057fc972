"""The model card of a folder of weights: README.md as the Hugging Face hub reads it, of what is known of the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from rwkv_jax.checks import shown
from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.tensors import WeightsError

CARD_FILE = "README.md"

LIBRARY = "rwkv-jax"

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NO_LICENSE = ("other", "unknown", "none")  # say of no license which it is
_SIZES = {
    "num_layers": "layers",
    "width": "width",
    "head_dim": "head size",
    "ffn_width": "feed-forward width",
    "vocab_size": "vocabulary",
}
_SHOWN = 300  # characters of a value
_MARKDOWN = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*[]|<>&"})


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where weights are from, as far as it is known. No text of it has a path of this machine."""

    source: str | None = None
    """What they were made of."""
    base_model: str | None = None
    """OWNER/NAME on the hub of what they were made of."""
    relation: Literal["finetune", "quantized"] | None = None
    """What they are of the base, in the hub's words; None leaves it to the hub."""
    changes: tuple[str, ...] = ()
    """What was done to them on the way."""
    training: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """How they were trained, by what each line is called."""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the run that are not the defaults."""
    results: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What was measured in training."""
    trained_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Versions that the run was trained with."""


@dataclasses.dataclass(frozen=True)
class About:
    """What is said of weights that their tensors do not tell."""

    license: str | None = None
    """The hub's identifier, such as apache-2.0; None is not stated."""
    provenance: Provenance = dataclasses.field(default_factory=Provenance)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked to be said."""
        return self == About()


@dataclasses.dataclass(frozen=True)
class Files:
    """What was written."""

    name: str
    """Of the folder."""
    layout: str
    dtypes: Mapping[str, int]
    """Tensors by dtype."""
    num_bytes: int
    content_sha256: str | None = None
    tokenizer: str | None = None


def check_license(license: object) -> None:
    """Raises WeightsError for what is no identifier of a license."""
    if not isinstance(license, str) or _LICENSE.fullmatch(license) is None:
        raise WeightsError(
            f"license = {shown(license)}: must be the hub's identifier of a license, in small letters, such as "
            "apache-2.0, mit or cc-by-4.0"
        )
    if license in _NO_LICENSE:
        raise WeightsError(
            f"license = {license!r}: does not say which; give an identifier, or write license: other with license_name "
            f"and license_link into the front matter of {CARD_FILE} yourself"
        )


def model_card(model: ModelConfig, files: Files, about: About, versions: Mapping[str, str]) -> str:
    """The text of a model card: YAML between two lines of dashes, and Markdown.

    Args:
      versions: of what wrote the weights, by name.
    """
    origin = about.provenance
    parts = [
        front_matter(model, about),
        f"# {_text(files.name)}",
        f"{_text(model.title)}, {model.num_layers} layers of width {model.width}: {model.num_parameters():,} numbers.",
        _LOADING,
        _section("Model", _model_rows(model, files)),
        _section("Origin", _origin_rows(origin)),
        _section("Training", origin.training),
        _section("Measured in training", origin.results),
        _section("Settings that are not the defaults", origin.settings),
        _section("Trained with", origin.trained_with),
        _section("Written with", versions),
        "## License",
        license_text(about.license),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_LOADING = """\
## Loading

```python
from rwkv_jax import from_pretrained
model = from_pretrained("PATH")  # of this folder, or OWNER/NAME on the hub
logits, state = model(tokens)  # token ids, [batch, time]
```

    rwkv generate PATH --prompt "..."
    rwkv info PATH --verify"""


def front_matter(model: ModelConfig, about: About) -> str:
    """The YAML by which the hub knows a model; a license that is not stated is left out."""
    fields: dict[str, str | Sequence[str]] = {}
    if about.license is not None:
        fields["license"] = about.license
    fields |= {"library_name": LIBRARY, "pipeline_tag": "text-generation"}
    if about.provenance.base_model is not None:
        fields["base_model"] = about.provenance.base_model
        if about.provenance.relation is not None:
            fields["base_model_relation"] = about.provenance.relation
    fields["tags"] = ["rwkv", _tag(model.title), "jax"]
    lines = [
        f"{name}: {yaml_text(value)}"
        if isinstance(value, str)
        else "\n".join([f"{name}:", *(f"- {yaml_text(each)}" for each in value)])
        for name, value in fields.items()
    ]
    return "\n".join(["---", *lines, "---"])


def yaml_text(text: str) -> str:
    """A text as YAML has it in double quotes: on one line, whatever is in it, and never a number, a date or a null."""

    def escaped(character: str) -> str:
        if character in '\\"':
            return f"\\{character}"
        if character.isprintable():
            return character
        code = ord(character)
        if 0xD800 <= code < 0xE000:  # half a character, which no YAML has
            return "\N{REPLACEMENT CHARACTER}"
        return f"\\x{code:02x}" if code < 2**8 else f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"

    return f'"{"".join(map(escaped, text))}"'


def _tag(title: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-")


def _model_rows(model: ModelConfig, files: Files) -> dict[str, str]:
    resolved = model.resolved()
    rows = {"kind": model.title}
    for name in (*_SIZES, *model.spec.own_fields):
        value = getattr(resolved, name)
        if value not in (None, False, ()) and (name != "head_dim" or model.spec.has_heads):
            rows[_SIZES.get(name, name.replace("_", " "))] = "yes" if value is True else str(value)
    dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in files.dtypes.items())
    rows |= {
        "parameters": f"{model.num_parameters():,}",
        "tensors": f"{sum(files.dtypes.values())} ({dtypes}), {files.num_bytes / 1e6:.1f} MB",
        "names of tensors": files.layout,
    }
    if files.content_sha256 is not None:
        rows["SHA-256 of the tensors"] = files.content_sha256
    return rows | ({} if files.tokenizer is None else {"tokenizer": files.tokenizer})


def _origin_rows(origin: Provenance) -> dict[str, str]:
    rows = {} if origin.source is None else {"made of": origin.source}
    return rows | ({"changes": "; ".join(origin.changes)} if origin.changes else {})


def license_text(license: str | None) -> str:
    """What a card says under its last heading; None is not stated."""
    if license is not None:
        return _text(license)
    return (
        "Not stated: nothing in these files says what others may do with them. Whoever publishes them states it, in "
        "the first lines of this file, as in `license: apache-2.0`, or with `rwkv push --license`."
    )


def _section(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    lines = [f"| {_text(name)} | {_text(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _text(value: str) -> str:
    """A text within Markdown: on one line, not too long, and with no sign that means something there."""
    line = "".join(x if x.isprintable() else "\N{REPLACEMENT CHARACTER}" for x in " ".join(value.split()))
    line = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
    return line.translate(_MARKDOWN)
