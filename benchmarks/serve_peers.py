"""This server beside llama.cpp's, with the same random weights: tokens/s, first tokens, memory of a conversation.

    python benchmarks/serve_peers.py --llama-python PATH         # ten minutes on two cores
    python benchmarks/serve_peers.py --llama-python PATH --num-layers 2 --width 64 --clients 1 2 --repetitions 1

PATH is the interpreter of the environment of serve_llama.py. Both have float32 weights of an RWKV-7 and the World
vocabulary, and are given the same texts of as many tokens, which differ from the first word on. Their answers must be
equal, but for one text in four, whose likeliest tokens may be too close; blanks and bytes that are no UTF-8, which
llama-cpp-python leaves out, are not compared. Servers take turns; while one is measured, the
other waits. Rates are of whole answers with their usage, first tokens of streams. Memory of a conversation is what
resident memory grows by with each of some conversations that the server is to keep: here in the prefix cache, there in
the cache in memory that it has (`cache`), in a server of its own.

What is measured is llama-cpp-python's server, in Python, which answers one request after the other; llama.cpp's own
llama-server, in C++, is not part of that package.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peers_processes import progress
from rwkv_jax.bench.random_model import RandomTensors
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.host import available_cores
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from serve_client import Reply, at_once, free_port, wait_until_ready
from serve_load import MB, resident_bytes
from serve_random import add_sizes

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 2**16
PROMPT_WORDS = 100
MAX_LENGTH = 1024
NUM_CONVERSATIONS = 8


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs."""

    title: str
    port: int
    process: int
    """Id of its process."""
    extra: dict[str, Any]
    """Fields of its requests, beside those that both know."""

    prompt_of: Callable[[str], str | list[int]] = str
    """A text as its requests have it."""

    def body(self, prompt: str, num_tokens: int, stream: bool) -> dict[str, Any]:
        """A greedy text."""
        body = {
            "model": "random",
            "prompt": self.prompt_of(prompt),
            "max_tokens": num_tokens,
            "temperature": 0.0,
            "stream": stream,
        }
        return body | self.extra

    def ask(self, prompts: Sequence[str], num_tokens: int, *, stream: bool) -> list[Reply]:
        """Its replies to as many clients at once. Raises RuntimeError if one is none."""
        replies = asyncio.run(at_once(self.port, [self.body(prompt, num_tokens, stream) for prompt in prompts]))
        for reply in replies:
            if reply.error or reply.status != 200:
                raise RuntimeError(f"{self.title} did not answer: {reply}")
        return replies


class Prompts:
    """Texts of words that are tokens of the World vocabulary each, another first word every time."""

    def __init__(self) -> None:
        tokenizer = WorldTokenizer()
        texts = (tokenizer.token_bytes(token) for token in range(1, 65530))
        self._words = [text.decode() for text in texts if text.isascii() and text[:1] == b" " and text[1:].isalpha()]
        self._draws = random.Random(0)
        self._draws.shuffle(self._words)

    def take(self, count: int) -> list[str]:
        """So many new ones."""
        return [
            "".join([self._words.pop(), *self._draws.choices(self._words, k=PROMPT_WORDS - 1)]) for _ in range(count)
        ]


@contextlib.contextmanager
def running(title: str, command: Sequence[str], port: int, ready: str, **about: Any) -> Iterator[Server]:
    """A server as a process; it ends with the block."""
    progress(f"starting {title}")
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), str(HERE)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_until_ready(port, ready)
            yield Server(title, port, process.pid, **about)
        except BaseException:
            log.seek(0)
            progress(log.read().decode(errors="replace")[-2000:])
            raise
        finally:
            process.terminate()
            process.wait()


def visible(text: str) -> str:
    """A text without blanks, and without the marks that stand for bytes that are no UTF-8."""
    return "".join(text.replace("\ufffd", "").split())


def ours(weights: Path, slots: int, sizes: Sequence[str]) -> contextlib.AbstractContextManager[Server]:
    """This server, on a file of weights."""
    port = free_port()
    command = [sys.executable, str(HERE / "serve_random.py"), "--world", f"--port={port}", f"--slots={slots}", *sizes]
    command += [f"--weights={weights}", f"--prefix-bytes={2**30}"]
    encode = WorldTokenizer().encode  # a text would begin with the end-of-text token, which llama.cpp does not add
    return running("this server", command, port, "/health", extra={"ignore_eos": True}, prompt_of=encode)


