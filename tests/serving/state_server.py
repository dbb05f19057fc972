"""`rwkv serve` with a tiny random model, as a process of its own that tests kill: state_server STORE PORT."""

from __future__ import annotations

import contextlib
import sys

from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.server import run_server
from rwkv_jax.serving.service import Service
from rwkv_jax.serving.states.opening import open_states
from tests.inference.models import CONFIGS, quick_engine, random_model


def main(store: str, port: str) -> None:
    options = ServeOptions(port=int(port), state_store=store)
    states = open_states(options, "tiny")
    with contextlib.closing(states.store), quick_engine(random_model(CONFIGS["7"])) as engine:
        run_server(Service(engine, "tiny", options, states=states))


if __name__ == "__main__":
    main(*sys.argv[1:])
