"""Runs a GGUF file in llama.cpp, for `test_llama_cpp`: `python llama_cpp_oracle.py MODEL QUESTIONS.npz ANSWERS.npz`.

Imports nothing of ours. QUESTIONS has `tokens`, `num_greedy`, and `texts` where the file has a tokenizer. The answers:
`logits` after each token read by itself, `at_once` those after all read in one go, the `greedy` tokens that follow, and
`ids` of the texts, with -1 behind each, and `ends`, the tokens at which texts end.

`python llama_cpp_oracle.py MODEL BLOCKS FILE_TYPE NUMBERS` quantizes a file, and computes float32 of the blocks.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from typing import Any

import cyllama.llama.llama_cpp as llama
import numpy as np


class Model(llama.LlamaModel):
    """With what this release of cyllama looks for when it is asked for logits, and has left out."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


def quantize(model: str, target: str, file_type: int) -> None:
    params = llama.LlamaModelQuantizeParams()
    params.ftype, params.nthread, params.allow_requantize = file_type, 1, True
    llama.model_quantize(model, target, params)


def decoded(context: Any, tokens: list[int], start: int) -> np.ndarray:
    """The logits [V] after some tokens, read in one go, which follow `start` others."""
    batch = llama.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    for i, token in enumerate(tokens):
        batch.add(token, start + i, [0], i == len(tokens) - 1)
    context.decode(batch)
    return np.asarray(context.get_logits(), np.float32)


def main() -> None:
    llama.disable_logging()
    if len(sys.argv) > 4:
        model_path, blocks, file_type, numbers = sys.argv[1:]
        quantize(model_path, blocks, int(file_type))
        quantize(blocks, numbers, 0)
        return
    model_path, questions_path, answers_path = sys.argv[1:]
    questions = np.load(questions_path)
    model = Model(model_path, llama.LlamaModelParams())
    params = llama.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    context = llama.LlamaContext(model, params)
    tokens = [int(token) for token in questions["tokens"]]
    at_once = decoded(context, tokens, 0)
    context.kv_cache_clear()
    answers: dict[str, Any] = {"at_once": at_once, "logits": [decoded(context, [x], i) for i, x in enumerate(tokens)]}
    greedy = [int(answers["logits"][-1].argmax())]
    while len(greedy) < int(questions["num_greedy"]):
        greedy.append(int(decoded(context, greedy[-1:], len(tokens) + len(greedy) - 1).argmax()))
    answers["greedy"] = greedy
    if "texts" in questions:
        vocabulary = model.get_vocab()
        texts = [str(text) for text in questions["texts"]]
        answers["ids"] = [token for text in texts for token in [*vocabulary.tokenize(text, False, False), -1]]
        answers["ends"] = [token for token in range(vocabulary.n_vocab) if vocabulary.is_eog(token)]
        answers["pieces"] = np.asarray(
            [vocabulary.detokenize(vocabulary.tokenize(text, False, False)) for text in texts]
        )
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in answers.items()}
    np.savez(answers_path, **arrays)


if __name__ == "__main__":
    main()
