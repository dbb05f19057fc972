"""The names that other projects give to the tensors of RWKV, to and from the official ones, without copies.

`transformers` 5.23 (RWKV-4; the models of RWKV-5 and 6 that came with code of their own on its hub are read too) only
renames. Its numbers are the official ones, up to `rescale_every`: its models halve their hidden states after that many
layers when they evaluate, and divide the weights of the layers behind by the same powers of two *in place*. A file
saved from a model that has evaluated holds the divided weights and nothing says so: converted, it gives other numbers
(and so it does in `transformers`, which divides again). Files by its converter, and those saved before an evaluation or
during training, hold the weights as they are.

`flash-linear-attention` 0.6 (RWKV-6 and 7) names linear layers anew, keeps low-rank matrices transposed, as linear
layers, drops axes of size 1, and in RWKV-6 puts the five data-dependent mixes in the order r, w, k, v, g (official:
w, k, v, r, g) and their biases into one tensor. Numbers that differ there for the same weights:

- RWKV-6 normalizes heads with epsilon 1e-5, officially 64e-5; its config has no field for it (logits of small random
  models move by 0.1). Setting `layer.attn.g_norm.eps = 64e-5` on every layer after loading gives the official numbers.
- RWKV-7 takes head size x 1e-5: the official 64e-5 for heads of 64 only.
- RWKV-7 with `fuse_norm` divides keys by sqrt(|k|^2 + 1e-6), officially by max(|k|, 1e-12); `hub_config` turns it off.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config.generations import GENERATIONS, recognize
from rwkv_jax.models.language_model import SHARED_AXES
from rwkv_jax.weights.tensors import DerivedTensors, TensorSpec, WeightsError, listed, tensor_spec

LAYOUTS = ("official", "transformers", "flash-linear-attention")

_Change = Callable[[NDArray], NDArray]
_ShapeOf = Callable[[str], tuple[int, ...]]

_UNUSED = frozenset(f"blocks.0.att.v{i}" for i in range(3))  # the first layer of RWKV-7 has no value residual
_CONVERTED = ("_strategy", "_rescale_layer")  # values that only converted files of the rwkv package have
_PREFIX = "_forward_module."  # DeepSpeed's, of a model that it has wrapped
_MIXES = "wkvrg"  # of RWKV-6, in their official order
_FUSED_MIXES = "rwkvg"  # in that of flash-linear-attention


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How one tensor is made of others."""

    sources: tuple[str, ...]
    make: Callable[..., NDArray]


class LazyTensors(DerivedTensors):
    """Tensors by name, made of those of another mapping when they are asked for: views, but for what must be joined.

    Raises WeightsError when it is built, for a tensor whose shape does not allow it.
    """

    def __init__(self, tensors: Mapping[str, NDArray], recipes: Mapping[str, _Recipe]) -> None:
        self._tensors = tensors
        self._recipes = dict(recipes)
        self._specs = {name: self._dry_run(name, recipe) for name, recipe in self._recipes.items()}

    def __getitem__(self, name: str) -> NDArray:
        recipe = self._recipes[name]
        return recipe.make(*(self._tensors[source] for source in recipe.sources))

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def spec(self, name: str) -> TensorSpec:
        """See `DerivedTensors`."""
        return self._specs[name]

    def _dry_run(self, name: str, recipe: _Recipe) -> TensorSpec:
        specs = [tensor_spec(self._tensors, source) for source in recipe.sources]
        found = ", ".join(
            f"{source} {list(spec.shape)} {spec.dtype}" for source, spec in zip(recipe.sources, specs, strict=True)
        )
        if len({spec.dtype for spec in specs}) > 1:
            raise WeightsError(f"{name} joins tensors of several dtypes ({found}); convert them to one")
        try:
            # One zero, seen as the whole tensor: the same views and joins, without its bytes.
            made = recipe.make(*(np.broadcast_to(np.zeros((), spec.dtype), spec.shape) for spec in specs))
        except (ValueError, IndexError) as error:
            raise WeightsError(
                f"{name} cannot be made of {found}: {error}; is the file what it claims to be?"
            ) from error
        return TensorSpec(made.shape, made.dtype)


