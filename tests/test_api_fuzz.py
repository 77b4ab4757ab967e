"""Bad requests to every route the application has: no 5xx, always the error body, no hang, no loss.

The routes are read from the application. A recorder around it judges every answer, whoever asked.
"""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from client_env import python_env
from fuzz_requests import BODIES, EVERYBODYS_LIMIT, FORMS, JUNK, SAMPLES, TYPES, Mutator, Sent
from recorder import Recorder
from sqlalchemy import select
from test_api_isolation import MAKERS, NAMES_OF_IDS

from data import accounts
from data.tables import File, Job
from data.tables_feedback import LabelRound
from data.tables_surface import Batch

OPERATORS = ("/v1/organization/", "/metrics")
HANG_S = 20.0
CASES = 20_000  # by schemathesis and mutation together
MUTATED = 6_000  # of them by mutation, at least
GENERATED_LIMIT_S = 240
THREADS = 4
JOB_ROUTES = ("/v1/fine_tuning/jobs", "/v1/fine-tunes")


@dataclass
class Target:
    """A server, its recorder, keys for its routes, and ids of what exists."""

    server: Server
    recorder: Recorder
    admin_key: str
    victim: str  # an account that operators' requests are about

    def key_for(self, path: str) -> str:
        return self.admin_key if path.startswith(OPERATORS) else self.server.key

    def routes(self) -> list[tuple[str, str]]:
        paths = self.server.http().get("/openapi.json").json()["paths"]
        return [(method.upper(), path) for path, methods in paths.items() for method in methods]

    def rows(self, table: Any) -> set[str]:
        """Return the ids in a table of the first account."""
        mine = table.project_id == self.server.project.id
        if table is File:
            mine &= File.deleted_at.is_(None) & File.purpose.not_in(("batch_output",))
        with self.server.runtime.database.read() as session:
            return set(session.scalars(select(table.id).where(mine)))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    recorder = Recorder(slow_s=HANG_S)
    with running(tiny_settings(tmp_path, threads=1), recorder.wrap) as server:
        _, admin_key = accounts.create_admin_key(server.runtime.database)
        victim, _ = server.new_account("victim")
        yield Target(server, recorder, admin_key, victim.id)


def send(http: httpx.Client, target: Target, sent: Sent) -> int:
    """Send a request; returns its status."""
    headers = {**sent.headers, "authorization": f"Bearer {target.key_for(sent.path)}"}
    try:
        url = httpx.URL(target.server.url).join("/").copy_with(raw_path=sent.path.encode())
        return http.request(sent.method, url, content=sent.content, headers=headers).status_code
    except httpx.RemoteProtocolError:
        return 0  # the server closed the connection, as it may on bytes that are not HTTP


def filled(path: str) -> str:
    return path.replace("{", "absent-").replace("}", "")


# ---- by hand ----


def test_broken_bodies_everywhere(target: Target) -> None:
    """Every body on every route that reads one, every type of content on every route at all."""
    http = target.server.http()
    for method, path in target.routes():
        if method != "GET":
            for _, content in BODIES:
                head = {"content-type": "application/json"}
                send(http, target, Sent(method, filled(path), content, head))
            for kind in TYPES:
                send(http, target, Sent(method, filled(path), b"x=1", {"content-type": kind}))
        else:
            send(http, target, Sent(method, filled(path), b"[", {"content-type": "x"}))
    assert target.recorder.faults == []
    assert target.recorder.count > 1500


def test_every_field_of_a_wrong_kind(target: Target) -> None:
    """Each field of each good body in turn: something else, in its place."""
    http = target.server.http()
    for number, (path, body) in enumerate(SAMPLES.items()):
        for place, name in enumerate(body):
            for step in range(3):
                junk = JUNK[(number + 7 * place + 13 * step) % len(JUNK)]
                content = json.dumps(body | {name: junk}).encode()
                head = {"content-type": "application/json"}
                send(http, target, Sent("POST", filled(path), content, head))
    assert target.recorder.faults == []
    assert target.recorder.count > 250


def test_samples_cover_the_routes(target: Target) -> None:
    """A new route that takes a body gets a sample, so that mutation finds its way in."""
    empty = ("/cancel", "/pause", "/resume", "/archive", "/reinstate", "/load", "/unload", "/pin")
    empty += ("/unpin", "/rotate_secret", "/renew", "/release")
    posts = [path for method, path in target.routes() if method == "POST"]
    known = SAMPLES.keys() | FORMS.keys()
    assert [p for p in posts if p not in known and not p.endswith(empty)] == []


def test_too_large_a_body_everywhere(target: Target) -> None:
    """Announced and not even sent; and sent in chunks without a word, on some routes."""
    for method, path in target.routes():
        if method == "GET":
            continue
        head = request_head(target, method, filled(path), f"content-length: {10**10}\r\n")
        assert b" 413 " in exchange(target, [head]).split(b"\r\n")[0], f"{method} {path}"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    for path in ("/v1/completions", "/v1/fine_tuning/jobs", "/v1/batches"):
        head = request_head(target, "POST", path, "transfer-encoding: chunked\r\n")
        answer = exchange(target, [head] + [chunk] * 520 + [b"0\r\n\r\n"])
        assert b" 413 " in answer.split(b"\r\n")[0], path
    assert target.recorder.faults == []


def test_a_body_byte_by_byte(target: Target) -> None:
    """A slow client is waited for."""
    for path, body in SAMPLES.items():
        content = json.dumps(body).encode()[:120]
        head = request_head(target, "POST", filled(path), f"content-length: {len(content)}\r\n")
        answer = exchange(target, [head, *(content[i : i + 1] for i in range(len(content)))])
        assert answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), path
    assert target.recorder.faults == []


