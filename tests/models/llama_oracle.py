"""What transformers makes of small Llamas and Qwens with random weights; runs in an environment that has it.

python llama_oracle.py OUT  writes what lies in tests/golden/llama: OUT/NAME.json and OUT/NAME.npz of each case, and the
folders OUT/qwen3 and OUT/llama3, with a tokenizer and the texts that the model writes
"""

# It runs in an environment of its own, with torch and transformers, which the project's does not have.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 400,  # the second of four wavelengths lies between the bounds
}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "head_dim": 6}),
    "llama2_tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 6}),
    "llama3": ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "head_dim": 8, "rope_parameters": SCALED}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 10}),
    "qwen3_untied": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
}
WITH_GRADIENTS = ("llama3", "qwen2", "qwen3")


def draw(name, shape):
    """A tensor's numbers, by the name that transformers gives it; tests/models/test_llama_golden.py draws the same."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        x = 1 + 0.2 * x
    elif name.endswith("weight"):
        x = x / np.sqrt(shape[-1])
    return x.astype(np.float32)


def results(model, tokens, has_gradients):
    """Logits, hidden states of the first row, and gradients (as float32) of the mean loss of the next tokens."""
    out = model(tokens, output_hidden_states=True)
    found = {"logits": out.logits, "hidden": torch.stack(out.hidden_states[1:])[:, 0]}
    if has_gradients:
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        found |= {"loss": loss} | {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    arrays = {name: x.detach().numpy() for name, x in found.items()}
    return {name: x.astype(np.float32) if name.startswith("grad.") else x for name, x in arrays.items()}


def build(kind, fields):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | fields), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    return model.eval()


FOLDERS = {
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, {"pad_token_id": None}),
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|> $A", {"bos_token_id": 276}),
}
"""Special tokens, of which the first with an "end" ends texts; the template of texts; and fields of the config."""
PROMPTS = ("def f(x):", "The sea, the sea", "x")


def make_tokenizer(special, template):
    """A byte-level BPE of 276 entries, and its special tokens behind them, as Qwen and Llama 3 have them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=276, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the sea and the other; the def of return the rest"] * 3, trainer)
    made.add_special_tokens(special)
    if template is not None:
        ids = [(token, made.token_to_id(token)) for token in special]
        made.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ids)
    return made


def write_folder(folder, case):
    """A model with random weights as the hub has it: qwen3 padded, in one file; llama3 in bfloat16 and in shards."""
    special, template, fields = FOLDERS[case]
    tokenizer = make_tokenizer(special, template)
    end = next(tokenizer.token_to_id(token) for token in special if "end" in token)
    size = tokenizer.get_vocab_size()
    kind, own = CASES[case]
    padded = -(-size // 64) * 64 if case == "qwen3" else size
    model = build(kind, own | fields | {"vocab_size": padded, "eos_token_id": end})
    model.generation_config.eos_token_id = end
    with torch.no_grad():
        model.get_input_embeddings().weight[size:] = 0  # nobody's rows
    dtype = torch.bfloat16 if case == "llama3" else torch.float32
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB" if case == "llama3" else "1GB")
    tokenizer.save(str(folder / "tokenizer.json"))
    model, texts = model.float(), {}
    for prompt in PROMPTS:
        ids = PreTrainedTokenizerFast(tokenizer_object=tokenizer)(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, do_sample=False, max_new_tokens=32, pad_token_id=end)[0, ids.shape[1] :].tolist()
        texts[prompt] = {"prompt_ids": ids[0].tolist(), "ids": written, "text": tokenizer.decode(written)}
    (folder / "greedy.json").write_text(json.dumps(texts) + "\n")


def main():
    out = Path(sys.argv[1])
    for case in FOLDERS:
        write_folder(out / case, case)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 24)))
    as_is = {}
    for case, (kind, fields) in CASES.items():
        model = build(kind, fields)
        as_is[case] = model(tokens).logits.detach().numpy()
        config = {name: x for name, x in model.config.to_dict().items() if name not in ("id2label", "label2id")}
        (out / f"{case}.json").write_text(json.dumps(config, indent=1) + "\n")
    # It computes norms and rotations in float32 whatever the dtype; here what it calls float32 is float64.
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    for case, (kind, fields) in CASES.items():
        found = results(build(kind, fields).double(), tokens, case in WITH_GRADIENTS)
        print(case, np.abs(found["logits"] - as_is[case]).max(), {x.dtype.name for x in found.values()})
        np.savez_compressed(out / f"{case}.npz", tokens=tokens.numpy(), logits_float32=as_is[case], **found)


main()
