"""Tables by token in the host's memory, of which a step fetches the rows of its tokens.

A host table is a pytree that takes a parameter's place, as a packed matrix does (`models/packed.py`), so models do not
change (`decoding.with_host_tables`). Its rows are read by a callback, so that the device holds those of a call's tokens
only. It is for inference on one device; nothing is differentiated.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, eq=False)
class HostRows:
    """Rows of the host, which are equal to others if they are the same object."""

    values: NDArray[Any]
    """[L, V, D]."""

    def fetch(self, layer: Any, tokens: Any) -> NDArray[Any]:
        """Rows [..., D] of tokens [...]."""
        return self.values[int(layer)][np.asarray(tokens)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostTable:
    """A table [V, D] in the host's memory, in place of a parameter; leading axes are those of stacked layers."""

    layer: Array
    """int32, which of the rows' layers it is."""
    checksum: Array
    """uint32 [..., 2], by which models with other rows are told apart."""
    source: HostRows = dataclasses.field(metadata={"static": True})

    @property
    def row_bytes(self) -> int:
        """Bytes that a token fetches, in all layers."""
        return self.layer.size * self.source.values[0, 0].nbytes

    def __getitem__(self, index: Any) -> HostTable:
        """Indexes the leading axes; `...` returns the table itself."""
        return self if index is ... else jax.tree.map(lambda x: x[index], self)

    def with_rows(self, values: NDArray[Any], added: NDArray[Any]) -> HostTable:
        """A table of other rows [L, V, D], made of these and of arrays [L, ...].

        Its checksum is of what it was made of, so that it is the same where the rows are rounded otherwise.
        """
        sums = np.array([_sums(layer) for layer in added], np.uint32).reshape(self.checksum.shape)
        return HostTable(self.layer, self.checksum + sums, HostRows(values))

    def rows(self, index: Array) -> Array:
        """Looks up rows: integers of any shape -> [..., D]."""
        values = self.source.values
        like = jax.ShapeDtypeStruct((*index.shape, values.shape[-1]), values.dtype)
        return jax.pure_callback(self.source.fetch, like, self.layer, index, vmap_method="sequential")


def host_table(rows: NDArray[Any], device: Any) -> HostTable:
    """Rows [V, D] of a table, or [L, V, D] of stacked layers', as a parameter of a model on a device."""
    layers = rows if rows.ndim == 3 else rows[None]
    sums = np.array([_sums(layer) for layer in layers], np.uint32)
    index = np.arange(len(layers), dtype=np.int32)
    layer, checksum = jax.device_put((index, sums) if rows.ndim == 3 else (index[0], sums[0]), device)
    return HostTable(layer, checksum, HostRows(layers))


def _sums(layer: NDArray[Any]) -> tuple[int, int]:
    data = np.ascontiguousarray(layer).view(np.uint8).reshape(-1).data
    return zlib.crc32(data), zlib.adler32(data)
