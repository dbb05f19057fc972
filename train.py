"""Trains a language model.

    python train.py configs/python_stdlib.py --training.num-steps 500
    python train.py --help

`rwkv train` is the same command; the loop is rwkv_jax/training/loop.py.
"""

from __future__ import annotations

import sys

from rwkv_jax import cli
from rwkv_jax.host import restart_with_huge_pages


def main() -> None:
    """The command line."""
    cli.main(["train", *sys.argv[1:]], program="train.py")


if __name__ == "__main__":
    restart_with_huge_pages(sys.argv[0])
    main()
