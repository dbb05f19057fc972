"""Converts between the tensor names and shapes of other projects and the official ones, as views.

`transformers` 5.23 (RWKV-4; the models of RWKV-5 and 6 that came with code of their own on its hub are read too) only
renames. Its numbers are the official ones, up to `rescale_every`: its models halve their hidden states after that many
layers when they evaluate, and divide the weights of the layers behind by the same powers of two *in place*. A file
saved from a model that has evaluated has the divided weights without any indication: converted, it gives other numbers
(and so it does in `transformers`, which divides again). Files by its converter, and those saved before an evaluation or
during training, have the original weights.

`flash-linear-attention` 0.6 (RWKV-6 and 7) names linear layers anew, keeps low-rank matrices transposed, as linear
layers, drops axes of size 1, and in RWKV-6 puts the five data-dependent mixes in the order r, w, k, v, g (official:
w, k, v, r, g) and their biases into one tensor. Numbers that differ there for the same weights:

- RWKV-6 normalizes heads with epsilon 1e-5, officially 64e-5; its config has no field for it (logits of small random
  models move by 0.1). Setting `layer.attn.g_norm.eps = 64e-5` on every layer after loading gives the official numbers.
- RWKV-7 takes head size x 1e-5: the official 64e-5 for heads of 64 only.
- RWKV-7 with `fuse_norm` divides keys by sqrt(|k|^2 + 1e-6), officially by max(|k|, 1e-12); `hub_config` turns it off.

`huggingface` (RWKV-7), the RWKV organization's own folders on the hub, only puts a prefix before the official names and
adds the value residual of layer 0 as zeros; see `hub_rwkv7`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config.generations import recognize
from rwkv_jax.weights.derived import add_unused, selected
from rwkv_jax.weights.hub_rwkv7 import LAYOUT as HUGGINGFACE
from rwkv_jax.weights.hub_rwkv7 import are_placeholders, refuse_both_prefixes
from rwkv_jax.weights.layout_rules import LLAMA, WRITTEN, Rule, Written, as_row, read_tables, unchanged
from rwkv_jax.weights.model_config import UNUSED, read_config, refuse_adapters, refuse_converted
from rwkv_jax.weights.rosa_demo import LAYOUT as DEMO
from rwkv_jax.weights.rosa_demo import from_demo, is_demo
from rwkv_jax.weights.tensors import DerivedTensors, LazyTensor, TensorSpec, WeightsError, join_names, tensor_spec

LAYOUTS = ("official", "transformers", "flash-linear-attention", HUGGINGFACE)

_MAX_WRAPPERS = 16
# Of DeepSpeed, torch.compile, FSDP, DDP, PEFT and Lightning. What is of the layout itself ("model." of
# flash-linear-attention) stays, since a name is looked up before the next prefix is taken off.
_WRAPPERS = ("_forward_module.", "_orig_mod.", "_fsdp_wrapped_module.", "module.", "base_model.model.", "model.")


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """Computes one tensor from others."""

    sources: tuple[str, ...]
    make: Callable[..., NDArray]


def _made_on_access(tensors: Mapping[str, NDArray], recipes: Mapping[str, _Recipe]) -> DerivedTensors:
    """Tensors computed from others on access: views, except where several are joined.

    Raises WeightsError for a tensor with an unsuitable shape.
    """

    def make(recipe: _Recipe) -> NDArray:
        return recipe.make(*(tensors[source] for source in recipe.sources))

    return DerivedTensors(
        {
            name: LazyTensor(_dry_run(tensors, name, recipe), functools.partial(make, recipe))
            for name, recipe in recipes.items()
        }
    )


def _dry_run(tensors: Mapping[str, NDArray], name: str, recipe: _Recipe) -> TensorSpec:
    specs = [tensor_spec(tensors, source) for source in recipe.sources]
    found = ", ".join(
        f"{source} {list(spec.shape)} {spec.dtype}" for source, spec in zip(recipe.sources, specs, strict=True)
    )
    if len({spec.dtype for spec in specs}) > 1:
        raise WeightsError(f"{name} joins tensors of several dtypes ({found}); convert them to one")
    try:
        # One zero broadcast to the whole tensor: the same views and joins without memory.
        made = recipe.make(*(np.broadcast_to(np.zeros((), spec.dtype), spec.shape) for spec in specs))
    except (ValueError, IndexError) as error:
        raise WeightsError(f"{name} cannot be made of {found}: {error}; is the file what it claims to be?") from error
    return TensorSpec(made.shape, made.dtype)


def from_layout(
    tensors: Mapping[str, NDArray],
    values: Mapping[str, Any] | None = None,
    *,
    tied: bool | None = None,
    keep_unused: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[str, Mapping[str, NDArray]]:
    """Detects the layout of tensors (of `LAYOUTS`, `LLAMA` or `DEMO`), and maps them to official names and shapes.

    Prefixes of wrappers (`module.`, `_orig_mod.`, `base_model.model.` and so on, also nested) are removed if every name
    has them. Missing names are not checked here.

    Args:
      values: a file's other values, which identify files converted by the `rwkv` package.
      tied: whether the embedding is used as head if there is none; None means yes.
      keep_unused: keeps layer 0's value residual in the layout huggingface also if it is nothing but the zeros that
        files without it are given there.
      report: gets messages about removed prefixes and tied weights.

    Raises:
      WeightsError: unknown names, a prefix that only some names have, duplicate tensors, an invalid shape, or a file
        converted by the `rwkv` package.
    """
    values = values or {}
    refuse_converted(tensors, values)
    refuse_adapters(tensors)
    if not tensors:
        raise WeightsError("there are no tensors; name a file of weights")
    if is_demo(tensors):
        return DEMO, from_demo(tensors)
    prefix = ""
    names = {name: name for name in tensors}
    fewest = list(names)
    tables = read_tables()
    for _ in range(_MAX_WRAPPERS + 1):
        for layout, table in tables:
            unknown = [name for name in names if _template(name) not in table]
            if not unknown:
                if prefix:
                    report(f"every name begins with {prefix!r}, which is taken off")
                unchanged = layout == "official" and not prefix
                official = tensors if unchanged else _made_on_access(tensors, _recipes_to_official(names, table))
                if layout == HUGGINGFACE and not keep_unused and are_placeholders(official):
                    official = selected(official, [name for name in official if name not in UNUSED])
                return layout, _with_axes(_with_head(layout, official, tied, report), report)
            fewest = min(fewest, unknown, key=len)
        wrapper = next((wrapper for wrapper in _WRAPPERS if all(name.startswith(wrapper) for name in names)), None)
        if wrapper is None:
            break
        prefix += wrapper
        names = {name.removeprefix(wrapper): source for name, source in names.items()}
    refuse_both_prefixes(names)
    for wrapper in _WRAPPERS[:-1]:
        bare = [name for name in names if not name.startswith(wrapper)]
        if 0 < len(bare) < len(names):
            raise WeightsError(
                f"some names begin with {wrapper!r} and these do not: {join_names(bare)}; two models in one file are "
                "not read"
            )
    raise WeightsError(
        f"these names are of no known layout: {join_names(fewest)}; "
        f"known are {', '.join(LAYOUTS)} (RWKV-4 to 7, without additions of single forks), and those of Llama and Qwen"
    )


def _with_head(
    layout: str, tensors: Mapping[str, NDArray], tied: bool | None, report: Callable[[str], None]
) -> Mapping[str, NDArray]:
    """Official tensors with the embedding as head; a Llama's tied head is no tensor of its own."""
    if layout == LLAMA:
        kept = [name for name in tensors if not tied or name != "head.weight"]
        return (
            tensors
            if len(kept) == len(tensors)
            else _made_on_access(tensors, {x: _Recipe((x,), unchanged) for x in kept})
        )
    if tied is False or "head.weight" in tensors or "emb.weight" not in tensors:
        return tensors
    report("there is no head: its matrix is the embedding's (tied weights)")
    recipes = {name: _Recipe((name,), unchanged) for name in tensors}
    return _made_on_access(tensors, recipes | {"head.weight": _Recipe(("emb.weight",), unchanged)})


