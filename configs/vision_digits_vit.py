"""The run of vision_digits.py with a ViT of equal size: the same images, number of parameters and steps.

    rwkv train configs/vision_digits_vit.py

Seen on 2 CPU cores that much other work shared: 1 minute; 61.8% of the held-out digits. One seed. The learning rate is
RWKV's and the initial values are GPT-2's; no others were tried, and both a search and more steps may well do better.
"""

import dataclasses
from pathlib import Path

from rwkv_jax.applications.vision.config import VisionConfig
from rwkv_jax.cli import load_config


def config() -> VisionConfig:
    """The bidirectional layers have a second time mixing; the ViT has as many parameters by a wider feed-forward."""
    rwkv = load_config(Path(__file__).with_name("vision_digits.py"))
    assert isinstance(rwkv, VisionConfig)
    model = dataclasses.replace(rwkv.model.transformer_of_equal_size(context_length=16), ffn_width=640)
    return dataclasses.replace(rwkv, run_dir="runs/vision_digits_vit", model=model)
