"""The serving engine alone: throughput and latency of base, one and many adapters.

Every scenario sends prompts of about 75 tokens and asks for 64 (greedy, EOS ignored), a given
number of clients at a time. Adapters are random, of rank 8 on all linear layers. Peers run apart,
each in an environment of its own: see `benchmarks/peers/`.

    python benchmarks/engine.py --json
    python benchmarks/engine.py --scenarios mixed_16 zipf_64
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model

from data.settings import load_settings
from serve.engine import base_model
from serve.engine.base import AdapterRef, Delta, GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine

OUTPUT_TOKENS = 64
PROMPT_TOKENS = 75
RANK = 8
NUM_ADAPTERS = 8
NUM_REGISTERED = 1000
MIB = 2**20


@dataclass
class Watch:
    """Times of one request's events, seconds of time.monotonic."""

    started: float = 0.0
    times: list[float] = field(default_factory=list)
    error: Exception | None = None

    @property
    def first(self) -> float:
        return self.times[0] - self.started

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class Load:
    """Sends requests to an engine, a number of clients at a time, and keeps their times."""

    def __init__(self, engine: LocalEngine, seed: int):
        self._engine = engine
        self._random = random.Random(seed)
        self._sent = 0

    def prompt(self, length: int = PROMPT_TOKENS) -> tuple[int, ...]:
        return tuple(self._random.randrange(100, 40_000) for _ in range(length))

    def run(
        self,
        adapters: Sequence[AdapterRef | None],
        clients: int,
        prompts: Sequence[tuple[int, ...]] | None = None,
        num_tokens: int | Sequence[int] = OUTPUT_TOKENS,
    ) -> list[Watch]:
        """Send one request for each of `adapters`, all of as many tokens, or each of its own."""
        room = threading.Semaphore(clients)
        watches = []
        for index, adapter in enumerate(adapters):
            room.acquire()
            prompt = prompts[index] if prompts else self.prompt()
            count = num_tokens if isinstance(num_tokens, int) else num_tokens[index]
            watches.append(self.send(prompt, adapter, count, room.release))
        for _ in range(clients):
            room.acquire()
        for watch in watches:
            if watch.error:
                raise watch.error
        return watches

    def send(
        self,
        prompt: tuple[int, ...],
        adapter: AdapterRef | None,
        num_tokens: int,
        on_end: Callable[[], object],
    ) -> Watch:
        watch = Watch(time.monotonic())

        def on_delta(delta: Delta) -> None:
            if delta.token_ids:
                watch.times.append(time.monotonic())
            if delta.finish_reason is not None:
                watch.error = delta.error
                on_end()

        self._sent += 1
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        name = f"{id(self)}-{self._sent}"
        self._engine.submit(GenerationRequest(name, prompt, params, adapter), on_delta)
        return watch


def throughput(load: Load, adapters: Sequence[AdapterRef | None], clients: int) -> dict[str, float]:
    started = time.monotonic()
    watches = load.run(adapters, clients)
    seconds = time.monotonic() - started
    gaps = [gap for watch in watches for gap in watch.gaps]
    firsts = sorted(watch.first for watch in watches)
    return {
        "tokens_per_s": round(len(adapters) * OUTPUT_TOKENS / seconds, 1),
        "first_token_p50_ms": _ms(statistics.median(firsts)),
        "first_token_p99_ms": _ms(firsts[int(len(firsts) * 0.99)]),
        "gap_p50_ms": _ms(statistics.median(gaps)),
        "gap_max_ms": _ms(max(gaps)),
    }


def base_16(load: Load, make: Adapters) -> dict[str, float]:
    return throughput(load, [None] * 48, 16)


def one_adapter_16(load: Load, make: Adapters) -> dict[str, float]:
    return throughput(load, make.resident(1) * 48, 16)


def mixed_16(load: Load, make: Adapters) -> dict[str, float]:
    return throughput(load, make.resident(NUM_ADAPTERS) * 6, 16)


def base_1(load: Load, make: Adapters) -> dict[str, float]:
    return throughput(load, [None] * 3, 1)


def one_adapter_1(load: Load, make: Adapters) -> dict[str, float]:
    return throughput(load, make.resident(1) * 3, 1)


def zipf_64(load: Load, make: Adapters) -> dict[str, float]:
    """1,000 registered adapters, the k-th asked for in proportion to 1/k."""
    weights = list(accumulate(1 / (k + 1) for k in range(NUM_REGISTERED)))
    names = random.Random(1).choices(range(NUM_REGISTERED), cum_weights=weights, k=192)
    result = throughput(load, [make.registered(name) for name in names], 64)
    return {**result, "distinct_adapters": len(set(names))}


def cold(load: Load, make: Adapters) -> dict[str, float]:
    """First token of an adapter that is on disk only, against one that is resident."""
    make.resident(1)
    cold_times, warm_times = [], []
    for index in range(5):
        adapter = make.registered(NUM_REGISTERED + index)
        for times in (cold_times, warm_times):
            times.append(load.run([adapter], 1, num_tokens=1)[0].first)
    return {
        "cold_first_token_ms": _ms(statistics.median(cold_times)),
        "warm_first_token_ms": _ms(statistics.median(warm_times)),
        "added_ms": _ms(statistics.median(cold_times) - statistics.median(warm_times)),
    }


