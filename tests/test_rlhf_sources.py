"""Functions and URLs that give rewards: what fails is told with its cause, and nothing hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import ValidationError

from data.errors import ConfigError, TrainingFailed
from rlhf import rewards
from rlhf.prompts import Prompt
from rlhf.reward_settings import PpoRewardSettings
from rlhf.rewards import FunctionReward, UrlReward
from rlhf.rollout import Sample

SAMPLES = [Sample(Prompt(7, (1, 2), "say it", {"n": 3}), (3,), "it", True, (-1.0,))]
MODULES = {
    "reward_syntax": "def f(:\n",
    "reward_raises": "\n\nraise KeyError('no table')\n",
    "reward_leaves": "import sys\nsys.exit(4)\n",
    "reward_imports": "import nothing_of_this_name\n",
    "reward_breaks": "import reward_raises\n",
    "reward_sleeps": "import time\ntime.sleep(60)\n",
    "reward_dies": "import os\nos._exit(5)\n",
    "reward_lacks": "g = 1\n",
    "reward_good": """
import os
def f(prompts, completions, n):
    if n == [0]:
        os._exit(3)
    return [float(one) for one in n]
""",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("reward_syntax:f", "SyntaxError: invalid syntax ({}/reward_syntax.py, line 1)"),
        ("reward_raises:f", "KeyError: 'no table' ({}/reward_raises.py, line 3)"),
        ("reward_leaves:f", "SystemExit: 4 ({}/reward_leaves.py, line 2)"),
        ("reward_imports:f", "No module named 'nothing_of_this_name' ({}/reward_imports.py, line"),
        ("reward_breaks:f", "KeyError: 'no table' ({}/reward_breaks.py, line 1)"),
        ("reward_lacks:f", "has no attribute 'f'"),
        ("reward_lacks:g", "is a int, which cannot be called"),
        ("reward_dies:f", "ended (exit code 5) while it imported"),
        ("reward_good", "write it as module:function"),
        ("nowhere:f", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(modules: Path, name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FunctionReward(name, 5)
    assert name in str(caught.value)
    assert told.format(modules) in str(caught.value)


def test_an_import_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "START_S", 1.5)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"reward_sleeps:f was not imported within 1.5 s"):
        FunctionReward("reward_sleeps:f", 5)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_is_the_trainers_to_answer(number: signal.Signals) -> None:
    with closing(FunctionReward("reward_good:f", 20.0)) as source:
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, number)
        assert source.score(SAMPLES) == [3.0]


def test_a_source_that_nobody_closed_holds_up_no_exit() -> None:
    code = (
        "from rlhf.rewards import FunctionReward\n"
        "if __name__ == '__main__':\n"
        "    kept = FunctionReward('reward_good:f', 20.0)\n"
    )
    path = os.pathsep.join([str(Path(rewards.__file__).parents[1]), *sys.path])
    Path(sys.path[0], "leaves_it.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(Path(sys.path[0], "leaves_it.py"))],
        env=os.environ | {"PYTHONPATH": path},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0


def test_a_function_whose_process_ended_is_told_with_the_prompt() -> None:
    source = FunctionReward("reward_good:f", 20)
    try:
        assert source.score(SAMPLES) == [3.0]
        last = [Sample(Prompt(8, (1,), "the last", {"n": 0}), (3,), "", True, (-1.0,))]
        with pytest.raises(TrainingFailed, match=r"reward_good:f ended \(exit code 3\).*the last"):
            source.score(last)
        with pytest.raises(TrainingFailed, match=r"reward_good:f ended .*line 7, 'say it'"):
            source.score(SAMPLES)  # nobody reads what is sent
    finally:
        source.close()


Answer = Callable[[socket.socket], None]
BODY = json.dumps({"rewards": [0.5]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server that answers every connection by a function; returns its URL."""
    opened: list[socket.socket] = []

    def start(answer: Answer) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        opened.append(server)

        def run() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.recv(65536)
                        answer(connection)
                    except OSError:
                        pass  # the client went away

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/rewards"

    yield start
    for server in opened:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def drip(data: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        for byte in data:
            connection.send(bytes([byte]))
            time.sleep(0.3)

    return answer


def test_a_url_that_answers(serve: Callable[[Answer], str]) -> None:
    source = UrlReward(serve(lambda connection: connection.sendall(HEAD + BODY)), 20, 0)
    assert [source.score(SAMPLES) for _ in range(2)] == [[0.5], [0.5]]
    source.close()


@pytest.mark.parametrize("start", [b"", HEAD], ids=["head", "body"])
def test_a_server_that_drips_is_given_up_in_time(
    serve: Callable[[Answer], str], start: bytes
) -> None:
    """Each byte comes well within the limit; the whole would take 15 s or 6 s."""
    rest = (HEAD + BODY)[len(start) :]

    def answer(connection: socket.socket) -> None:
        connection.sendall(start)
        drip(rest)(connection)

    source = UrlReward(serve(answer), 1.0, 0)
    started = time.monotonic()
    with pytest.raises(TrainingFailed, match=r"no whole answer within timeout_s \(1 s\).*say it"):
        source.score(SAMPLES)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "url", ["http://a b:x", "http://[::1", "localhost:80/x", "ftp://h/x", "/x"]
)
def test_a_url_that_cannot_be_called_is_refused_when_settings_are_read(url: str) -> None:
    with pytest.raises(ValidationError, match="give one"):
        PpoRewardSettings(url=url)
    assert PpoRewardSettings(url="https://example.com:8/x?y=1").url == "https://example.com:8/x?y=1"
