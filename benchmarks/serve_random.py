"""Serves a model with random weights on this machine, for the benchmarks of the server; ends at SIGTERM.

    python benchmarks/serve_random.py --port 8000 --num-layers 2 --width 128

Prompts are token ids or numbers ("17 18"), or texts with --world. The name of the model is `random`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rwkv_jax import from_pretrained
from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.server import run_server
from rwkv_jax.serving.service import Service


def add_sizes(parser: argparse.ArgumentParser, *, num_layers: int, width: int, vocab_size: int) -> None:
    """Flags of the model, which whoever starts this program takes, too."""
    parser.add_argument("--num-layers", type=int, default=num_layers)
    parser.add_argument("--width", type=int, default=width, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, num_layers=12, width=768, vocab_size=65536)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prefix-bytes", type=int, default=64 * 2**20)
    parser.add_argument("--weights", type=Path, help="a file of weights in place of random ones")
    parser.add_argument("--world", action="store_true", help="the World vocabulary")
    arguments = parser.parse_args()
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    model = random_model(config) if arguments.weights is None else from_pretrained(arguments.weights)
    tokenizer = WorldTokenizer() if arguments.world else NumberTokenizer(config.vocab_size)
    options = EngineOptions(num_slots=arguments.slots, prefix_bytes=arguments.prefix_bytes)
    log = Path("/dev/null")
    with Engine(model, tokenizer, options) as engine:
        run_server(Service(engine, "random", ServeOptions(port=arguments.port, access_log=log)))


if __name__ == "__main__":
    main()
