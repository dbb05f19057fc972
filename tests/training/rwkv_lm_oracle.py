"""Training steps by the equations of RWKV-LM (524481d5), in float64, for a test to hold ours against.

    PEER_PYTHON tests/training/rwkv_lm_oracle.py FLAGS.json INPUT.npz OUTPUT.npz

Written from the equations, in PyTorch, as plain recurrences over time; Adam, decoupled decay and clipping are PyTorch's
own. It runs in an environment that has it. FLAGS are those of the official trainer, and generation, head_size and
num_steps (its epoch_count times epoch_steps, or my_exit_tokens in steps). INPUT has the parameters by official name and
`rows`, integers [steps, B, T + 1]. OUTPUT gets the parameters after the last step, and of each step `losses` and
`norms`, of the gradient before it is clipped.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

L2WRAP = 1e-4


class Part(dict[str, Tensor]):
    """The parameters whose names begin alike, such as blocks.0.att, by what is left of the name."""

    def part(self, prefix: str) -> Part:
        return Part({name.removeprefix(prefix): x for name, x in self.items() if name.startswith(prefix)})

    def matrix(self, name: str, x: Tensor) -> Tensor:
        return x @ self[f"{name}.weight"].mT

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], 1e-5)

    def mixed(self, name: str, x: Tensor) -> Tensor:
        """The token mixed with the one before it: RWKV-4 and 5 name the share of this one, 6 and 7 the other's."""
        before = shifted(x)
        share = self[name]
        return x * share + before * (1 - share) if "time_mix" in name else x + (before - x) * share

    def head_norm(self, y: Tensor, eps: float) -> Tensor:
        """[B, T, H, N] -> [B, T, C]."""
        batch, time, heads, _ = y.shape
        normed = functional.group_norm(y.reshape(batch * time, -1), heads, self["ln_x.weight"], self["ln_x.bias"], eps)
        return normed.view(batch, time, -1)


def shifted(x: Tensor) -> Tensor:
    """The token before each; zero before the first."""
    return functional.pad(x, (0, 0, 1, -1))


# Time mixing: (parameters, x [B, T, C], head size N, first layer's values or None) -> [B, T, C], first values