def llama(python: str, weights: Path, *, cache: bool) -> contextlib.AbstractContextManager[Server]:
    """That of llama-cpp-python."""
    port = free_port()
    job = {
        "weights": str(weights.with_suffix(".gguf")),
        "port": port,
        "max_length": MAX_LENGTH,
        "threads": available_cores(),
        "cache": cache,
    }
    command = [python, str(HERE / "serve_llama.py"), json.dumps(job)]
    return running("llama.cpp", command, port, "/v1/models", extra={"repeat_penalty": 1.0, "top_k": 1})


@dataclasses.dataclass
class Row:
    """What a server has done with so many clients at once."""

    rates: list[float] = dataclasses.field(default_factory=list)
    """Tokens generated a second, of each repetition."""
    firsts: list[float] = dataclasses.field(default_factory=list)
    """Median seconds to a first token."""


def measure(servers: Sequence[Server], clients: int, num_tokens: int, repetitions: int, prompts: Prompts) -> list[Row]:
    """Rates and first tokens, in turns."""
    rows = [Row() for _ in servers]
    for repetition in range(repetitions):
        texts, whole = [], prompts.take(clients)
        for server, row in zip(servers, rows, strict=True):
            progress(f"{server.title}, {clients} clients, {repetition + 1} of {repetitions}")
            begin = time.perf_counter()
            replies = server.ask(whole, num_tokens, stream=False)
            texts.append([(reply.num_prompt_tokens, visible(reply.text)) for reply in replies])
            row.rates.append(sum(reply.num_tokens for reply in replies) / (time.perf_counter() - begin))
            streams = server.ask(prompts.take(clients), num_tokens, stream=True)
            row.firsts.append(statistics.median(reply.first_seconds for reply in streams if reply.first_seconds))
        num_equal = sum(mine == theirs for mine, theirs in zip(*texts, strict=True))
        progress(f"{num_equal} of {clients} texts are equal")
        if num_equal < 0.75 * clients:
            raise RuntimeError(f"the servers do not serve the same model: {texts}")
    return rows


def bytes_of_a_conversation(server: Server, prompts: Prompts) -> float:
    """By how much memory grows with each conversation that is kept."""
    server.ask(prompts.take(2), 4, stream=False)
    before = resident_bytes(server.process)
    for prompt in prompts.take(NUM_CONVERSATIONS):
        server.ask([prompt], 4, stream=False)
    return (resident_bytes(server.process) - before) / NUM_CONVERSATIONS


def span(values: Sequence[float], factor: float = 1.0) -> str:
    """Median and extremes."""
    low, middle, high = (factor * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:,.0f} ({low:,.0f} - {high:,.0f})"


def run(arguments: argparse.Namespace, scratch: Path) -> None:
    """Measures and prints the table."""
    config = ModelConfig(vocab_size=VOCAB_SIZE, num_layers=arguments.num_layers, width=arguments.width)
    weights = scratch / "weights.pth"
    write_torch_file(weights, RandomTensors(config))
    convert(weights, weights.with_suffix(".gguf"), tokenizer="world")
    sizes = [f"--num-layers={config.num_layers}", f"--width={config.width}", f"--vocab-size={VOCAB_SIZE}"]
    prompts, slots = Prompts(), min(16, max(arguments.clients))
    with ours(weights, slots, sizes) as mine, llama(arguments.llama_python, weights, cache=False) as theirs:
        servers = (mine, theirs)
        for server in servers:
            server.ask(prompts.take(1), arguments.num_tokens, stream=True)
        print("| clients | | tokens/s | ms to the first token |\n|---|---|---|---|", flush=True)
        for clients in arguments.clients:
            rows = measure(servers, clients, arguments.num_tokens, arguments.repetitions, prompts)
            for server, row in zip(servers, rows, strict=True):
                print(f"| {clients} | {server.title} | {span(row.rates)} | {span(row.firsts, 1e3)} |", flush=True)
        kept = bytes_of_a_conversation(mine, prompts)
        print(f"\nmemory of a conversation: this server {kept / MB:.1f} MB", flush=True)
    with llama(arguments.llama_python, weights, cache=True) as theirs:
        print(f"llama.cpp {bytes_of_a_conversation(theirs, prompts) / MB:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True)
    add_sizes(parser, num_layers=12, width=768, vocab_size=VOCAB_SIZE)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the weights' files, some 3 GB")
    arguments = parser.parse_args()
    print(describe_machine())
    print(
        f"RWKV-7, {arguments.num_layers} x {arguments.width}, vocabulary {VOCAB_SIZE}, float32; prompts of "
        f"{PROMPT_WORDS} tokens, {arguments.num_tokens} generated; medians of {arguments.repetitions} in turn\n"
    )
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        run(arguments, Path(scratch))


if __name__ == "__main__":
    main()