def loading_beside_streams(load: Load, make: Adapters) -> dict[str, float]:
    """16 streams run while 8 adapters are loaded."""
    ended = threading.Semaphore(0)
    watches = [load.send(load.prompt(), None, 120, ended.release) for _ in range(15)]
    while min(len(watch.times) for watch in watches) < 20:
        time.sleep(0.01)
    seen = [len(watch.times) for watch in watches]
    for index in range(8):
        load.run([make.registered(NUM_REGISTERED + 100 + index)], 1, num_tokens=1)
    upto = [len(watch.times) for watch in watches]
    for _ in watches:
        ended.acquire()
    during = [g for w, a, b in zip(watches, seen, upto, strict=True) for g in w.gaps[a - 1 : b - 1]]
    quiet = [gap for w, a in zip(watches, seen, strict=True) for gap in w.gaps[10 : a - 1]]
    return {"gap_p50_ms": _ms(statistics.median(quiet)), "gap_max_ms": _ms(max(during))}


def shared_prefix(load: Load, make: Adapters) -> dict[str, float]:
    """16 requests that begin with the same 800 tokens, against 16 that do not."""
    prefix = load.prompt(800)
    load.run([None], 1, [prefix + load.prompt(20)], num_tokens=1)
    tails = [prefix + load.prompt(20) for _ in range(16)]
    strangers = [load.prompt(820) for _ in range(16)]
    shared = [w.first for w in load.run([None] * 16, 16, tails, num_tokens=1)]
    apart = [w.first for w in load.run([None] * 16, 16, strangers, num_tokens=1)]
    return {
        "first_token_p50_ms": _ms(statistics.median(shared)),
        "without_sharing_p50_ms": _ms(statistics.median(apart)),
        "ratio": round(statistics.median(apart) / statistics.median(shared), 2),
    }


def long_prompt(load: Load, make: Adapters) -> dict[str, float]:
    """A prompt of 1,500 tokens arrives among 15 streams."""
    ended = threading.Semaphore(0)
    watches = [load.send(load.prompt(), None, 160, ended.release) for _ in range(15)]
    while min(len(watch.times) for watch in watches) < 30:
        time.sleep(0.01)
    seen = [len(watch.times) for watch in watches]
    [long] = load.run([None], 1, [load.prompt(1500)], num_tokens=1)
    for _ in watches:
        ended.acquire()
    quiet = [gap for w, a in zip(watches, seen, strict=True) for gap in w.gaps[10 : a - 1]]
    worst = max(gap for w, a in zip(watches, seen, strict=True) for gap in w.gaps[a - 1 :])
    median = statistics.median(quiet)
    return {
        "gap_p50_ms": _ms(median),
        "gap_max_ms": _ms(worst),
        "ratio": round(worst / median, 2),
        "long_first_token_ms": _ms(long.first),
    }


SCENARIOS = (
    *(base_16, one_adapter_16, mixed_16, base_1, one_adapter_1),
    *(zipf_64, cold, loading_beside_streams, shared_prefix, long_prompt),
)


class Adapters:
    """Random adapters; the registered ones are folders that share the weights of eight."""

    def __init__(self, engine: LocalEngine, folders: Sequence[Path], scratch: Path):
        self._engine = engine
        self._folders = folders
        self._scratch = scratch

    def resident(self, count: int) -> list[AdapterRef | None]:
        refs = [AdapterRef(folder.name, str(folder)) for folder in self._folders[:count]]
        for ref in refs:
            self._engine.load_adapter(ref)
        return list(refs)

    def registered(self, number: int) -> AdapterRef:
        folder = self._scratch / f"registered-{number}"
        if not folder.exists():
            folder.symlink_to(self._folders[number % len(self._folders)])
        return AdapterRef(folder.name, str(folder))


def make_adapters(model: Any, scratch: Path) -> list[Path]:
    """Save random adapters for the model."""
    folders = []
    for index in range(NUM_ADAPTERS):
        torch.manual_seed(index)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        tuned = get_peft_model(model, config)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        folders.append(scratch / f"adapter-{index}")
        tuned.save_pretrained(str(folders[-1]), save_embedding_layers=False)
        model = tuned.unload()
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [scenario.__name__ for scenario in SCENARIOS]
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--models", type=Path, help="folder of fetched bases; default: HOME/models")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--prefill-beside", type=int, default=EngineConfig().prefill_beside)
    parser.add_argument(
        "--save-base-and-adapters", type=Path, metavar="FOLDER", help="for the peers to read"
    )
    parser.add_argument("--json", action="store_true", help="print the result only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = load_settings()
    spec = base_model.find_spec(settings.model)
    folder = base_model.fetch(spec, arguments.models or settings.models_dir)
    model, _ = base_model.load(folder, "float32", "cpu")
    config = EngineConfig(kv_budget_bytes=768 * MIB, prefill_beside=arguments.prefill_beside)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = arguments.save_base_and_adapters or Path(name)
        scratch.mkdir(parents=True, exist_ok=True)
        if arguments.save_base_and_adapters and not (scratch / "base").exists():
            (scratch / "base").symlink_to(folder.resolve())
        folders = make_adapters(model, scratch)
        del model
        with LocalEngine.open(folder, arguments.dtype, "cpu", config) as engine:
            dtype = engine.dtype
            make = Adapters(engine, folders, Path(name))
            load = Load(engine, seed=0)
            load.run([*make.resident(NUM_ADAPTERS), None], 16, num_tokens=4)
            for scenario in SCENARIOS:
                if scenario.__name__ in arguments.scenarios:
                    results[scenario.__name__] = scenario(load, make)
                    if not arguments.json:
                        print(f"{scenario.__name__}: {results[scenario.__name__]}", flush=True)
            memory_mb = round(psutil.Process().memory_info().rss / MIB)
    report = {
        "ours": results,
        "model": spec.name,
        "dtype": dtype,
        "memory_mb": memory_mb,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
        },
    }
    print(json.dumps(report) if arguments.json else json.dumps(report["machine"]))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


if __name__ == "__main__":
    main()