def _with_axes(tensors: Mapping[str, NDArray], report: Callable[[str], None]) -> Mapping[str, NDArray]:
    """Official tensors, of which those that files may hold as [C] (`GenerationSpec.flat_vectors`) are [1, 1, C]."""
    shapes = {name: tensor_spec(tensors, name).shape for name in tensors}
    spec = recognize(shapes)
    names = frozenset[str]() if spec is None else spec.flat_vectors
    flat = [
        name for name, shape in shapes.items() if len(shape) == 1 and name.partition(".")[2].partition(".")[2] in names
    ]
    if not flat:
        return tensors
    report(f"{join_names(flat, 4)}: of one axis, read as [1, 1, C], and so written")
    recipes = {name: _Recipe((name,), unchanged) for name in tensors}
    return _made_on_access(tensors, recipes | {name: _Recipe((name,), as_row) for name in flat})


def to_layout(tensors: Mapping[str, NDArray], layout: str) -> Mapping[str, NDArray]:
    """Official tensors under the names and shapes of another layout: views, except for two or three of RWKV-6.

    `transformers` takes RWKV-4, `flash-linear-attention` takes RWKV-6 and 7, without `blocks.0.att.v0`, `v1`, `v2`:
    they are unused and not supported there. `huggingface` takes RWKV-7, with these as zeros if they are missing.
    Raises WeightsError for a layout that is unknown or lacks this generation, and for names that it does not have.
    """
    if layout not in LAYOUTS:
        raise WeightsError(f"layout = {layout!r}: must be one of {', '.join(LAYOUTS)}")
    if layout == "official":
        return tensors
    rules = _written(layout, tensors).rules
    left_out = UNUSED if layout == "flash-linear-attention" else ()
    return to_rules(_whole(layout, tensors), rules, layout, left_out)


