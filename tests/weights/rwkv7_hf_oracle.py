"""Logits by the package `rwkv7-hf` (0.9.0), for a test to hold ours against; run by a Python that has it.

    PEER_PYTHON tests/weights/rwkv7_hf_oracle.py FOLDER TOKENS.npy OUTPUT.npz SAVED MODEL.pth CONVERTED

FOLDER is of the layout flash-linear-attention, whose names it has; TOKENS holds integers [B, T]. SAVED gets the same
model by its save_pretrained, CONVERTED what its own converter makes of an official file. OUTPUT gets, on the CPU,

    logits               [B, T, V] in one call
    logits_one_by_one    a call for each token, the cache handed on
    unloaded             names that FOLDER lacks, has besides, or has in another shape
"""

# It runs in an environment of its own, with torch, transformers and rwkv7-hf, which the project's does not have.
# pyright: reportMissingImports=false

from __future__ import annotations

import sys

import numpy as np
import torch
from rwkv7_hf import RWKV7ForCausalLM, converter


def main(folder: str, tokens_path: str, output_path: str, saved: str, official: str, converted: str) -> None:
    """Load the model, run it, save it, and convert the official file."""
    torch.set_num_threads(1)
    model, found = RWKV7ForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model.eval()
    tokens = torch.from_numpy(np.load(tokens_path))
    one_by_one, cache = [], None
    with torch.no_grad():
        logits = model(tokens, return_dict=True).logits
        for t in range(tokens.shape[1]):
            output = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True, return_dict=True)
            cache = output.past_key_values
            one_by_one.append(output.logits[:, -1])
    np.savez(
        output_path,
        logits=logits.numpy(),
        logits_one_by_one=torch.stack(one_by_one, 1).numpy(),
        unloaded=np.asarray([str(name) for names in found.values() for name in names], dtype=str),
    )
    model.save_pretrained(saved)
    converter.main(["--input", official, "--output", converted, "--precision", "fp32"])


if __name__ == "__main__":
    main(*sys.argv[1:])