def from_layout(
    tensors: Mapping[str, NDArray], values: Mapping[str, Any] | None = None
) -> tuple[str, Mapping[str, NDArray]]:
    """The layout of some tensors (of `LAYOUTS`), and the same tensors under their official names and shapes.

    DeepSpeed's prefix is taken off. Which names a model needs is not asked here. `values` is what a file holds besides
    tensors: it tells the converted files of the `rwkv` package.

    Raises:
      WeightsError: names that no layout has, a prefix that only some have, two tensors that are the same one, a shape
        that cannot be right, or a file that the `rwkv` package has converted.
    """
    values = values or {}
    if any(name in tensors or name in values for name in _CONVERTED):
        strategy = f" with strategy {str(values['_strategy'])[:80]!r}" if "_strategy" in values else ""
        raise WeightsError(
            f"these weights were converted by the rwkv package{strategy}: it transposes matrices, precomputes decays, "
            "divides weights of later layers and may quantize; name the original file"
        )
    if not tensors:
        raise WeightsError("there are no tensors; name a file of weights")
    names = _without_prefix(tensors)
    fewest: list[str] = []
    for layout, table in (("official", _table(_official_rules())), *_READ):
        unknown = [name for name in names if _template(name) not in table]
        if not unknown:
            renamed_only = layout == "official" and all(name == source for name, source in names.items())
            return layout, tensors if renamed_only else LazyTensors(tensors, _recipes_to_official(names, table))
        if not fewest or len(unknown) < len(fewest):
            fewest = unknown
    raise WeightsError(
        f"these names are of no known layout: {listed(fewest)}; "
        f"known are {', '.join(LAYOUTS)} (RWKV-4 to 7, without additions of single forks)"
    )


def to_layout(tensors: Mapping[str, NDArray], layout: str) -> Mapping[str, NDArray]:
    """Tensors with official names and shapes under those of another layout: views, but for two or three of RWKV-6.

    `transformers` takes RWKV-4, `flash-linear-attention` takes RWKV-6 and 7, without `blocks.0.att.v0`, `v1`, `v2`:
    nothing uses them, and it has no place for them.
    Raises WeightsError for a layout that is unknown or lacks this generation, and for names it has no place for.
    """
    if layout not in LAYOUTS:
        raise WeightsError(f"layout = {layout!r}: must be one of {', '.join(LAYOUTS)}")
    if layout == "official":
        return tensors
    by_official = {name: rule for rule in _written(layout, tensors).rules for name in rule.official}
    recipes: dict[str, _Recipe] = {}
    unknown: list[str] = []
    for name in tensors:
        if layout == "flash-linear-attention" and name in _UNUSED:
            continue
        rule = by_official.get(_template(name))
        if rule is None:
            unknown.append(name)
            continue
        layer = _layer(name)
        sources = tuple(official.format(layer) for official in rule.official)
        missing = [source for source in sources if source not in tensors]
        if missing:
            raise WeightsError(f"{rule.foreign.format(layer)} of {layout} needs {listed(missing)}, not among these")
        recipes[rule.foreign.format(layer)] = _Recipe(sources, rule.pack)
    if unknown:
        raise WeightsError(f"{layout} has no place for {listed(unknown)}; write the official layout")
    return LazyTensors(tensors, recipes)


def hub_config(layout: str, tensors: Mapping[str, NDArray]) -> dict[str, Any]:
    """The `config.json` with which `transformers` or `flash-linear-attention` loads what `to_layout` gives.

    `tensors` have official names. Token 0 begins and ends texts, as in every official vocabulary. `rescale_every` is 6
    for float16, which needs it, and 0 otherwise, as in the `rwkv` package; `context_length` only sizes a CUDA kernel.
    Raises WeightsError as `to_layout` does, and for the official layout, which has no such file.
    """
    if layout not in LAYOUTS or layout == "official":
        raise WeightsError(f"layout = {layout!r}: a config.json exists for {' and '.join(LAYOUTS[1:])} only")
    written = _written(layout, tensors)

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


def _transformers_4_config(common: dict[str, Any], shape: _ShapeOf) -> dict[str, Any]:
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        **common,
        "attention_hidden_size": shape("blocks.0.att.key.weight")[0],
        "context_length": 1024,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 6 if common["dtype"] == "float16" else 0,
    }


def _fla_config(architecture: str, common: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        **common,
        "attn": None,
        "attn_mode": "chunk",
        "fuse_norm": False,
        "hidden_act": "sqrelu",
        "hidden_ratio": common["intermediate_size"] / common["hidden_size"],
        "norm_bias": True,
        "norm_eps": 1e-5,
        "norm_first": True,
    }


