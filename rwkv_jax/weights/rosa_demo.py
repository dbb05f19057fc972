"""The trained demonstrations of RWKV-7 with ROSA (RWKV-LM, RWKV-v8/251105_reverse_run.py) under official names.

    e, lno, o                                emb, ln_out, head
    ln1a, ln1b, ln1c                         ln1, ln2, ln3 of layer 0, and so on
    rwkv1, rosa1, ffn1                       att, rosa, ffn of layer 0, and so on

Their head has a bias b, which no model of ours has. ln_out's bias takes it: with x such that W x = b for the head's
matrix W [V, C], logits W h + b are W (h + x). There is such an x where V <= C and W has full rank, as theirs have;
the shortest is taken, in float64, and stays in it where JAX has float64, so that a model in float64 is exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.weights.tensors import WeightsError, join_names

LAYOUT = "rosa-demo"

_NAME = re.compile(r"(?P<part>ln|rwkv|rosa|ffn)(?P<layer>[1-9][0-9]{0,3})(?P<norm>[abc]?)\.(?P<rest>[\w.]+)")
_OUTER = {"e.weight": "emb.weight", "o.weight": "head.weight", "lno.weight": "ln_out.weight", "lno.bias": "ln_out.bias"}
_PARTS = {"rwkv": "att", "rosa": "rosa", "ffn": "ffn", "lna": "ln1", "lnb": "ln2", "lnc": "ln3"}
_BIAS = "o.bias"
_LARGEST = 1e-6  # of |W x - b| / |b|: rounding, in float64, of a head far from full rank


def is_demo(names: Mapping[str, object]) -> bool:
    """Whether these are a demonstration's names."""
    return all(name in names for name in (*_OUTER, _BIAS)) and "rosa1.q.weight" in names


def from_demo(tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """The tensors under official names, without the head's bias.

    Raises:
      WeightsError: other names beside them, or a bias that the last norm's cannot take.
    """
    official, unknown = {}, []
    for name in tensors:
        match = _NAME.fullmatch(name)
        part = None if match is None else _PARTS.get(match["part"] + match["norm"])
        if match is not None and part is not None:
            official[f"blocks.{int(match['layer']) - 1}.{part}.{match['rest']}"] = tensors[name]
        elif name in _OUTER:
            official[_OUTER[name]] = tensors[name]
        elif name != _BIAS:
            unknown.append(name)
    if unknown:
        raise WeightsError(f"beside a demonstration of ROSA are names that it has not: {join_names(unknown)}")
    head, bias, own = (np.asarray(tensors[name], np.float64) for name in ("o.weight", _BIAS, "lno.bias"))
    if head.ndim != 2 or bias.shape != head.shape[:1] or own.shape != head.shape[1:]:
        raise WeightsError(f"o.weight {list(head.shape)}, o.bias {list(bias.shape)} and lno.bias do not go together")
    shift, *_ = np.linalg.lstsq(head, bias, rcond=None)
    if not np.linalg.norm(head @ shift - bias) <= _LARGEST * np.linalg.norm(bias):
        raise WeightsError(
            f"o.bias: the head, {head.shape[0]} ids of width {head.shape[1]}, cannot do without it; no model of ours "
            "has such a bias"
        )
    exact = jax.config.read("jax_enable_x64")
    official["ln_out.bias"] = (own + shift).astype(np.float64 if exact else tensors["lno.bias"].dtype)
    return official