def time_mix_4(p: Part, x: Tensor, head_size: int, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
    k, v, r = (p.matrix(name, p.mixed(f"time_mix_{name[0]}", x)) for name in ("key", "value", "receptance"))
    decay, bonus = torch.exp(-torch.exp(p["time_decay"])), torch.exp(p["time_first"])
    weighted, weights = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    outputs = []
    for key, value in zip(k.exp().unbind(1), v.unbind(1), strict=True):
        outputs.append((weighted + bonus * key * value) / (weights + bonus * key))
        weighted, weights = decay * weighted + key * value, decay * weights + key
    return p.matrix("output", torch.sigmoid(r) * torch.stack(outputs, 1)), first


def matrix_states(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """RWKV-5 and 6: y_t = r_t (diag(u) k_t v_t^T + S), then S = diag(w_t) S + k_t v_t^T; all [B, T, H, N], u [H, N]."""
    state, outputs = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(r.shape[1]):
        new = k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((r[:, t, :, :, None] * (bonus[:, :, None] * new + state)).sum(-2))
        state = decay[:, t, :, :, None] * state + new
    return torch.stack(outputs, 1)


def time_mix_5(p: Part, x: Tensor, head_size: int, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
    r, k, v, g = (p.matrix(name, p.mixed(f"time_mix_{name[0]}", x)) for name in ("receptance", "key", "value", "gate"))
    r, k, v = (z.unflatten(-1, (-1, head_size)) for z in (r, k, v))
    decay = torch.exp(-torch.exp(p["time_decay"])).expand_as(k)
    y = matrix_states(r, k, v, decay, p["time_faaaa"])
    return p.matrix("output", p.head_norm(y / 8, 1e-5) * functional.silu(g)), first


def time_mix_6(p: Part, x: Tensor, head_size: int, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
    before = shifted(x)
    low_rank = torch.tanh(p.mixed("time_maa_x", x) @ p["time_maa_w1"]).unflatten(-1, (5, -1))
    w, k, v, r, g = (
        x + (before - x) * (p[f"time_maa_{name}"] + low_rank[:, :, i] @ p["time_maa_w2"][i])
        for i, name in enumerate("wkvrg")
    )
    w = p["time_decay"] + torch.tanh(w @ p["time_decay_w1"]) @ p["time_decay_w2"]
    r, k, v, g = p.matrix("receptance", r), p.matrix("key", k), p.matrix("value", v), p.matrix("gate", g)
    r, k, v, w = (z.unflatten(-1, (-1, head_size)) for z in (r, k, v, w))
    y = matrix_states(r, k, v, torch.exp(-torch.exp(w)), p["time_faaaa"])
    return p.matrix("output", p.head_norm(y, 64e-5) * functional.silu(g)), first


def time_mix_7(p: Part, x: Tensor, head_size: int, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
    xr, xw, xk, xv, xa, xg = (p.mixed(f"x_{name}", x) for name in "rwkvag")
    r, k, v = p.matrix("receptance", xr), p.matrix("key", xk), p.matrix("value", xv)
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"] + torch.tanh(xw @ p["w1"]) @ p["w2"]))
    rate = torch.sigmoid(p["a0"] + xa @ p["a1"] @ p["a2"])
    gate = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
    if first is None:
        first = v
    else:
        v = v + (first - v) * torch.sigmoid(p["v0"] + xv @ p["v1"] @ p["v2"])
    removed = functional.normalize((k * p["k_k"]).unflatten(-1, (-1, head_size)), dim=-1)
    k = k * (1 + (rate - 1) * p["k_a"])
    r, k, v, decay, rate = (z.unflatten(-1, (-1, head_size)) for z in (r, k, v, decay, rate))
    state, outputs = torch.zeros_like(v[:, 0, :, :, None] * k[:, 0, :, None]), []  # [B, H, value, key]
    for t in range(x.shape[1]):
        taken = state @ -removed[:, t, :, :, None]
        state = state * decay[:, t, :, None] + taken * (removed * rate)[:, t, :, None]
        state = state + v[:, t, :, :, None] * k[:, t, :, None]
        outputs.append((state @ r[:, t, :, :, None])[..., 0])
    y = p.head_norm(torch.stack(outputs, 1), 64e-5)
    y = y + ((r * k * p["r_k"]).sum(-1, keepdim=True) * v).flatten(2)
    return p.matrix("output", y * gate), first


TIME_MIX = {"4": time_mix_4, "5": time_mix_5, "6": time_mix_6, "7": time_mix_7}


def channel_mix(p: Part, x: Tensor) -> Tensor:
    """V relu(K x_k)^2, gated by sigmoid(R x_r) before RWKV-7."""
    blends = {name[-1]: p.mixed(name, x) for name in p if not name.endswith(".weight")}
    out = p.matrix("value", torch.relu(p.matrix("key", blends["k"])) ** 2)
    return torch.sigmoid(p.matrix("receptance", blends["r"])) * out if "r" in blends else out


def logits_of(p: Part, tokens: Tensor, generation: str, head_size: int) -> Tensor:
    """[B, T] -> [B, T, V]."""
    x = p.part("blocks.0.").norm("ln0", p["emb.weight"][tokens])
    layer, first = 0, None
    while block := p.part(f"blocks.{layer}."):
        mixed, first = TIME_MIX[generation[0]](block.part("att."), block.norm("ln1", x), head_size, first)
        x = x + mixed
        x = x + channel_mix(block.part("ffn."), block.norm("ln2", x))
        layer += 1
    return p.matrix("head", p.norm("ln_out", x))


# Training


def group_of(name: str, x: Tensor) -> tuple[float, bool]:
    """The factor on a parameter's learning rate, and whether it decays."""
    if name.endswith((".time_decay", ".att.w0")):
        return 2.0, False
    if name.endswith(".time_first"):
        return 3.0, False
    return 1.0, name.endswith(".weight") and x.squeeze().ndim >= 2


def rates(flags: dict[str, Any], step: int) -> tuple[float, float]:
    """Learning rate and weight decay of a step of this run, which takes up after `epoch_begin` steps of another."""
    warmup, total, real_step = flags["warmup_steps"], flags["num_steps"], step + flags["epoch_begin"]
    first, last = flags["lr_init"], flags["lr_final"]
    if flags["my_exit_tokens"]:  # by tokens, of which each step has the same number
        progress = min(1.0, max(0.0, (real_step - warmup) / (total - warmup)))
        rate = (first + last) / 2 + (first - last) / 2 * math.cos(math.pi * progress)
    else:
        flat = flags["my_pile_edecay"]
        progress = min(1.0, max(0.0, (real_step - flat - warmup + 1) / (total - flat - warmup)))
        rate = first * (last / first) ** progress
    if step < warmup:
        start = flags["warmup_start"]  # not a flag of theirs: 0.2 in v4neo's code, 0.01 in later trainers'
        rate *= start + (1 - start) * step / warmup
    decay, final_decay = flags["weight_decay"], flags["weight_decay_final"]
    return rate, decay * (final_decay / decay) ** progress if final_decay > 0 else decay


def main(flags_path: str, input_path: str, output_path: str) -> None:
    """Read flags, parameters and rows; take the steps; write what came of them."""
    torch.set_num_threads(1)
    flags, arrays = json.loads(Path(flags_path).read_text()), dict(np.load(input_path))
    batches = torch.from_numpy(arrays.pop("rows")).long()
    params = Part({name: torch.from_numpy(x).double().requires_grad_() for name, x in arrays.items()})
    groups = []
    for name, x in params.items():
        factor, decays = group_of(name, x)
        groups.append({"params": [x], "factor": factor, "decays": decays})
    adam = torch.optim.AdamW(groups, betas=(flags["beta1"], flags["beta2"]), eps=flags["adam_eps"], foreach=False)
    losses, norms = [], []
    for step, rows in enumerate(batches):
        rate, decay = rates(flags, step)
        for group in adam.param_groups:
            group["lr"], group["weight_decay"] = rate * group["factor"], decay * group["decays"]
        logits = logits_of(params, rows[:, :-1], flags["generation"], flags["head_size"]).flatten(0, 1)
        loss = functional.cross_entropy(logits, rows[:, 1:].flatten())
        # L2Wrap: the loss is what it was; the gradient has more at each token's largest logit.
        largest, where = logits.detach().max(-1, keepdim=True)
        pull = torch.zeros_like(logits).scatter(-1, where, largest * L2WRAP / len(logits))
        logits.register_hook(pull.add)
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params.values(), flags["grad_clip"], foreach=False)))
        adam.step()
        losses.append(loss.item())
    np.savez(output_path, losses=losses, norms=norms, **{name: x.detach().numpy() for name, x in params.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
