"""The adapters of an engine: a fixed number of places beside each adapted matrix, one of them for each row of a batch.

Their arrays are arguments of the compiled programs, so loading another adapter compiles nothing. All are held as LoRA
of one rank, so that a batch may mix them, and texts without one: LoRA and rsLoRA are, PiSSA is LoRA of twice its rank,
MiSS one whose A sums inputs. DoRA and Bat do more than add to a matrix; they are merged.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.checks import ConfigError, require_known, shown
from rwkv_jax.config.tuning import OFFICIAL_TARGETS
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.folded_tables import fixed_parameters
from rwkv_jax.tuning.adapter import Adapter, AdapterError
from rwkv_jax.tuning.grafting import beside, parameters_of, refuse_fixed
from rwkv_jax.weights.official import official_shapes

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
_numbers = itertools.count(1)

NONE = -1
"""Place of a text without an adapter."""

Arrays = dict[str, dict[str, Any]]
"""Of each matrix with places, by its name, the parts that a place has."""


class PreparedAdapter(NamedTuple):
    """All that is needed to load an adapter but a place."""

    name: str
    digest: str
    arrays: Arrays
    """On the device, except for numbers in float64."""


@dataclasses.dataclass(eq=False)
class LoadedAdapter:
    """An adapter in one of an engine's places."""

    name: str
    place: int
    digest: str
    """Of its numbers."""
    number: int
    """No two adapters of a process have the same."""
    is_loaded: bool = True
    """False once it was removed; its place may be another's then."""


def number_of(adapter: LoadedAdapter | None) -> int:
    """An adapter's number; 0 for none."""
    return 0 if adapter is None else adapter.number


def require_loaded(adapter: LoadedAdapter | None) -> None:
    """Raises ConfigError for an adapter that was removed: its place may be another's."""
    if adapter is not None and not adapter.is_loaded:
        raise ConfigError(
            f"adapter = {adapter.name!r}: was removed, and more of this text was to be read with it; load it again and "
            "repeat the text"
        )


