"""KTO on the replies of dpo_python_stdlib.py, each by itself: desirable with a docstring, undesirable without.

    rwkv train configs/python_stdlib.py        (or `make train`)
    python -m examples.docstrings.pairs        (writes labeled.jsonl, too)
    rwkv train configs/kto_python_stdlib.py
    python -m examples.docstrings.share runs/python_stdlib runs/kto_python_stdlib

Seen on 2 CPU cores (an AMD EPYC) that other work shared: 2 minutes. Held-out replies have the right sign in 71.3% after
60 steps (accuracy 0.713, and 0.800 after 30; the margin of pairs is not defined here), loss 0.369, KL 2.47. Functions
without a docstring begin with one in 99.5% of 400 replies (the base 90.5%, DPO 98.8%).

Nothing was searched: the rate is DPO's; a step has 16 replies, as many as DPO's 8 pairs.
"""

import dataclasses
from pathlib import Path

from rwkv_jax.cli import load_config
from rwkv_jax.config import TrainConfig


def config() -> TrainConfig:
    dpo = load_config(Path(__file__).with_name("dpo_python_stdlib.py"))
    return dataclasses.replace(
        dpo,
        run_dir="runs/kto_python_stdlib",
        data=dataclasses.replace(dpo.data, source="runs/docstrings/labeled.jsonl"),
        training=dataclasses.replace(dpo.training, objective="kto", batch_size=16),
    )
