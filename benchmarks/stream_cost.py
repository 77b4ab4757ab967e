"""What a streamed token costs the server beside the engine: CPU microseconds, without a model.

The engine's place is taken by a thread that says a token for every running request at each step, so
that all that is measured is the way from `on_delta` to the socket. The clients are another process.

    python benchmarks/stream_cost.py

Prints one JSON object last. The thread's own work is measured with listeners that do nothing and
is taken off.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

OUTPUT_TOKENS = 64
WORDS = (" the", " of", " stream", ",", "\n", " caf\u00e9")


class SteadyEngine:
    """Says a token for each of its requests every `step_s` seconds."""

    def __init__(self, step_s: float):
        self.step_s = step_s
        self._lock = threading.Lock()
        self._live: dict[str, tuple[Any, int, Callable[[Any], None]]] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Any, on_delta: Callable[[Any], None]) -> None:
        """Take a request."""
        with self._lock:
            self._live[request.id] = (request, 0, on_delta)

    def cancel(self, request_id: str) -> None:
        """Forget a request."""
        with self._lock:
            self._live.pop(request_id, None)

    def _run(self) -> None:
        from serve.engine.base import FINISH_LENGTH, Delta

        while True:
            time.sleep(self.step_s)
            with self._lock:
                turn = list(self._live.items())
            for name, (request, said, on_delta) in turn:
                last = said + 1 >= request.params.max_tokens
                word = WORDS[said % len(WORDS)]
                delta = Delta(name, (said,), word, finish_reason=FINISH_LENGTH if last else None)
                with self._lock:
                    if last:
                        self._live.pop(name, None)
                    elif name in self._live:
                        self._live[name] = (request, said + 1, on_delta)
                on_delta(delta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=128, help="of a round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--whole", action="store_true", help="ask for whole answers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        print(json.dumps(measure(arguments, Path(home))))


def measure(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Run the rounds."""
    from api_server import MODEL, running, tiny_settings
    from http_overhead import prompts

    draw = random.Random(0)
    with running(tiny_settings(home, threads=1)) as server:
        engine = SteadyEngine(arguments.step_ms / 1000)
        server.runtime.engine.submit = engine.submit  # type: ignore[method-assign]
        server.runtime.engine.cancel = engine.cancel  # type: ignore[method-assign]
        command = [sys.executable, str(HERE / "http_overhead.py"), "--clients"]
        command += [str(arguments.clients), "--client", server.url, server.key]
        client = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert client.stdin is not None
        assert client.stdout is not None
        here, costs, spans = psutil.Process(), [], []
        alone = engine_alone(engine, arguments)
        for number in range(arguments.rounds + 1):
            fields = {"model": MODEL, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
            fields |= {"ignore_eos": True, "stream": not arguments.whole}
            asked = [
                [token % 60 for token in prompt] for prompt in prompts(draw, arguments.requests)
            ]
            bodies = [{**fields, "prompt": prompt} for prompt in asked]
            before = cpu_seconds(here)
            client.stdin.write(json.dumps(bodies) + "\n")
            spans.append(float(client.stdout.readline()))
            used = cpu_seconds(here) - before
            if number:  # the first one warms up
                costs.append(used / (arguments.requests * OUTPUT_TOKENS) * 1e6 - alone)
        client.stdin.close()
        client.wait(timeout=30)
    return {
        "stream": not arguments.whole,
        "clients": arguments.clients,
        "step_ms": arguments.step_ms,
        "us_a_token": [round(cost, 1) for cost in costs],
        "median_us": round(statistics.median(costs), 1),
        "engine_alone_us": round(alone, 1),
        "seconds": [round(span, 2) for span in spans[1:]],
        "cpu": platform.processor() or platform.machine(),
    }


def engine_alone(engine: SteadyEngine, arguments: argparse.Namespace) -> float:
    """Return the microseconds a token of the engine's thread with listeners that do nothing."""
    from serve.engine.base import GenerationRequest, SamplingParams

    here, count = psutil.Process(), 512
    ended = threading.Event()

    def last(delta: Any) -> None:
        if delta.finish_reason is not None:
            ended.set()

    before = cpu_seconds(here)
    for number in range(arguments.clients):
        params = SamplingParams(max_tokens=count)
        listener = last if number == arguments.clients - 1 else lambda delta: None
        engine.submit(GenerationRequest(f"alone-{number}", (1,), params), listener)
    ended.wait()
    return (cpu_seconds(here) - before) / (arguments.clients * count) * 1e6


def cpu_seconds(process: psutil.Process) -> float:
    """Return what a process has used of the CPUs."""
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
