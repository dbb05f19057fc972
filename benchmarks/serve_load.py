"""Many clients at once for minutes, some of whom leave in the midst: whether the server answers all, and what it keeps.

    python benchmarks/serve_load.py                    # 32 clients, five minutes after one of warming up
    python benchmarks/serve_load.py --seconds 20 --warm-up-seconds 10 --num-layers 2 --width 64 --vocab-size 512

A server with random weights runs in a process of its own. Clients send prompts of 1 to 400 tokens, half of them
beginning alike, ask for 1 to 64 tokens, streamed or whole, and go on with the next request. A tenth of them leave
in the midst of their stream without a word. Afterwards no answer may have been an error, every slot must be free, and
resident memory may have grown by 20 MB and what the prefix cache has grown by, since the end of warming up. At last a
client leaves a text that would go on for long: its slot is to be free before two more bursts are generated (the one
that is running when the client leaves, and the one that is then under way) and what is generated in 20 ms, in which the
connection's end is to be noticed. Exit status 1 if any of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.inference.engine.options import EngineOptions
from serve_client import Reply, complete, free_port, metrics, wait_until_ready
from serve_random import add_sizes

HERE = Path(__file__).resolve().parent
MB = 10**6
GROWTH_BYTES = 20 * MB
LONGEST_PROMPT, MOST_TOKENS = 400, 64
LEAVING_SHARE = 0.1
NOTICING_SECONDS = 0.02


@contextlib.contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Port and process id of a server with random weights, once it is warm; it must end well at SIGTERM."""
    port = free_port()
    program = [sys.executable, str(HERE / "serve_random.py"), "--port", str(port), *arguments]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(port)
        yield port, process.pid
        process.send_signal(signal.SIGTERM)
        if status := process.wait(60):
            raise RuntimeError(f"the server ended with status {status}")
    finally:
        process.kill()
        process.wait()


def resident_bytes(process: int) -> int:
    """Resident memory of a process, of Linux."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def draw_request(draws: random.Random, vocab_size: int) -> tuple[dict[str, Any], int | None]:
    """A request, and after how many events its client leaves, if it does."""
    length, num_tokens = draws.randint(1, LONGEST_PROMPT), draws.randint(1, MOST_TOKENS)
    ids = [draws.randrange(1, vocab_size) for _ in range(length)]
    if draws.random() < 0.5:
        ids[: length // 2] = [1 + i % (vocab_size - 1) for i in range(length // 2)]
    body: dict[str, Any] = {"model": "random", "prompt": ids, "max_tokens": num_tokens, "ignore_eos": True}
    body["seed"] = draws.randrange(2**31)
    if draws.random() < LEAVING_SHARE:
        return body | {"stream": True, "max_tokens": MOST_TOKENS}, draws.randint(1, MOST_TOKENS // 2)
    return body | {"stream": draws.random() < 0.7}, None


async def load(port: int, num_clients: int, seconds: float, vocab_size: int, seed: int) -> list[Reply]:
    """Replies to all requests that clients send one after the other for some seconds."""
    end = time.monotonic() + seconds
    replies: list[Reply] = []

    async def client(number: int) -> None:
        draws = random.Random(f"{seed}, {number}")
        while time.monotonic() < end:
            body, leave_after = draw_request(draws, vocab_size)
            replies.append(await complete(port, body, leave_after))

    await asyncio.gather(*map(client, range(num_clients)))
    return replies


def wait_until_idle(port: int, seconds: float = 30.0) -> dict[str, float]:
    """The server's metrics once nothing runs, or after some seconds."""
    end = time.monotonic() + seconds
    while True:
        found = metrics(port)
        busy = found["rwkv_running_texts"] + found["rwkv_queued_texts"] + found["rwkv_paused_texts"]
        if not busy or time.monotonic() > end:
            return found
        time.sleep(0.05)


def tokens_after_leaving(port: int, vocab_size: int, repetitions: int = 10) -> list[tuple[int, float]]:
    """Tokens that are generated for a client that has left, from its last event on, and how many may be."""
    found, burst = [], EngineOptions().burst_length
    for repetition in range(repetitions):
        before = metrics(port)["rwkv_generated_tokens_total"]
        prompt = [1 + repetition % (vocab_size - 1)]
        body = {"model": "random", "prompt": prompt, "max_tokens": 10**6, "stream": True, "ignore_eos": True}
        reply = asyncio.run(complete(port, body, leave_after=4 * burst))
        if not reply.is_left:
            raise RuntimeError(f"a text that was to go on has ended: {reply}")
        generated = wait_until_idle(port)["rwkv_generated_tokens_total"] - before
        rate = reply.num_texts / reply.seconds
        found.append((int(generated) - reply.num_texts, 2 * burst + NOTICING_SECONDS * rate))
    return found


def report(replies: Sequence[Reply], seconds: float) -> str:
    """What the clients saw."""
    whole = [reply for reply in replies if not reply.is_left]
    first = sorted(reply.first_seconds for reply in replies if reply.first_seconds)
    return (
        f"{len(replies)} requests in {seconds:.0f} s, {len(replies) - len(whole)} left in the midst; time to the first "
        f"token: median {1e3 * statistics.median(first):.0f} ms, "
        f"95% within {1e3 * first[int(0.95 * len(first))]:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--warm-up-seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=32)
    add_sizes(parser, num_layers=6, width=256, vocab_size=4096)
    arguments = parser.parse_args()
    sizes = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in ("num-layers", "width", "vocab-size")]
    vocab_size = arguments.vocab_size
    print(describe_machine())
    failures = []
    with server(sizes) as (port, process):
        asyncio.run(load(port, arguments.clients, arguments.warm_up_seconds, vocab_size, seed=0))
        before, memory_before = wait_until_idle(port), resident_bytes(process)
        replies = asyncio.run(load(port, arguments.clients, arguments.seconds, vocab_size, seed=1))
        after, memory_after = wait_until_idle(port), resident_bytes(process)
        print(report(replies, arguments.seconds))
        errors = collections.Counter(reply.error for reply in replies if reply.error or reply.status != 200)
        if errors:
            failures.append(f"errors: {dict(errors)}")
        cache = after["rwkv_prefix_cache_bytes"] - before["rwkv_prefix_cache_bytes"]
        growth = memory_after - memory_before
        print(
            f"resident memory {memory_before / MB:.0f} -> {memory_after / MB:.0f} MB, by {growth / MB:.1f}, of which "
            f"prefix cache {cache / MB:.1f}"
        )
        if growth - cache > GROWTH_BYTES:
            failures.append(f"memory grew by {(growth - cache) / MB:.1f} MB beyond the prefix cache")
        busy = {name: after[name] for name in ("rwkv_running_texts", "rwkv_queued_texts", "rwkv_paused_texts")}
        print(f"at the end: {busy}")
        if any(busy.values()):
            failures.append("texts are left")
        extra = tokens_after_leaving(port, vocab_size)
        print(
            "tokens generated for a client that has left:", ", ".join(f"{count} of {most:.0f}" for count, most in extra)
        )
        if any(count > most for count, most in extra):
            failures.append("a text went on after its client had left")
    print("\n".join(failures) or "everything holds")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