def _fla_6_config(common: dict[str, Any], shape: _ShapeOf) -> dict[str, Any]:
    return _fla_config("RWKV6", common) | {
        "expand_k": 1.0,
        "expand_v": 1.0,
        "num_heads": shape("blocks.0.att.time_faaaa")[0],
        "proj_low_rank_dim": shape("blocks.0.att.time_maa_w2")[1],
        "gate_low_rank_dim": shape("blocks.0.att.time_decay_w1")[1],
    }


def _fla_7_config(common: dict[str, Any], shape: _ShapeOf) -> dict[str, Any]:
    num_heads, head_size = shape("blocks.0.att.r_k")
    num_layers = common["num_hidden_layers"]
    return _fla_config("RWKV7", common) | {
        "head_dim": head_size,
        "num_heads": num_heads,
        "value_dim": [common["hidden_size"]] * num_layers,
        "decay_low_rank_dim": shape("blocks.0.att.w1")[1],
        "gate_low_rank_dim": shape("blocks.0.att.g1")[1],
        "a_low_rank_dim": shape("blocks.0.att.a1")[1],
        # A model of one layer has no such matrix, and the field must hold something.
        "v_low_rank_dim": shape("blocks.1.att.v1")[1] if num_layers > 1 else 32,
    }


@dataclasses.dataclass(frozen=True)
class _Rule:
    """One tensor of another layout, and the official ones that it holds; `{}` in a name stands for the layer."""

    foreign: str
    official: tuple[str, ...]
    pack: Callable[..., NDArray]
    unpack: tuple[_Change, ...]


def _as_it_is(tensor: NDArray) -> NDArray:
    return tensor


def _transposed(tensor: NDArray) -> NDArray:
    return tensor.T


def _flat(tensor: NDArray) -> NDArray:
    return tensor.reshape(-1)


def _row(tensor: NDArray) -> NDArray:
    return tensor.reshape(1, 1, -1)


def _renamed(names: Mapping[str, str], pack: _Change = _as_it_is, unpack: _Change = _as_it_is) -> list[_Rule]:
    """Rules of one tensor each, from official names to those of the other layout."""
    return [_Rule(foreign, (official,), pack, (unpack,)) for official, foreign in names.items()]


def _stacked_rows(foreign: str, official: Sequence[str]) -> _Rule:
    """Official rows [1, 1, C] as one tensor [rows, C]."""

    def pack(*rows: NDArray) -> NDArray:
        return np.concatenate([row.reshape(1, -1) for row in rows])

    return _Rule(foreign, tuple(official), pack, tuple(_taking(i) for i in range(len(official))))


def _taking(i: int) -> _Change:
    return lambda rows: rows[i].reshape(1, 1, -1)


def _reordered(blocks: NDArray, old: str, new: str) -> NDArray:
    """Equal blocks of the first axis, one a letter, in a new order."""
    parts = np.split(blocks, len(old))
    return np.concatenate([parts[old.index(letter)] for letter in new])


def _pack_mix_w1(w1: NDArray) -> NDArray:
    return _reordered(w1.T, _MIXES, _FUSED_MIXES)


def _unpack_mix_w1(weight: NDArray) -> NDArray:
    return _reordered(weight, _FUSED_MIXES, _MIXES).T


def _pack_mix_w2(w2: NDArray) -> NDArray:
    return _reordered(w2.reshape(-1, w2.shape[-1]), _MIXES, _FUSED_MIXES).T


def _unpack_mix_w2(weight: NDArray) -> NDArray:
    return _reordered(weight.T, _FUSED_MIXES, _MIXES).reshape(len(_MIXES), -1, weight.shape[0])


def _norms(names: Mapping[str, str]) -> list[_Rule]:
    return _renamed({f"{a}.{part}": f"{b}.{part}" for a, b in names.items() for part in ("weight", "bias")})


_LONG = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}

_TRANSFORMERS_4 = [
    *_renamed({"emb.weight": "rwkv.embeddings.weight", "head.weight": "head.weight"}),
    *_norms({"ln_out": "rwkv.ln_out", "blocks.{}.ln0": "rwkv.blocks.{}.pre_ln"}),
    *_norms({f"blocks.{{}}.ln{i}": f"rwkv.blocks.{{}}.ln{i}" for i in (1, 2)}),
    *_renamed({f"blocks.{{}}.att.time_mix_{x}": f"rwkv.blocks.{{}}.attention.time_mix_{_LONG[x]}" for x in "kvr"}),
    *_renamed({f"blocks.{{}}.ffn.time_mix_{x}": f"rwkv.blocks.{{}}.feed_forward.time_mix_{_LONG[x]}" for x in "kr"}),
    *_renamed(
        {
            f"blocks.{{}}.att.{name}": f"rwkv.blocks.{{}}.attention.{name}"
            for name in (
                "time_decay",
                "time_first",
                *(f"{name}.weight" for name in ("key", "value", "receptance", "output")),
            )
        }
    ),
    *_renamed(
        {
            f"blocks.{{}}.ffn.{name}.weight": f"rwkv.blocks.{{}}.feed_forward.{name}.weight"
            for name in ("key", "value", "receptance")
        }
    ),
]