def test_connections_that_end_halfway(target: Target) -> None:
    """Half a head, half a body, half a chunk; closed, half closed or left open: nobody notices."""
    start = b'{"model": "tiny-base", "prompt": "x", "max'
    length = request_head(target, "POST", "/v1/completions", "content-length: 500\r\n")
    chunked = request_head(target, "POST", "/v1/files", "transfer-encoding: chunked\r\n")
    halves = [b"", b"POST", length[:40], length, length + start, chunked + b"ff\r\n" + start]
    halves += [chunked + b"zz\r\n", b"\x00" * 50, b"GET / HTTP/9.9\r\n\r\n"]
    left = []
    for half in halves * 3:
        connection = connect(target)
        connection.sendall(half)
        if len(left) % 3 == 0:
            connection.shutdown(socket.SHUT_WR)
        left.append(connection)
    assert target.server.client().completions.create(model=MODEL, prompt="x").choices
    for connection in left:
        connection.close()
    deadline = time.monotonic() + 10
    while target.recorder.under_way:
        assert time.monotonic() < deadline, target.recorder.under_way
        time.sleep(0.05)
    assert target.recorder.faults == []


def connect(target: Target) -> socket.socket:
    host, port = target.server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=HANG_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def request_head(target: Target, method: str, path: str, more: str) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {target.key_for(path)}\r\n"
        f"content-type: application/json\r\nconnection: close\r\n{more}\r\n"
    ).encode()


def exchange(target: Target, pieces: list[bytes]) -> bytes:
    """Send these; returns all that came back until the server closed."""
    answer = b""
    with connect(target) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all was sent
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass  # what was not read before the close
    return answer


# ---- by machine ----


@pytest.mark.slow
# Starlette leaves the temporary file of a form that is cut off to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*SpooledTemporaryFile")
def test_generated_and_mutated_requests(
    target: Target, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """schemathesis over the application's own description, then mutations of good requests."""
    server, recorder = target.server, target.recorder
    scratch = tmp_path_factory.mktemp("fuzz")
    ids = {kind: make(server, tmp_path_factory) for kind, make in MAKERS.items()}
    known = {name: ids[kind] for name, kind in NAMES_OF_IDS.items() if kind in ids}
    known |= {"project_id": target.victim, "rate_limit_id": f"rl-{MODEL}"} | ids
    generate(target, scratch, server.key, ["--exclude-path-regex", "^/(v1/organization|metrics)"])
    operators = ["--include-path-regex", "^/(v1/organization|metrics)"]
    operators += ["--phases", "examples,coverage,fuzzing"]  # not chains, which would close accounts
    generate(target, scratch, target.admin_key, operators)
    send(server.http(), target, Sent("DELETE", EVERYBODYS_LIMIT))
    generated = recorder.count
    mutate(target, known, max(MUTATED, CASES - generated))
    print(f"{generated} generated, {recorder.count - generated} mutated: {recorder.statuses}")
    assert recorder.faults == []
    assert recorder.count >= CASES
    check_rows(target)


def generate(target: Target, folder: Path, key: str, options: list[str]) -> None:
    """Let schemathesis send what it makes of the application's description."""
    python = python_env("schemathesis", "schemathesis==4.32.5")
    command: list[str] = [str(python.parent / "schemathesis"), "run", "--no-color", "--seed", "7"]
    command += ["--header", f"Authorization: Bearer {key}", "--workers", "2"]
    command += ["--checks", "not_a_server_error", "--continue-on-failure", "--warnings", "off"]
    command += ["--suppress-health-check", "all", "--request-timeout", str(HANG_S)]
    command += ["--max-time", str(GENERATED_LIMIT_S // 2), *options]
    command += [f"{target.server.url}/openapi.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]


def mutate(target: Target, known: dict[str, str], count: int) -> None:
    """Send this many mutated requests, from several clients at a time."""
    routes = [route for route in target.routes() if route != ("POST", EVERYBODYS_LIMIT)]

    def work(number: int) -> None:
        mutator = Mutator(routes, known, seed=number)
        with httpx.Client(timeout=HANG_S) as http:
            for _ in range(count // THREADS + 1):
                send(http, target, mutator.next())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def check_rows(target: Target) -> None:
    """What successful answers announced is there, and nothing else."""
    files, jobs, batches, rounds = set(), set(), set(), set()
    for method, path, body in target.recorder.made:
        if method == "DELETE" and body.get("object") == "file":
            files.discard(body["id"])
        elif method == "POST" and body.get("object") == "file":
            files.add(body["id"])
        elif method == "POST" and body.get("object") == "upload" and body["file"]:
            files.add(body["file"]["id"])
        elif method == "POST" and path == "/v1/label_rounds" and "id" in body:
            files |= {body["file_id"], body["training_file"]}
            rounds.add(body["id"])
        elif method == "POST" and path in JOB_ROUTES and "id" in body:
            jobs.add(body["id"])
        elif method == "POST" and body.get("object") == "batch":
            batches.add(body["id"])
    assert files
    assert jobs
    assert target.rows(File) == files
    assert target.rows(LabelRound) == rounds
    with target.server.runtime.database.read() as session:  # a round makes its jobs by itself
        query = select(LabelRound.policy_job_id, LabelRound.reward_job_id)
        by_rounds = {job for made in session.execute(query).all() for job in made}
    assert target.rows(Job) - by_rounds == jobs - by_rounds
    assert target.rows(Batch) == batches
