"""The token shift of images: a patch takes its neighbors in two dimensions in the place of the token before it."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax

from rwkv_jax.models.context import MeshAxes


def check_grid(
    grid: tuple[int, int], time: int, segment_ids: Array | None, lengths: Array | None, axes: MeshAxes
) -> None:
    """Raises ValueError unless rows of T = `time` tokens are the patches of whole images."""
    rows, columns = grid
    if time != rows * columns:
        raise ValueError(f"grid: {rows} x {columns} patches, and there are T = {time} tokens; they must be equal")
    if segment_ids is not None or lengths is not None:
        raise ValueError("grid: every row is one whole image; leave out segment_ids and lengths")
    if axes.sequence is not None:
        raise ValueError("grid: an image's neighbors are on other devices if time is split; split rows or heads")


def grid_shift(x: Array, grid: tuple[int, int], kernel: Array | None = None) -> Array:
    """What the neighbors of each patch of an image give it.

    Args:
      x: [B, T, C], T = rows x columns patches in raster order.
      grid: rows and columns.
      kernel: [K, K, C], as `omni_shift`; None is `quad_shift`.
    """
    image = rearrange(x, "B (Y X) C -> B Y X C", Y=grid[0])
    shifted = quad_shift(image) if kernel is None else omni_shift(image, kernel)
    return rearrange(shifted, "B Y X C -> B (Y X) C")


def quad_shift(image: Array, share: float = 0.25, by: int = 1) -> Array:
    """Q-shift of Vision-RWKV (arXiv 2403.02308, section 3.2): four groups of channels come from the four neighbors.

    Channels [0, m) come from the left, [m, 2 m) from the right, [2 m, 3 m) from above and [3 m, 4 m) from below, with
    zeros beyond the border; the rest stay.

    Args:
      image: [B, Y, X, C].
      share: of the channels that come from each neighbor; group i ends at int(C share (i + 1)).
      by: how many patches away the neighbors are, from 1.
    """
    ends = [int(image.shape[-1] * share * number) for number in range(5)]
    left, right, above, below = (image[..., first:last] for first, last in itertools.pairwise(ends))
    rows, columns = image.shape[1:3]

    def moved(x: Array, y_by: int, x_by: int) -> Array:
        padded = jnp.pad(x, ((0, 0), (by, by), (by, by), (0, 0)))
        return padded[:, by + y_by : by + y_by + rows, by + x_by : by + x_by + columns]

    return jnp.concatenate(
        [moved(left, 0, -by), moved(right, 0, by), moved(above, -by, 0), moved(below, by, 0), image[..., ends[4] :]],
        axis=-1,
    )


def omni_shift(image: Array, kernel: Array) -> Array:
    """Omni-shift of Restore-RWKV (arXiv 2407.11087): a depthwise convolution over the neighborhood, zeros beyond it.

    The paper trains 1 x 1, 3 x 3 and 5 x 5 kernels beside the patch itself with a weight each; all of them are one
    kernel.

    Args:
      image: [B, Y, X, C].
      kernel: [K, K, C], K odd.
    """
    return lax.conv_general_dilated(
        image,
        rearrange(kernel.astype(image.dtype), "Y X C -> Y X 1 C"),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=image.shape[-1],
        precision=lax.Precision.HIGHEST,
    )
