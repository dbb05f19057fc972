"""llama.cpp as a peer of benchmarks/decode_cpu.py, through the C interface that llama-cpp-python has.

Runs in an environment of its own, made with

    export CXXFLAGS="-fno-dse -fno-tree-dse" CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
    pip install llama-cpp-python==0.3.36

which compiles llama.cpp for the processor at hand and takes ten minutes on two cores. Without those flags GCC 12 leaves
out most of what llama.cpp writes before it loads the configuration of AMX tiles, and prompts of quantized models crash.
Its file in float32 is written by the driver, which needs the extra gguf.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.ctypeslib import as_array
from numpy.typing import NDArray

from peers_protocol import Job, Peer, serve

FILE_TYPES = {"q4_0": 2, "q8_0": 7, "bfloat16": 32}
"""Values of llama.cpp's `enum llama_ftype`."""


def prepare(weights: Path, precision: str, scratch: Path, threads: int) -> Path:
    """The file of a precision, made of that in float32 where it is not there yet; mixtures are llama.cpp's own."""
    if precision == "float32":
        return weights
    import llama_cpp

    path = scratch / f"{precision}.gguf"
    if path.exists():
        return path
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = threads, FILE_TYPES[precision]
    if llama_cpp.llama_model_quantize(bytes(weights), bytes(path), ctypes.byref(parameters)):
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
    path = prepare(Path(job.weights).with_suffix(".gguf"), job.precision, Path(job.scratch), job.threads)
    return LlamaCpp(path, job), {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}


if __name__ == "__main__":
    serve(open_peer)
