"""Tensors derived from others."""

from __future__ import annotations

import dataclasses

import numpy as np

from rwkv_jax.weights.derived import add_unused
from rwkv_jax.weights.model_config import UNUSED
from tests.weights.files import CONFIGS, random_tensors


def test_what_a_file_lacks_besides_stays_missing() -> None:
    """And is then named with all that is missing, in place of a KeyError."""
    config = dataclasses.replace(CONFIGS["7"], unused_value_residual=False)
    tensors = {name: x for name, x in random_tensors(config).items() if name not in UNUSED}
    for lost in ("head.weight", "blocks.0.att.w1"):
        found = add_unused({name: x for name, x in tensors.items() if name != lost}, config)
        assert set(found) == {*tensors, *UNUSED} - {lost}
        assert not np.any(found[UNUSED[0]])
