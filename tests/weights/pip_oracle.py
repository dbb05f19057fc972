"""Logits by the official `rwkv` package (0.8.32), for a test to hold ours against; run by a Python that has it.

    PEER_PYTHON tests/weights/pip_oracle.py GENERATION MODEL.pth TOKENS.npy OUTPUT.npz RESAVED.pth

GENERATION is 4, 5, 6 or 7. TOKENS holds integers [T] or [B, T], T at least 2; each row starts from the zero state.
RESAVED.pth gets the same tensors, by torch.save. OUTPUT gets, in float32 on the CPU, [T, V] or [B, T, V]:

    logits               the whole row in one call
    logits_one_by_one    a call for each token, the state handed on
"""

# It runs in an environment of its own, with torch and rwkv, which the project's does not have.
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import sys

import numpy as np


def main(generation: str, model_path: str, tokens_path: str, output_path: str, resaved_path: str) -> None:
    """Read the model and the tokens, write the logits and the model."""
    # The package reads these when it is imported; RWKV-7 is another class in it, not another version.
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(generation == "7"))}
    import torch
    from rwkv.model import RWKV

    torch.set_num_threads(1)
    torch.save(torch.load(model_path, map_location="cpu", weights_only=True), resaved_path)
    model = RWKV(model=model_path.removesuffix(".pth"), strategy="cpu fp32")
    tokens = np.load(tokens_path)
    at_once, one_by_one = [], []
    for row in tokens.reshape(-1, tokens.shape[-1]).tolist():
        at_once.append(model.forward(row, None, full_output=True)[0].numpy())
        state, logits = None, []
        for token in row:
            output, state = model.forward([token], state)
            logits.append(output.numpy())
        one_by_one.append(np.stack(logits))
    np.savez(
        output_path,
        logits=np.stack(at_once).reshape(*tokens.shape, -1),
        logits_one_by_one=np.stack(one_by_one).reshape(*tokens.shape, -1),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
