"""An engine's adapters, as its users see them: loaded, removed and found by name."""

from __future__ import annotations

from collections.abc import Mapping

from rwkv_jax.inference.engine.adapters import AdapterPlaces, LoadedAdapter, PreparedAdapter
from rwkv_jax.inference.engine.driver import Driver
from rwkv_jax.inference.engine.scheduler import Scheduler
from rwkv_jax.tuning.adapter import Adapter


class AdapterTable:
    """Adapters that texts choose from by name. Thread-safe."""

    def __init__(
        self, places: AdapterPlaces, scheduler: Scheduler, driver: Driver, adapters: Mapping[str, Adapter], layers: int
    ) -> None:
        """Loads the first ones, before the engine's thread starts.

        Args:
          layers: of the model.
        """
        self._places, self._scheduler, self._driver, self._num_layers = places, scheduler, driver, layers
        for name, adapter in adapters.items():
            self._place(places.prepare(name, adapter))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return self._places.names

    def find(self, name: object) -> LoadedAdapter | None:
        """An adapter by its name; None for None. Raises ConfigError for a name that there is not."""
        return self._places.find(name)

    def owner_of(self, name: object) -> str:
        """What snapshots of texts with an adapter, or None, are recognized by. Raises as `find`."""
        return self._scheduler.slots.owner_of(self.find(name))

    def load(self, name: str, adapter: Adapter) -> None:
        """Loads an adapter into a free place, between two steps of texts, which go on while it is prepared.

        Compiles nothing.

        Raises:
          ConfigError: the name is taken, no place is free, or the adapter does not fit or is another base's
            (AdapterError).
        """
        self._places.check_base(name, adapter)
        prepared = self._places.prepare(name, adapter)
        self._driver.call(lambda: self._place(prepared))

    def remove(self, name: str) -> None:
        """Frees the place of an adapter, between two steps. Raises ConfigError while a text uses it."""
        self._driver.call(lambda: self._places.remove(name, self._scheduler.uses))

    def _place(self, prepared: PreparedAdapter) -> None:
        slots = self._scheduler.slots
        slots.params = self._places.add(prepared, slots.params, self._num_layers)