_TRANSFORMERS_5_AND_6 = [
    *_norms({"blocks.{}.att.ln_x": "rwkv.blocks.{}.attention.ln_x"}),
    *_renamed({"blocks.{}.att.time_mix_g": "rwkv.blocks.{}.attention.time_mix_gate"}),
    *_renamed(
        {
            f"blocks.{{}}.att.{name}": f"rwkv.blocks.{{}}.attention.{name}"
            for name in (
                "gate.weight",
                "time_faaaa",
                "time_decay_w1",
                "time_decay_w2",
                *(f"time_maa_{part}" for part in (*"xwkvrg", "w1", "w2")),
            )
        }
    ),
    *_renamed({f"blocks.{{}}.ffn.time_maa_{x}": f"rwkv.blocks.{{}}.feed_forward.time_maa_{x}" for x in "kr"}),
]

_FLA = [
    *_renamed({"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}),
    *_norms({"ln_out": "model.norm", "blocks.{}.ln0": "model.layers.{}.pre_norm"}),
    *_norms({"blocks.{}.ln1": "model.layers.{}.attn_norm", "blocks.{}.ln2": "model.layers.{}.ffn_norm"}),
    *_norms({"blocks.{}.att.ln_x": "model.layers.{}.attn.g_norm"}),
    *_renamed({"blocks.{}.att.output.weight": "model.layers.{}.attn.o_proj.weight"}),
    *_renamed({"blocks.{}.ffn.value.weight": "model.layers.{}.ffn.value.weight"}),
]

_FLA_6 = [
    *_FLA,
    *_renamed({f"blocks.{{}}.att.{_LONG[x]}.weight": f"model.layers.{{}}.attn.{x}_proj.linear.weight" for x in "rkvg"}),
    *_renamed({"blocks.{}.att.time_faaaa": "model.layers.{}.attn.bonus"}),
    *_renamed({"blocks.{}.att.time_maa_x": "model.layers.{}.attn.x_proj.0.mu"}, _flat, _row),
    *_renamed(
        {"blocks.{}.att.time_maa_w1": "model.layers.{}.attn.x_proj.0.linear.weight"}, _pack_mix_w1, _unpack_mix_w1
    ),
    *_renamed({"blocks.{}.att.time_maa_w2": "model.layers.{}.attn.x_proj.2.weight"}, _pack_mix_w2, _unpack_mix_w2),
    _stacked_rows("model.layers.{}.attn.x_bias", [f"blocks.{{}}.att.time_maa_{x}" for x in _FUSED_MIXES]),
    *_renamed({"blocks.{}.att.time_decay": "model.layers.{}.attn.w_proj.linear.lora.2.bias"}, _flat, _row),
    *_renamed(
        {
            "blocks.{}.att.time_decay_w1": "model.layers.{}.attn.w_proj.linear.lora.0.weight",
            "blocks.{}.att.time_decay_w2": "model.layers.{}.attn.w_proj.linear.lora.2.weight",
        },
        _transposed,
        _transposed,
    ),
    *_renamed({f"blocks.{{}}.ffn.time_maa_{x}": f"model.layers.{{}}.ffn.{_LONG[x]}.mu" for x in "kr"}, _flat, _row),
    *_renamed({f"blocks.{{}}.ffn.{_LONG[x]}.weight": f"model.layers.{{}}.ffn.{_LONG[x]}.linear.weight" for x in "kr"}),
]

_FLA_7 = [
    *_FLA,
    *_renamed({f"blocks.{{}}.att.{_LONG[x]}.weight": f"model.layers.{{}}.attn.{x}_proj.weight" for x in "rkv"}),
    *_renamed(
        {f"blocks.{{}}.att.{name}": f"model.layers.{{}}.attn.{name}" for name in (*(f"x_{x}" for x in "rwkvag"), "r_k")}
    ),
    *_renamed({f"blocks.{{}}.att.{name}": f"model.layers.{{}}.attn.{name}" for name in ("k_k", "k_a")}, _flat, _row),
    *_renamed({f"blocks.{{}}.att.{x}0": f"model.layers.{{}}.attn.{x}_lora.lora.2.bias" for x in "wav"}, _flat, _row),
    *_renamed(
        {
            f"blocks.{{}}.att.{x}{i}": f"model.layers.{{}}.attn.{x}_lora.lora.{j}.weight"
            for x in "wavg"
            for i, j in ((1, 0), (2, 2))
        },
        _transposed,
        _transposed,
    ),
    *_renamed({"blocks.{}.ffn.x_k": "model.layers.{}.ffn.x_k"}, _flat, _row),
    *_renamed({"blocks.{}.ffn.key.weight": "model.layers.{}.ffn.key.weight"}),
]

# Files from before 2025-04 have the six mixes of RWKV-7 in one tensor.
_FLA_7_OLD = [_stacked_rows("model.layers.{}.attn.x_x", [f"blocks.{{}}.att.x_{x}" for x in "rwkvag"])]


def _official_rules() -> list[_Rule]:
    """The names of every generation's parameters, as they are."""
    names = set()
    for spec in GENERATIONS.values():
        for name in SHARED_AXES | spec.load_model_class().block_axes:
            names.add(name if name.startswith(("emb.", "ln_out.", "head.")) else f"blocks.{{}}.{name}")
    return _renamed({name: name for name in sorted(names)})


def _table(rules: Iterable[_Rule]) -> dict[str, _Rule]:
    return {rule.foreign: rule for rule in rules}


_READ = (
    ("transformers", _table([*_TRANSFORMERS_4, *_TRANSFORMERS_5_AND_6])),
    ("flash-linear-attention", _table(_FLA_6)),
    ("flash-linear-attention", _table([*_FLA_7, *_FLA_7_OLD])),
)


class _Written(NamedTuple):
    """How a generation is written in another project's layout."""

    rules: list[_Rule]
    describe: Callable[[dict[str, Any], _ShapeOf], dict[str, Any]]
    """Its config.json, from the fields that all have and the shapes of official tensors."""


_WRITTEN = {
    ("transformers", "4"): _Written(_TRANSFORMERS_4, _transformers_4_config),
    ("flash-linear-attention", "6"): _Written(_FLA_6, _fla_6_config),
    ("flash-linear-attention", "7"): _Written(_FLA_7, _fla_7_config),
}


def _template(name: str) -> str:
    """A name with `{}` for its layer; a name that has braces itself is of no layout."""
    return "" if "{" in name else re.sub(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)", "{}", name, count=1)


def _layer(name: str) -> str:
    found = re.search(r"\.([0-9]+)\.", name)
    return "" if found is None else found[1]


def _without_prefix(tensors: Mapping[str, NDArray]) -> dict[str, str]:
    """The tensors' own names, by those without DeepSpeed's prefix."""
    bare = [name for name in tensors if not name.startswith(_PREFIX)]
    if bare and len(bare) < len(tensors):
        raise WeightsError(
            f"some names begin with {_PREFIX!r} and these do not: {listed(bare)}; two models in one file are not read"
        )
    return {name.removeprefix(_PREFIX): name for name in tensors}


def _recipes_to_official(names: Mapping[str, str], table: Mapping[str, _Rule]) -> dict[str, _Recipe]:
    recipes: dict[str, _Recipe] = {}
    for name, source in names.items():
        rule, layer = table[_template(name)], _layer(name)
        for official, unpack in zip(rule.official, rule.unpack, strict=True):
            made = official.format(layer)
            if made in recipes:
                raise WeightsError(f"{recipes[made].sources[0]} and {source} are both {made}; remove one of them")
            recipes[made] = _Recipe((source,), unpack)
    return recipes


def _written(layout: str, tensors: Mapping[str, NDArray]) -> _Written:
    spec = recognize({name: tensor_spec(tensors, name).shape for name in tensors})
    if spec is None:
        raise WeightsError("these are no tensors of RWKV-4 to 7 under their official names; see from_layout")
    written = _WRITTEN.get((layout, spec.name))
    if written is None:
        held = " and ".join(f"RWKV-{known}" for name, known in _WRITTEN if name == layout)
        raise WeightsError(f"{layout} has {held}, not {spec.title}; write the official layout")
    return written
