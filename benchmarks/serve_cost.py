"""What HTTP costs: the server beside the engine that it serves, in one process, in turns.

    python benchmarks/serve_cost.py                                    # 12 x 768, four minutes on two cores
    python benchmarks/serve_cost.py --num-layers 2 --width 64 --vocab-size 512 --repetitions 2 --long-prompt 600

The engine's own row is 16 tasks that iterate over its streams, all of them given together; the server's is 16 clients
in a process of their own, which share the processor with it. Then one text alone, for its first token. Then the first
token of a short prompt that comes while a long one is read, counted in calls that read `prefill_length` tokens of the
long one, which are timed by the first token of the long prompt, alone or not, whichever came sooner. Exit status 1 if
HTTP costs more than a tenth of the engine's rate, or 20 ms of the first token, or if the short prompt waits for three
calls or more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from peers_processes import PeerProcess
from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.server import open_access_log
from rwkv_jax.serving.service import Service
from serve_client import free_port, wait_until_ready
from serve_random import add_sizes

MOST_COST, MOST_DELAY, MOST_CALLS = 0.1, 0.02, 3.0
PROMPT_TOKENS = 16
SHORT_PROMPT = 8


@contextlib.contextmanager
def served(engine: Engine) -> Iterator[int]:
    """The port of a server of an engine, in a thread of this process, with its log."""
    options = ServeOptions(port=free_port(), access_log=Path("/dev/null"))
    app = create_app(Service(engine, "random", options))
    server = uvicorn.Server(uvicorn.Config(app, port=options.port, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    with open_access_log(options):
        thread.start()
        try:
            wait_until_ready(options.port)
            yield options.port
        finally:
            server.should_exit = True
            thread.join()


class Sides:
    """The engine, and the server in front of it."""

    def __init__(self, engine: Engine, port: int, client: PeerProcess, num_tokens: int) -> None:
        self.engine, self.port, self.client, self.num_tokens = engine, port, client, num_tokens
        self._draws = random.Random(0)

    def prompts(self, count: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
        """Prompts that nobody has read."""
        return [[self._draws.randrange(1, self.engine.config.vocab_size) for _ in range(length)] for _ in range(count)]

    def direct(self, count: int, num_tokens: int) -> tuple[float, float]:
        """Seconds for so many texts by the engine alone, and the mean seconds to their first tokens."""

        options: Any = {"sampling": SamplingParams.greedy(), "stop_ids": (), "max_tokens": num_tokens}
        begin = time.perf_counter()

        async def text(stream: Stream) -> float:
            first = math.inf
            async with stream:
                async for _ in stream:
                    first = min(first, time.perf_counter())
            return first - begin

        async def texts() -> list[float]:
            with self.engine.hold():  # all of them are given together
                streams = [self.engine.stream(prompt, **options) for prompt in self.prompts(count)]
            return list(await asyncio.gather(*map(text, streams)))

        firsts = asyncio.run(texts())
        return time.perf_counter() - begin, statistics.mean(firsts)

    def body(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """A greedy text, streamed."""
        body = {"model": "random", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0, "stream": True}
        return body | {"ignore_eos": True}

    def served(self, bodies: Sequence[dict[str, Any]], delays: Sequence[float] | None = None) -> list[dict[str, Any]]:
        """Replies of the server."""
        replies = self.client.ask({"port": self.port, "bodies": bodies, "delays": delays})["replies"]
        for reply in replies:
            if reply["error"] or reply["status"] != 200:
                raise RuntimeError(f"the server did not answer: {reply}")
        return replies

    def http(self, count: int, num_tokens: int) -> tuple[float, float]:
        """As `direct`, by the server."""
        replies = self.served([self.body(prompt, num_tokens) for prompt in self.prompts(count)])
        return max(reply["seconds"] for reply in replies), statistics.mean(reply["first_seconds"] for reply in replies)

    def in_turns(self, count: int, num_tokens: int, repetitions: int) -> list[tuple[tuple[float, float], ...]]:
        """Both, in turns; what the first of each compiles is not counted."""
        for side in (self.direct, self.http):
            side(count, num_tokens)
        return [(self.direct(count, num_tokens), self.http(count, num_tokens)) for _ in range(repetitions)]

    def calls_before_short_prompt(self, long_prompt: int, repetitions: int) -> list[float]:
        """Seconds to the first token of a short prompt that comes amidst a long one, in calls of the long one."""
        found = []
        for _ in range(repetitions):
            num_calls = math.ceil(long_prompt / self.engine.options.prefill_length)
            (alone,) = self.served([self.body(self.prompts(1, long_prompt)[0], 1)])
            delay = self._draws.uniform(2.0, 4.0) * alone["first_seconds"] / num_calls
            bodies = [self.body(self.prompts(1, length)[0], 1) for length in (long_prompt, SHORT_PROMPT)]
            long, short = self.served(bodies, [0.0, delay])
            if long["first_seconds"] < delay:
                raise RuntimeError("the long prompt had been read before the short one came; take a longer one")
            # The shorter time of a call, since the machine's speed drifts: the short prompt shall not look better.
            call_seconds = min(alone["first_seconds"], long["first_seconds"]) / num_calls
            found.append(short["first_seconds"] / call_seconds)
        return found


def span(values: Sequence[float], digits: int = 1) -> str:
    """Median and extremes."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def report(sides: Sides, count: int, repetitions: int, long_prompt: int) -> list[str]:
    """Measures and prints the table; what does not hold."""
    rounds = sides.in_turns(count, sides.num_tokens, repetitions)
    single = sides.in_turns(1, 1, 3 * repetitions)
    tokens = count * sides.num_tokens
    print("| | the engine alone | the server |\n|---|---|---|")
    for title, values in (
        (f"{count} texts, tokens/s", [[tokens / side[0] for side in both] for both in rounds]),
        (f"{count} texts, ms to the first token", [[1e3 * side[1] for side in both] for both in rounds]),
        ("one text, ms to the first token", [[1e3 * side[1] for side in both] for both in single]),
    ):
        print(f"| {title} | " + " | ".join(span(side) for side in zip(*values, strict=True)) + " |")
    cost = statistics.median(1 - direct[0] / http[0] for direct, http in rounds)
    print(f"\nHTTP costs {100 * cost:.1f}% of the engine's tokens/s (median of the ratios within each round)")
    failures = [f"HTTP costs more than {100 * MOST_COST:.0f}%"] if cost > MOST_COST else []
    for title, both in (("alone", single), (f"of {count} at once", rounds)):
        delay = statistics.median(http[1] - direct[1] for direct, http in both)
        print(f"the first token of a text {title} comes {1e3 * delay:.1f} ms later")
        if delay > MOST_DELAY:
            failures.append(f"the first token {title} comes more than {1e3 * MOST_DELAY:.0f} ms later")
    calls = sides.calls_before_short_prompt(long_prompt, repetitions)
    print(f"a short prompt amidst one of {long_prompt} has its first token after {span(calls, 2)} calls that read it")
    if max(calls) >= MOST_CALLS:
        failures.append(f"a short prompt waited for {max(calls):.2f} calls")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, num_layers=12, width=768, vocab_size=65536)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--long-prompt", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    options = EngineOptions(num_slots=arguments.texts, prefix_bytes=0)
    print(describe_machine())
    print(
        f"RWKV-7, {config.num_layers} x {config.width}, vocabulary {config.vocab_size}, float32; prompts of "
        f"{PROMPT_TOKENS}, {arguments.num_tokens} tokens each; medians of {arguments.repetitions} rounds in turn\n"
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        Engine(random_model(config), NumberTokenizer(config.vocab_size), options) as engine,
    ):
        engine.warm_up()
        client = PeerProcess(sys.executable, "serve_client.py", {}, Path(scratch) / "client.log", {})
        client.answer()
        try:
            with served(engine) as port:
                sides = Sides(engine, port, client, arguments.num_tokens)
                failures = report(sides, arguments.texts, arguments.repetitions, arguments.long_prompt)
        finally:
            client.close()
    print("\n".join(failures) or "everything holds")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
