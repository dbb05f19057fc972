"""The official `rwkv` package as a peer of benchmarks/decode_cpu.py: PyTorch, one text at a time.

Runs in an environment of its own, made with

    pip install torch==2.13.0 numpy rwkv==0.8.32

where torch is best one without CUDA.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers_protocol import Job, Peer, serve

STRATEGIES = {"float32": "cpu fp32", "bfloat16": "cpu bf16"}


class OfficialPackage(Peer):
    """`rwkv.model.RWKV`, compiled by TorchScript as it asks for."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        # Read when the package is imported; RWKV-7 is another class in it, not another version.
        os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1"}
        import torch
        from rwkv.model import RWKV

        torch.set_num_threads(job.threads)
        self._model: Any = RWKV(model=job.weights.removesuffix(".pth"), strategy=STRATEGIES[job.precision])
        self._state: Any = None

    def begin(self, batch_size: int) -> None:
        """See Peer."""
        if batch_size != 1:
            raise ValueError(f"batch_size = {batch_size}: the package has no batches")
        self._state = None

    def read(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """See Peer."""
        logits, self._state = self._model.forward(tokens[0].tolist(), self._state)
        return logits.float().numpy()[None]


def open_peer(job: Job) -> tuple[Peer, dict[str, str]]:
    """The package's model of a job, and versions."""
    return OfficialPackage(job), {name: importlib.metadata.version(name) for name in ("torch", "rwkv")}


if __name__ == "__main__":
    serve(open_peer)
