"""RWKV-LM's trainer flags and their equivalents here, for the help, errors and docs/from-rwkv-lm.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rwkv_jax.config import ConfigError


class Ours(NamedTuple):
    """The equivalent of a flag of RWKV-LM."""

    fields: tuple[str, ...]
    """Fields of TrainConfig; empty if there is nothing to set."""
    note: str = ""
    """What differs, in at most a sentence."""

    def __str__(self) -> str:
        """Text for an error: the flags, then what differs."""
        flags = " and ".join("--" + field.replace("_", "-") for field in self.fields)
        return "; ".join(part for part in (flags, self.note) if part)


FLAGS: Mapping[str, Ours] = {
    "load_model": Ours(("initial_weights",), "a run of ours resumes by itself from its --run-dir"),
    "load_partial": Ours((), "weights must have the model's sizes; --initial-weights says which flags are missing"),
    "wandb": Ours(("logging.wandb",)),
    "proj_dir": Ours(("run_dir",)),
    "random_seed": Ours(("seed",), "always set, 0 by default; the same on any number of devices"),
    "data_file": Ours(("data.source",), "binidx by the path of its .bin or .idx, or without either ending"),
    "data_type": Ours((), "found from the files"),
    "vocab_size": Ours(("model.vocab_size",)),
    "ctx_len": Ours(("training.sequence_length",)),
    "epoch_steps": Ours(("checkpoint.every",), "there are no mini-epochs: everything counts steps"),
    "epoch_count": Ours(("training.num_steps",), "epoch_count times epoch_steps"),
    "epoch_begin": Ours(("training.first_step",), "epoch_begin times epoch_steps; rwkv-N.pth has N + 1 of them"),
    "epoch_save": Ours(("checkpoint.every",), "in steps"),
    "micro_bsz": Ours(("training.batch_size",), "over all devices: micro_bsz times devices times num_nodes"),
    "accumulate_grad_batches": Ours(("training.accumulation_steps",), "divides the batch rather than adding to it"),
    "n_layer": Ours(("model.num_layers",)),
    "n_embd": Ours(("model.width",)),
    "dim_att": Ours((), "always the width"),
    "dim_ffn": Ours(("model.ffn_width",)),
    "head_size": Ours(("model.head_dim",)),
    "head_size_a": Ours(("model.head_dim",)),
    "head_chunk": Ours(("training.loss_chunk",), "in tokens"),
    "my_testing": Ours(("model.generation",), "x070 is 7, x060 is 6, x052 is 5.2"),
    "kernel": Ours(("model.wkv_implementation",)),
    "lr_init": Ours(("optimizer.learning_rate",)),
    "lr_final": Ours(("optimizer.final_learning_rate",)),
    "warmup_steps": Ours(("optimizer.warmup_steps",), "10 by default; theirs is none"),
    "beta1": Ours(("optimizer.beta1",)),
    "beta2": Ours(("optimizer.beta2",)),
    "adam_eps": Ours(("optimizer.epsilon",)),
    "weight_decay": Ours(("optimizer.weight_decay",), "0.1 by default; theirs is 0"),
    "weight_decay_final": Ours(("optimizer.weight_decay_final",)),
    "grad_clip": Ours(("optimizer.clip_norm", "optimizer.clip_epsilon"), "theirs has an epsilon of 1e-6"),
    "layerwise_lr": Ours((), "always on"),
    "my_pile_stage": Ours(("optimizer.stage",), "1 and 2; stage 3 is stage 1 again"),
    "train_stage": Ours((), "a run begins, or resumes, by what is in --run-dir"),
    "my_pile_edecay": Ours(("optimizer.decay_fraction",), "1 - my_pile_edecay / epoch_count, exponential schedule"),
    "my_exit_tokens": Ours(
        ("training.num_steps",), "tokens divided by those of a step; with --optimizer.schedule cosine"
    ),
    "magic_prime": Ours(("data.magic_prime", "data.order"), "with --data.order official"),
    "grad_cp": Ours(("training.remat",), "1 is full"),
    "precision": Ours(("model.dtype",), "bf16 is bfloat16"),
    "strategy": Ours(("parallel.fsdp",), "deepspeed_stage_2 and 3 are fsdp; _offload is --parallel.offload-optimizer"),
    "devices": Ours((), "all that JAX finds; --parallel.data, fsdp, tensor and sequence share them out"),
    "num_nodes": Ours((), "found from the cluster, or --distributed.num-processes"),
    "ds_bucket_mb": Ours((), "XLA plans its own transfers"),
    "accelerator": Ours((), "what JAX finds"),
    "enable_progress_bar": Ours((), "shown on a terminal"),
    "enable_checkpointing": Ours((), "always on"),
    "train_type": Ours(("tuning.state",), "for states"),
    "dropout": Ours((), "there is none"),
    "pre_ffn": Ours((), "there is none"),
    "head_qk": Ours((), "there is none"),
    "tiny_att_dim": Ours((), "there is none"),
    "tiny_att_layer": Ours((), "there is none"),
    "my_qa_mask": Ours((), "there is none"),
    "my_pile_version": Ours((), "always 1"),
    "my_pile_shift": Ours((), "there is none"),
    "my_random_steps": Ours((), "there is none; --data.order windows shuffles"),
}
"""By the official name."""


def refuse_official_flags(arguments: Sequence[str]) -> None:
    """Raises ConfigError for the first argument that is a flag of RWKV-LM, with its equivalent."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and "." not in name and name in FLAGS:
            raise ConfigError(f"--{name} is a flag of RWKV-LM's trainer; here: {FLAGS[name]} (docs/from-rwkv-lm.md)")


def table() -> str:
    """The table of docs/from-rwkv-lm.md."""
    rows = ["| RWKV-LM | here | what differs |", "|---|---|---|"]
    for name, ours in FLAGS.items():
        flags = ", ".join(f"`--{field.replace('_', '-')}`" for field in ours.fields)
        rows.append(f"| `--{name}` | {flags} | {ours.note} |")
    return "\n".join(rows) + "\n"
