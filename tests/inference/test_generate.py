"""The generator writes what the model says, token by token, with one program and a state of constant size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.inference.generate import TOKENS_PER_CALL, Generator
from rwkv_jax.inference.sampling import Sampling

from .conftest import Small
