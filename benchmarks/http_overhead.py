"""What HTTP costs: the same engine asked through the server and directly, in turns.

The server runs in this process, the clients in another, so that both ways use one loaded model,
one cache and the same few minutes of the machine. A round asks for the same number of answers
first one way, then the other, each time with prompts that nobody sent before.

    python benchmarks/http_overhead.py
    python benchmarks/http_overhead.py --stream
    python benchmarks/http_overhead.py --stream --varied --requests 96 --rounds 4

Prints one JSON object last: output tokens a second by round, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "peers"), str(HERE.parent / "tests")]

OUTPUT_TOKENS = 64
VARIED = (32, 96)  # and all between, 64 in the mean
PROMPT_TOKENS = 75
LOW_WATER = 48 << 10  # bytes; less than what the kernel keeps for a connection
TOKEN_IDS = (100, 40_000)  # that prompts are drawn from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=32, help="of a round, each way")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", help="default: the one that hone serves")
    parser.add_argument("--models", type=Path, help="folder of downloaded models")
    parser.add_argument(
        "--varied",
        action="store_true",
        help="answers of 32 to 96 tokens, so that clients do not come back all at once",
    )
    parser.add_argument("--stream", action="store_true", help="ask for streams over HTTP")
    parser.add_argument("--client", nargs=2, metavar=("URL", "KEY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        answer_requests(*arguments.client, arguments.clients)
    else:
        with tempfile.TemporaryDirectory() as home:
            print(json.dumps(measure(arguments, Path(home))))


def measure(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Run the rounds."""
    from api_server import running
    from engine import Load
    from load import find_model

    from data.settings import Settings

    folder, dtype = find_model(arguments, home)
    settings = Settings(home=home, model=str(folder), dtype=dtype, embedded_worker=False)
    draw = random.Random(0)
    rates: dict[str, list[float]] = {"engine": [], "http": []}
    # CPU seconds are less noisy than time; those of the server and its clients together, by way.
    spent = {"engine": 0.0, "http": 0.0, "clients": 0.0}
    with running(settings) as server:
        command = [sys.executable, __file__, "--clients", str(arguments.clients)]
        command += ["--client", server.url, server.key]
        client = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        model = server.runtime.models.base_model
        load = Load(server.runtime.engine, seed=0)

        def engine(count: int) -> float:
            asked, lengths = prompts(draw, count), output_lengths(draw, count, arguments.varied)
            started = time.monotonic()
            load.run([None] * count, arguments.clients, asked, lengths)
            return sum(lengths) / (time.monotonic() - started)

        def http(count: int) -> float:
            asked, lengths = prompts(draw, count), output_lengths(draw, count, arguments.varied)
            fields = {"model": model, "temperature": 0, "ignore_eos": True}
            fields["stream"] = arguments.stream
            bodies = [
                {**fields, "prompt": prompt, "max_tokens": length}
                for prompt, length in zip(asked, lengths, strict=True)
            ]
            client.stdin.write(json.dumps(bodies) + "\n")
            return sum(lengths) / float(client.stdout.readline())

        ways = [engine, http]
        processes = (psutil.Process(), psutil.Process(client.pid))
        for way in ways:
            way(arguments.clients)  # warm
        for number in range(arguments.rounds):
            for way in ways:
                before, own = cpu_seconds(processes), cpu_seconds(processes[1:])
                rates[way.__name__].append(round(way(arguments.requests), 1))
                spent[way.__name__] += cpu_seconds(processes) - before
                spent["clients"] += cpu_seconds(processes[1:]) - own
            ways.reverse()  # neither is always the first
            print(number + 1, rates, file=sys.stderr)
        client.stdin.close()
        client.wait(timeout=30)
    ratios = [http / engine for engine, http in zip(rates["engine"], rates["http"], strict=True)]
    return {
        "clients": arguments.clients,
        "requests": arguments.requests,
        "stream": arguments.stream,
        "varied": arguments.varied,
        "tokens_per_s": rates,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_of_sums": round(  # every round has as many tokens
            sum(1 / rate for rate in rates["engine"]) / sum(1 / rate for rate in rates["http"]), 3
        ),
        "cpu_s": {way: round(seconds, 1) for way, seconds in spent.items()},
        "cpu_ratio": round(spent["engine"] / spent["http"], 3),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(logical=False),
        },
    }


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """Return what the processes have used of the CPUs."""
    times = [process.cpu_times() for process in processes]
    return float(sum(found.user + found.system for found in times))


def prompts(draw: random.Random, count: int) -> list[tuple[int, ...]]:
    """Return token ids that nobody sent before."""
    return [tuple(draw.randrange(*TOKEN_IDS) for _ in range(PROMPT_TOKENS)) for _ in range(count)]


def output_lengths(draw: random.Random, count: int, varied: bool) -> list[int]:
    """Return how many tokens each answer has; `count` varied ones are always as many in all."""
    if not varied:
        return [OUTPUT_TOKENS] * count
    low, high = VARIED
    lengths = [low + (high - low) * index // max(count - 1, 1) for index in range(count)]
    draw.shuffle(lengths)
    return lengths


def answer_requests(url: str, key: str, clients: int) -> None:
    """Be the clients: read bodies, a line for each round, and write the seconds they took.

    They read bytes and nothing more, and wake when the connection closes or LOW_WATER bytes wait,
    so that they take little from the server: clients have machines of their own.
    """
    host, port = url.removeprefix("http://").split(":")

    def send(body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
            "connection: close\r\n\r\n"
        )
        received = bytearray()
        with socket.create_connection((host, int(port)), timeout=600) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, LOW_WATER)
            connection.sendall(head.encode() + content)
            while piece := connection.recv(1 << 16):
                received += piece
        whole = (
            b"data: [DONE]" if body["stream"] else b'"completion_tokens":%d' % body["max_tokens"]
        )
        if not received.startswith(b"HTTP/1.1 200") or whole not in received:
            raise SystemExit(f"not answered whole: {received[:500]!r}")

    with ThreadPoolExecutor(clients) as pool:
        for line in sys.stdin:
            bodies: Sequence[dict[str, Any]] = json.loads(line)
            started = time.monotonic()
            list(pool.map(send, bodies))
            print(time.monotonic() - started, flush=True)


if __name__ == "__main__":
    main()
