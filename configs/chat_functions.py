"""Chats from a base model: all weights of configs/python_stdlib.py's run learn to write small functions when asked.

    rwkv train configs/python_stdlib.py        (or `make train`)
    python configs/chat_functions.py           (writes runs/chat_functions.jsonl: 1440 invented chats of two turns)
    rwkv data show runs/chat_functions.jsonl --tokenizer runs/python_stdlib
    rwkv train configs/chat_functions.py
    rwkv chat runs/chat_functions

Seen on 2 CPU cores that ten other jobs shared: 12 minutes, 1 minute 40 of processor time; held-out chats after 40, 80
and 120 steps: 0.128, 0.0067 and 0.0043 nats a token that counts, where the first step's training loss was 4.68. The
prompt below is answered with another argument's name after 40 steps, rightly after 80 and 120. Held-out chats are of
the same templates as the others, of other numbers and names: it is the format that this shows to be learned, no more.

Nothing was searched: 300 steps were begun, and showed that 120 are enough.
"""

import json
from pathlib import Path

from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)

BASE, CHATS = "runs/python_stdlib", "runs/chat_functions.jsonl"
VERBS = {"adds {} to {}": "+", "subtracts {} from {}": "-", "multiplies {} by {}": "*", "puts {} under {}": "/"}
ARGUMENTS = ("x", "n", "value", "size", "total", "count")


def config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/chat_functions",
        initial_weights=BASE,
        model=ModelConfig(vocab_size=2048, num_layers=4, width=192, head_dim=64),
        data=DataConfig(source=CHATS, chat="messages", tokenizer=BASE),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4, weight_decay=0.0, warmup_steps=10),
        training=StepConfig(num_steps=120, batch_size=4, sequence_length=256),
        evaluation=EvaluationConfig(
            every=40,
            sample_prompts=("User: Write a function that adds 61 to total.\n\nAssistant:",),
            sample_tokens=40,
            sample_temperature=0.0,
        ),
        checkpoint=CheckpointConfig(every=40, keep=1),
        logging=LoggingConfig(every=10),
    )


def chat(verb: str, sign: str, number: int, argument: str) -> dict[str, object]:
    """A function is asked for, and then another name for it."""

    def function(name: str) -> str:
        return f"def {name}({argument}):\n    return {argument} {sign} {number}"

    return {
        "messages": [
            {"role": "user", "content": f"Write a function that {verb.format(number, argument)}."},
            {"role": "assistant", "content": function("f")},
            {"role": "user", "content": f"Call it by_{number}."},
            {"role": "assistant", "content": function(f"by_{number}")},
        ]
    }


if __name__ == "__main__":
    lines = [
        json.dumps(chat(verb, sign, number, argument))
        for verb, sign in VERBS.items()
        for number in range(2, 62)
        for argument in ARGUMENTS
    ]
    Path(CHATS).parent.mkdir(exist_ok=True)
    Path(CHATS).write_text("\n".join(lines) + "\n", encoding="utf-8")