def _whole(layout: str, tensors: Mapping[str, NDArray]) -> Mapping[str, NDArray]:
    """Official tensors with those that a layout has always."""
    return add_unused(tensors, read_config(tensors)) if layout == HUGGINGFACE else tensors


def to_rules(
    tensors: Mapping[str, NDArray], rules: Iterable[Rule], layout: str, left_out: Collection[str] = ()
) -> DerivedTensors:
    """Official tensors under the names and shapes of some rules, without those that are left out.

    Raises WeightsError, which calls the rules `layout`, for names that they do not have.
    """
    by_official = {_template(name) or name: rule for rule in rules for name in rule.official}
    recipes: dict[str, _Recipe] = {}
    unknown: list[str] = []
    for name in tensors:
        if name in left_out:
            continue
        rule = by_official.get(_template(name))
        if rule is None:
            unknown.append(name)
            continue
        layer = _layer(name)
        sources = tuple(official.format(layer) for official in rule.official)
        missing = [source for source in sources if source not in tensors]
        if missing:
            raise WeightsError(f"{rule.foreign.format(layer)} of {layout} needs {join_names(missing)}, not among these")
        recipes[rule.foreign.format(layer)] = _Recipe(sources, rule.pack)
    if unknown:
        raise WeightsError(f"{layout} has no place for {join_names(unknown)}; write the official layout")
    return _made_on_access(tensors, recipes)


def from_rules(tensors: Mapping[str, NDArray], rules: Iterable[Rule], layout: str) -> DerivedTensors:
    """Tensors under the names and shapes of some rules, under official ones. Missing names are not checked here.

    Raises WeightsError, which calls the rules `layout`, for a name that they do not have, a tensor that is there twice,
    and an invalid shape.
    """
    table = {rule.foreign: rule for rule in rules}
    if unknown := [name for name in tensors if _template(name) not in table]:
        raise WeightsError(f"these names are not {layout}: {join_names(unknown)}")
    return _made_on_access(tensors, _recipes_to_official({name: name for name in tensors}, table))


def hub_config(layout: str, tensors: Mapping[str, NDArray]) -> dict[str, Any]:
    """The `config.json` with which others load what `to_layout` gives.

    `tensors` have official names. Token 0 begins and ends texts, as in every official vocabulary. `rescale_every` is 6
    for float16, which needs it, and 0 otherwise, as in the `rwkv` package; `context_length` only sizes a CUDA kernel.
    Raises WeightsError as `to_layout` does, and for the official layout, which has no such file.
    """
    if layout not in LAYOUTS or layout == "official":
        raise WeightsError(f"layout = {layout!r}: a config.json exists for {', '.join(LAYOUTS[1:])} only")
    written = _written(layout, tensors)
    tensors = _whole(layout, tensors)

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise WeightsError(f"{name} is missing; a config is made of a whole model")
        return tensor_spec(tensors, name).shape

    vocab_size, width = shape("emb.weight")
    common = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shape("blocks.0.ffn.key.weight")[0],
        "num_hidden_layers": 1 + max(int(_layer(name)) for name in tensors if name.startswith("blocks.")),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": tensor_spec(tensors, "emb.weight").dtype.name,
    }
    return written.describe(common, shape)


def _template(name: str) -> str:
    """A name with `{}` for its layer; names with braces are in no layout."""
    return "" if re.search(r"[{}]", name) else re.sub(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)", "{}", name, count=1)


def _layer(name: str) -> str:
    found = re.search(r"\.([0-9]+)\.", name)
    return "" if found is None else found[1]


def _recipes_to_official(names: Mapping[str, str], table: Mapping[str, Rule]) -> dict[str, _Recipe]:
    recipes: dict[str, _Recipe] = {}
    for name, source in names.items():
        rule, layer = table[_template(name)], _layer(name)
        for official, unpack in zip(rule.official, rule.unpack, strict=True):
            made = official.format(layer)
            if made in recipes:
                raise WeightsError(f"{recipes[made].sources[0]} and {source} are both {made}; remove one of them")
            recipes[made] = _Recipe((source,), unpack)
    return recipes


def _written(layout: str, tensors: Mapping[str, NDArray]) -> Written:
    spec = recognize({name: tensor_spec(tensors, name).shape for name in tensors})
    if spec is None:
        raise WeightsError("these are no tensors of RWKV-4 to 7 under their official names; see from_layout")
    written = WRITTEN.get((layout, spec.name))
    if written is None:
        held = " and ".join(f"RWKV-{known}" for name, known in WRITTEN if name == layout)
        raise WeightsError(f"{layout} has {held}, not {spec.title}; write the official layout")
    return written
