"""llama.cpp as a peer of benchmarks/decode_cpu.py, through the C interface that llama-cpp-python has.

Runs in an environment of its own, made with

    export CXXFLAGS="-fno-dse -fno-tree-dse" CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
    pip install llama-cpp-python==0.3.36 gguf safetensors

which compiles llama.cpp for the processor at hand and takes ten minutes on two cores. Without those flags GCC 12 leaves
out most of what llama.cpp writes before it loads the configuration of AMX tiles, and prompts of quantized models crash.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.ctypeslib import as_array
from numpy.typing import NDArray

from peers_protocol import Job, Peer, serve

FILE_TYPES = {"float32": 0, "q4_0": 2, "q8_0": 7, "bfloat16": 32}
"""Values of llama.cpp's `enum llama_ftype`."""

LOW_RANK = ("w", "a", "v", "g")
BLENDS = ("r", "w", "k", "v", "a", "g")
"""Order of token shift's factors in the tensor that holds them all."""

GLOBAL_NAMES = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}

LAYER_NAMES = {
    "ln1.weight": "attn_norm.weight",
    "ln1.bias": "attn_norm.bias",
    "ln2.weight": "attn_norm_2.weight",
    "ln2.bias": "attn_norm_2.bias",
    "att.w0": "time_mix_w0.weight",
    "att.a0": "time_mix_a0.weight",
    "att.k_k": "time_mix_k_k.weight",
    "att.k_a": "time_mix_k_a.weight",
    "att.r_k": "time_mix_r_k.weight",
    "att.receptance.weight": "time_mix_receptance.weight",
    "att.key.weight": "time_mix_key.weight",
    "att.value.weight": "time_mix_value.weight",
    "att.output.weight": "time_mix_output.weight",
    "att.ln_x.weight": "time_mix_ln.weight",
    "att.ln_x.bias": "time_mix_ln.bias",
    "ffn.x_k": "channel_mix_lerp_k.weight",
    "ffn.key.weight": "channel_mix_key.weight",
    "ffn.value.weight": "channel_mix_value.weight",
}
"""Of one layer, for tensors that keep their axes but for those of length 1."""


def gguf_tensors(tensors: Mapping[str, NDArray]) -> Iterator[tuple[str, NDArray]]:
    """Official tensors of an RWKV-7 under llama.cpp's names and in its shapes, one at a time."""
    for official, name in GLOBAL_NAMES.items():
        yield name, tensors[official]
    for layer in range(count_layers(tensors)):
        block = f"blocks.{layer}."
        for official, name in LAYER_NAMES.items():
            tensor = tensors[block + official]
            yield f"blk.{layer}.{name}", tensor if official.endswith(".weight") else tensor.reshape(-1)
        blends = [tensors[f"{block}att.x_{name}"].reshape(1, 1, -1) for name in BLENDS]
        yield f"blk.{layer}.time_mix_lerp_fused.weight", np.stack(blends)
        for name in LOW_RANK:
            # llama.cpp wants a value residual in the first layer too, of the sizes of `a`, and does not read it.
            source = "a" if name == "v" and layer == 0 else name
            for part in "12":
                yield f"blk.{layer}.time_mix_{name}{part}.weight", tensors[f"{block}att.{source}{part}"].T
        source = "v0" if layer else "a0"
        yield f"blk.{layer}.time_mix_v0.weight", tensors[f"{block}att.{source}"].reshape(-1)


def count_layers(tensors: Mapping[str, NDArray]) -> int:
    """L."""
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))


def write_gguf(path: Path, tensors: Mapping[str, NDArray], vocabulary: Sequence[bytes] | None = None) -> None:
    """Write official float32 tensors of an RWKV-7 as a file of llama.cpp.

    Args:
      vocabulary: of World models, the text of each token; None leaves the file without one.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "rwkv7")
    vocab_size, width = tensors["emb.weight"].shape
    writer.add_vocab_size(vocab_size)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        writer.add_tokenizer_model("rwkv")
        normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
        names = [repr(text)[2:-1] if text else f"[{token}]" for token, text in enumerate(vocabulary)]
        writer.add_token_list(names)
        writer.add_token_types([control, *(normal if text else unused for text in vocabulary[1:])])
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(width)
    writer.add_block_count(count_layers(tensors))
    writer.add_feed_forward_length(len(tensors["blocks.0.ffn.key.weight"]))
    writer.add_head_count(0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(tensors["blocks.0.att.r_k"].shape[1])
    writer.add_decay_lora_rank(tensors["blocks.1.att.w1"].shape[1])
    writer.add_iclr_lora_rank(tensors["blocks.1.att.a1"].shape[1])
    writer.add_value_residual_mix_lora_rank(tensors["blocks.1.att.v1"].shape[1])
    writer.add_gate_lora_rank(tensors["blocks.1.att.g1"].shape[1])
    writer.add_file_type(FILE_TYPES["float32"])
    for name, tensor in gguf_tensors(tensors):
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(weights: Path, precision: str, scratch: Path, threads: int) -> Path:
    """The file of a precision, written where it is not there yet; mixtures of types are llama.cpp's own."""
    import llama_cpp
    from safetensors.numpy import load_file

    path = scratch / f"{precision}.gguf"
    if path.exists():
        return path
    if precision == "float32":
        write_gguf(path, load_file(weights))
        return path
    source = prepare(weights, "float32", scratch, threads)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = threads, FILE_TYPES[precision]
    if llama_cpp.llama_model_quantize(bytes(source), bytes(path), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {precision}")
    return path


class LlamaCpp(Peer):
    """A context of llama.cpp."""

    def __init__(self, path: Path, job: Job) -> None:
        super().__init__()
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp could not load its file; its log says why")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = 2 * job.max_length * job.max_batch_size
        parameters.n_batch = job.max_length
        parameters.n_seq_max = job.max_batch_size
        parameters.n_threads = parameters.n_threads_batch = job.threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context; its log says why")
        self._batch = llama_cpp.llama_batch_init(job.max_length, 0, 1)
        fields = (self._batch.token, self._batch.pos, self._batch.logits)
        self._tokens, self._positions, self._wanted = (as_array(field, (job.max_length,)) for field in fields)
        as_array(self._batch.n_seq_id, (job.max_length,))[:] = 1
        self._max_length, self._length = job.max_length, 0

    def begin(self, batch_size: int) -> None:
        """See Peer."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        for place in range(self._max_length):
            self._batch.seq_id[place][0] = min(place, batch_size - 1)
        self._length = 0

    def read(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """See Peer; B or T must be 1."""
        batch_size, time = tokens.shape
        if batch_size > 1 and time > 1:
            raise ValueError(f"tokens: shape {tokens.shape}; texts of a batch are read one token at a time")
        self._batch.n_tokens = tokens.size
        self._tokens[: tokens.size] = tokens.reshape(-1)
        self._positions[: tokens.size] = self._length + np.arange(tokens.size) % time
        self._wanted[: tokens.size] = np.arange(tokens.size) % time == time - 1
        if status := self._api.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode ended with status {status}")
        self._length += time
        places = (time - 1 + time * np.arange(batch_size)).tolist()
        rows = [self._api.llama_get_logits_ith(self._context, place) for place in places]
        return np.stack([as_array(row, (self._vocab_size,)) for row in rows])


def open_peer(job: Job) -> tuple[Peer, dict[str, str]]:
    """llama.cpp with the weights of a job, and versions."""
    path = prepare(Path(job.weights).with_suffix(".safetensors"), job.precision, Path(job.scratch), job.threads)
    return LlamaCpp(path, job), {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}


if __name__ == "__main__":
    serve(open_peer)