class AdapterPlaces:
    """An engine's adapters by name. The engine's thread alone changes their arrays; looking up is thread-safe."""

    def __init__(
        self,
        model: LanguageModel,
        adapters: Mapping[str, Adapter],
        num_places: int,
        rank: int,
        digest: Callable[[], str] | None,
    ) -> None:
        """Places for adapters of a model without any; nothing is loaded yet.

        Args:
          num_places: if there are more than adapters, those to come may be of all matrices of OFFICIAL_TARGETS.
          rank: largest rank; 0 is that of the adapters.
          digest: computes the model's `base_digest`; None takes adapters of any base with its shapes.

        Raises:
          AdapterError: an adapter that does not fit, is another base's or cannot be mixed with others.
        """
        self._by_name: dict[str, LoadedAdapter] = {}
        self._count = max(num_places, len(adapters))
        self._shapes = official_shapes(dataclasses.replace(model.config, dtype="float32")) if self._count else {}
        self._digest, self._fixed = digest, fixed_parameters(model)
        for name, adapter in adapters.items():
            self.check_base(name, adapter)
        each = [self._as_lora(name, adapter) for name, adapter in adapters.items()]
        ranks = [adapter.rank(name) for adapter in each for name in adapter.parts]
        self._rank = rank or max(ranks, default=0)
        if self._count and not self._rank:
            raise ConfigError("adapter_rank = 0: no adapter is given whose rank it could be; give the largest one")
        self._targets = {name for adapter in each for name in adapter.parts}
        if self._count > len(adapters):
            names = [name.removesuffix(".weight") for name in self._shapes if name.startswith("blocks.")]
            self._targets |= {name for name in names if name.partition(".")[2].partition(".")[2] in OFFICIAL_TARGETS}
        self._free = list(range(self._count))[::-1]
        self._parts: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}  # of a place, by matrix

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._by_name)

    def find(self, name: object) -> LoadedAdapter | None:
        """An adapter by its name; None for None. Raises ConfigError for a name that there is not."""
        if name is None:
            return None
        if not isinstance(name, str):
            raise ConfigError(f"adapter = {shown(name)}: must be the name of an adapter of this engine, or None")
        known = dict(self._by_name)  # as of now: the engine's thread may load and remove meanwhile
        if not known:
            raise ConfigError(f"adapter = {shown(name)}: this engine has no adapters; load it first (adapters.load)")
        require_known(name, known, "adapter", "adapter of this engine")
        return known[name]

    def check_base(self, name: str, adapter: Adapter) -> None:
        """Holds an adapter against the model, all of whose numbers may be read: not for the engine's thread.

        Raises AdapterError as `Adapter.check_base` and `refuse_fixed`.
        """
        if not self._count:
            return  # which `add` says
        try:
            refuse_fixed(adapter, self._fixed)
            adapter.check_base(self._shapes, self._digest or str, allow_other_base=self._digest is None)
        except AdapterError as error:
            raise AdapterError(f"adapter {name}: {error}") from error

    def with_places(self, model: LanguageModel) -> LanguageModel:
        """The model, of separate layers, with empty places beside its matrices; itself if there are none."""
        if not self._count:
            return model
        graphdef, state = nnx.split(model, nnx.Param)
        state = jax.tree.map(lambda x: x, state)  # variables of its own, or the given model would change
        for (name, *_), variable in parameters_of(state, model.config.num_layers):
            if name.removesuffix(".weight") in self._targets:
                base = variable.get_value()
                if isinstance(base, AdaptedMatrix):
                    raise AdapterError(f"{name}: the model has an adapter already; load it without, and give both here")
                num_outputs, num_inputs = self._shapes[name]
                dtype = jnp.float64 if base.dtype == jnp.float64 else jnp.float32
                parts = {
                    "lora_A": np.zeros((self._count, self._rank, num_inputs), dtype),
                    "lora_B": np.zeros((self._count, num_outputs, self._rank), dtype),
                }
                of_place = {part: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for part, x in parts.items()}
                self._parts[name.removesuffix(".weight")] = of_place
                placed = jax.device_put((parts, np.ones(self._count, dtype)), beside(base))
                variable.set_value(AdaptedMatrix(base, *placed))
        return nnx.merge(graphdef, state)

    def prepare(self, name: str, adapter: Adapter) -> PreparedAdapter:
        """Makes the arrays of an adapter, which `check_base` has passed; takes seconds, and not the engine's thread.

        Raises:
          ConfigError: the name is taken or none, there is no free place, or as the constructor.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"adapter = {shown(name)}: must be a name of letters, digits, '.', '_' and '-'")
        self._require_room(name)
        lora = self._as_lora(name, adapter)
        for matrix in lora.parts:
            if matrix not in self._targets or lora.rank(matrix) > self._rank:
                raise AdapterError(
                    f"adapter {name}: {matrix} of rank {lora.rank(matrix)}: this engine was built for "
                    f"{len(self._targets)} matrices up to rank {self._rank}; give it this adapter when it is built, "
                    "or a greater adapter_rank"
                )
        arrays: Arrays = {}
        for matrix, shapes in self._parts.items():
            own, scale = lora.parts.get(matrix), lora.scales.get(matrix, 1.0)
            arrays[matrix] = {part: _on_device(_padded(own, part, x, scale)) for part, x in shapes.items()}
        return PreparedAdapter(name, adapter.digest, jax.block_until_ready(arrays))

    def add(self, prepared: PreparedAdapter, params: Any, num_layers: int) -> Any:
        """Loads an adapter into a free place; the engine's thread calls it.

        Returns:
          The parameters of the programs with it.

        Raises:
          ConfigError: the name or all places are taken by now.
        """
        name = prepared.name
        self._require_room(name)
        loaded = LoadedAdapter(name, self._free[-1], prepared.digest, next(_numbers))
        filled = _filled(loaded.place, prepared.arrays, params, num_layers)
        self._free.pop()  # only now: it stays free if there is no memory
        self._by_name[name] = loaded
        return filled

    def remove(self, name: str, is_used: Callable[[LoadedAdapter], bool]) -> None:
        """Frees an adapter's place; the engine's thread calls it.

        Raises:
          ConfigError: there is none of the name, or a text still uses it.
        """
        loaded = self.find(name)
        assert loaded is not None
        if is_used(loaded):
            raise ConfigError(f"adapter = {name!r}: texts are being generated with it; remove it when they have ended")
        loaded.is_loaded = False
        del self._by_name[name]
        self._free.append(loaded.place)

    def _require_room(self, name: str) -> None:
        if name in self._by_name:
            raise ConfigError(f"adapter = {name!r}: there is one of that name; take another, or remove it first")
        if not self._free:
            raise ConfigError(
                f"adapter = {name!r}: all {self._count} places are taken; remove one, or build the engine with more "
                "(adapter_places)"
            )

    def _as_lora(self, name: str, adapter: Adapter) -> Adapter:
        try:
            if adapter.replaced:
                raise AdapterError(
                    f"{next(iter(adapter.replaced))}: was trained in full, which rows of a batch cannot have each "
                    "their own; merge the adapter into its base (rwkv merge)"
                )
            return adapter.as_lora(self._shapes)
        except AdapterError as error:
            raise AdapterError(f"adapter {name}: {error}") from error


def _filled(place: int, arrays: Arrays, params: Any, num_layers: int) -> Any:
    """The parameters with the arrays of one place replaced."""
    params = jax.tree.map(lambda x: x, params)  # variables of its own, or the given ones would change
    for (name, *_), variable in parameters_of(params, num_layers):
        matrix = variable.get_value()
        if has_places(matrix):
            own = arrays[name.removesuffix(".weight")]
            parts = {part: _set_place(x, place, own[part]) for part, x in matrix.parts.items()}
            variable.set_value(dataclasses.replace(matrix, parts=parts))
    return params


def _padded(own: Mapping[str, NDArray] | None, part: str, like: jax.ShapeDtypeStruct, scale: float) -> NDArray:
    """A part with its factor in B, so that all places have the factor 1; zeros where there is none."""
    whole = np.zeros(like.shape, like.dtype)
    if own is not None:
        x = np.asarray(own[part], np.float64) * (scale if part == "lora_B" else 1.0)
        whole[: x.shape[0], : x.shape[1]] = x
    return whole


def _on_device(x: NDArray) -> Any:
    # Only the engine's thread may have 64-bit types switched on.
    return x if x.dtype == np.float64 else jnp.asarray(x)


@jax.jit
def _set_place(x: Array, place: int, value: Any) -> Array:
    return x.at[place].set(value)


def has_places(x: Any) -> bool:
    """Whether a matrix has places for adapters, which rows of a batch choose from."""
    return isinstance(x, AdaptedMatrix) and x.scale.ndim == 1 and x.base.ndim == 2


def with_rows(params: Any, places: Array) -> Any:
    """Parameters for a batch of which each row has the adapter of a place, int32 [B]; NONE has none."""

    def chosen(x: Any) -> Any:
        return dataclasses.replace(x, rows=places) if has_places(x) else x

    return jax.tree.map(chosen, params, is_leaf=lambda x: isinstance(x, AdaptedMatrix))


def without_places(params: Any) -> Any:
    """The parameters of the base alone."""
    return jax.tree.map(
        lambda x: x.base if has_places(x) else x, params, is_leaf=lambda x: isinstance(x, AdaptedMatrix)
    )
