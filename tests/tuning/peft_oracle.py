"""What peft makes of adapters that we wrote, and adapters that it writes itself; runs in the peers' environment.

python peft_oracle.py BASE.safetensors X.npy FOLDER...  writes FOLDER/theirs.npz: each module's output for x
python peft_oracle.py BASE.safetensors X.npy --make OUT writes an adapter of each kind to OUT/KIND, and the same file
"""

# It runs in an environment of its own, with torch and peft, which the project's does not have.
# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

KINDS = {
    "lora": LoraConfig(r=4, lora_alpha=6, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 5}),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True),
    "saved": LoraConfig(r=4, lora_alpha=6, modules_to_save=["lm_head"]),
    "miss": MissConfig(r=8),
    "bat": MissConfig(r=8, init_weights="bat"),
}


class Tree(nn.Module):
    """Linear layers with the names of a file, as rwkv7-hf and flash-linear-attention have them."""

    def __init__(self, tensors):
        super().__init__()
        for name, weight in tensors.items():
            if weight.ndim != 2 or not name.endswith(
                ("_proj.weight", "ffn.key.weight", "ffn.value.weight", "head.weight")
            ):
                continue
            *path, last = name.split(".")[:-1]
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            linear = nn.Linear(*weight.shape[::-1], bias=False)
            linear.weight.data = weight.double()
            module.add_module(last, linear)

    def prepare_inputs_for_generation(self):
        raise NotImplementedError

    def forward(self, x):
        del x


def outputs(model, x):
    """By name, the outputs of all linear layers of the tree for the first inputs of x."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "in_features") and not any(part in name for part in ("base_layer", "lora_", "original")):
            found[name.removesuffix(".modules_to_save.default")] = module(x[:, : module.in_features]).detach().numpy()
    return found


def main():
    base, x, *rest = sys.argv[1:]
    x = torch.from_numpy(np.load(x))
    torch.manual_seed(0)
    if rest[0] == "--make":
        for kind, config in KINDS.items():
            config.target_modules = ["r_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.value"]
            model = get_peft_model(Tree(load_file(base)), config).double()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            folder = Path(rest[1]) / kind
            model.save_pretrained(folder)
            np.savez(folder / "theirs.npz", **outputs(model, x))
        return
    for folder in rest:
        model = PeftModel.from_pretrained(Tree(load_file(base)), folder, autocast_adapter_dtype=False).double()
        np.savez(Path(folder) / "theirs.npz", **outputs(model, x))


main()
