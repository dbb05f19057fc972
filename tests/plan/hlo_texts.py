"""Programs in the words of XLA's compilers, cut down to what is asked of them.

cpu: a loop of 5 around a loop of 3, and a product in a fusion.
gpu: collectives that start and are done, one of two arrays at once, one of nobody; two products of cuBLAS.
tpu: a loop from 1 to 7 without a trip count; a collective that goes on beside a batch of three products.
chosen: two loops of which the data give one all 4 turns, the other none.
"""

from __future__ import annotations

from pathlib import Path


def text_of(name: str) -> str:
    """The text of a program: cpu, gpu, tpu or chosen."""
    return (Path(__file__).parent / "programs" / f"{name}.hlo").read_text(encoding="utf-8")
