"""Fill-in-the-middle prompts of RWKV-7 G1 models, which were trained on this order of parts.

Source: the prompt that the RWKV community's servers write for these models; a reply ends at `FIM_STOP`.
"""

from __future__ import annotations

from rwkv_jax.config import ConfigError

FIM_STOP = "✿"
"""Stop string of what is filled in."""


def fim_prompt(prefix: str, suffix: str) -> str:
    """The prompt whose continuation stands between `prefix` and `suffix`.

    Raises:
      ConfigError: one of them has the character that separates the parts.
    """
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if FIM_STOP in text:
            raise ConfigError(f"{name}: has the character {FIM_STOP}, which separates the parts; leave it out")
    return f"✿prefix✿✿suffix✿{suffix}✿middle✿{prefix}"
