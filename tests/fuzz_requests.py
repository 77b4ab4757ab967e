"""Good requests to every route, and what turns them into bad ones."""

from __future__ import annotations

import copy
import json
import random
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from api_server import MODEL
from test_api_graders import CHECK, ITEM
from test_api_isolation import EVENT, ROWS

NESTED = 10_000
HELLO = [{"role": "user", "content": "Hello"}]
SUMS = {"currency": "USD", "interval": "month", "threshold_amount": 10**9}
ALERT = SUMS | {"notification_channel": {"type": "email", "recipients": ["a@example.org"]}}
DECIDE = {"note": "a"}
TASK = {"prompt": "q", "candidates": ["a", {"text": "b", "model": "m"}], "gold": {"choice": "A"}}
EVERYBODYS_LIMIT = "/v1/organization/spend_limit"  # one of 0 refuses all that comes after it
# A good body of each route that takes JSON; {file}, {job} and so on stand for ids that exist.
SAMPLES: dict[str, Any] = {
    "/v1/completions": {
        "model": MODEL,
        "prompt": "The cat",
        "max_tokens": 2,
        "temperature": 0.5,
        "logprobs": 2,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "seed": 3,
        "echo": True,
        "stream": False,
    },
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": HELLO,
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": None,
        "metadata": {"a": "b"},
        "store": True,
    },
    "/v1/chat/completions/{completion_id}": {"metadata": {"a": "b"}},
    "/v1/embeddings": {"model": MODEL, "input": ["a", [70, 71]], "encoding_format": "float"},
    "/v1/moderations": {"input": ["a", "b"], "model": "omni-moderation-latest"},
    "/v1/api_keys": {"name": "fuzz", "role": "reader", "expires_in_seconds": 3600},
    "/v1/engines/{model}/completions": {"prompt": "The cat", "max_tokens": 2, "n": 1},
    "/v1/engines/{model}/embeddings": {"input": "a"},
    "/v1/uploads": {
        "bytes": 9,
        "filename": "a.jsonl",
        "mime_type": "text/jsonl",
        "purpose": "user_data",
        "expires_after": {"anchor": "created_at", "seconds": 3600},
    },
    "/v1/uploads/{upload_id}/complete": {"part_ids": ["part_x"], "md5": "0" * 32},
    "/v1/batches": {
        "input_file_id": "{file}",
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        "metadata": {"a": "b"},
    },
    "/v1/fine_tuning/jobs": {
        "model": MODEL,
        "training_file": "{file}",
        "suffix": "fuzz",
        "seed": 1,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
        "metadata": {"a": "b"},
        "lora": {"r": 4, "alpha": 8.0, "target_modules": ["q_proj"]},
        "early_stopping": {"enabled": True, "patience": 2},
        "classification": {"positive_class": " a", "betas": [0.5]},
        "n_checkpoints": 2,
        "integrations": [],
    },
    "/v1/fine_tuning/estimate": {"model": MODEL, "training_file": "{file}"},
    "/v1/fine-tunes": {
        **{"training_file": "{file}", "n_epochs": 2, "suffix": "old"},
        **{"validation_file": "{file}", "compute_classification_metrics": True},
        **{"classification_n_classes": 2, "classification_positive_class": " a"},
    },
    "/v1/fine_tuning/checkpoints/{model}/permissions": {"project_ids": ["proj_x"]},
    "/v1/fine_tuning/alpha/graders/run": {
        "grader": CHECK,
        "model_sample": "forty two",
        "item": ITEM,
    },
    "/v1/fine_tuning/alpha/graders/validate": {"grader": CHECK},
    "/v1/webhook_endpoints": {"name": "a", "url": "https://93.184.216.34/", "event_types": [EVENT]},
    "/v1/webhook_endpoints/{endpoint_id}": {"name": "b"},
    "/v1/webhook_endpoints/{endpoint_id}/test": {"event_type": EVENT},
    "/v1/feedback": {"completion_id": "chatcmpl-x", "thumb": True, "user": "ann"},
    "/v1/feedback/policy": {"consent": True, "retention_days": 30},
    "/v1/feedback/export": {"kind": "unpaired"},
    "/v1/label_projects": {
        "name": "a",
        "kind": "pairwise",
        "label": {"tie": True, "strength": 4},
        "gates": {"min_gold": 5, "max_side_share": 0.9},
        "overlap": 2,
    },
    "/v1/label_projects/{label_project_id}": {"guidelines": "Be kind."},
    "/v1/label_projects/{label_project_id}/tasks": {"tasks": [TASK]},
    "/v1/label_projects/{label_project_id}/sample": {
        "prompts": ["a"],
        "models": [MODEL],
        "max_tokens": 2,
        "seed": 1,
    },
    "/v1/label_projects/{label_project_id}/export": {"kind": "preference", "votes": "each"},
    "/v1/label_projects/{label_project_id}/labelers/{labeler}/pause": {"reason": "a"},
    "/v1/label_tasks/{task_id}/settle": {"choice": "A"},
    "/v1/comparisons/{assignment_id}": {"choice": "A", "timings": {"total_ms": 9}},
    "/v1/comparisons/{assignment_id}/skip": {"reason": "a"},
    "/v1/comparisons/{assignment_id}/flag": {"reason": "a"},
    "/v1/label_rounds": {
        "label_project_id": "lproj-x",
        "model": MODEL,
        "method": "dpo",
        "rule": {"min_win_rate": 0.5, "certain": True},
        "hyperparameters": {"dpo": {"n_epochs": 1}},
    },
    "/v1/tokenize": {"prompt": "a b", "add_special_tokens": True, "return_token_strs": True},
    "/v1/detokenize": {"tokens": [70, 71]},
    "/v1/access_requests": {
        "name": "Ann",
        "email": "ann@example.org",
        "organization": "Example",
        "use_case": "Mail.",
        "volume": "1",
    },
    "/v1/organization/projects": {"name": "fuzz"},
    "/v1/organization/projects/{project_id}": {"name": "fuzzed"},
    "/v1/organization/projects/{project_id}/service_accounts": {"name": "a", "role": "member"},
    "/v1/organization/projects/{project_id}/service_accounts/{service_account_id}": {
        "name": "b",
        "role": "owner",
    },
    "/v1/organization/admin_api_keys": {"name": "a", "expires_in_seconds": 60},
    "/v1/organization/projects/{project_id}/warn": {"reason": "a"},
    "/v1/organization/projects/{project_id}/suspend": {"reason": "a"},
    "/v1/organization/safety_cases/{case_id}/answer": {"message": "a"},
    "/v1/safety/cases/{case_id}/appeal": {"message": "a"},
    "/v1/organization/projects/{project_id}/model_permissions": {
        "mode": "allow_list",
        "model_ids": [MODEL],
    },
    "/v1/organization/projects/{project_id}/rate_limits/{rate_limit_id}": {
        "max_requests_per_1_minute": 10**6
    },
    "/v1/organization/projects/{project_id}/spend_limit": SUMS,
    "/v1/organization/projects/{project_id}/spend_alerts": ALERT,
    "/v1/organization/projects/{project_id}/spend_alerts/{alert_id}": ALERT,
    "/v1/organization/projects/{project_id}/caps": {"concurrent_jobs": 10**6},
    "/v1/organization/projects/{project_id}/content_policy": {
        "input": "block",
        "output": "score",
        "training": "off",
        "rules": [
            {"type": "word", "value": "b", "name": "a"},
            {"type": "regex", "value": "c+"},
            {"type": "classifier", "category": "hate", "threshold": 0.5},
        ],
        "case_after": 3,
        "block_user_after": 5,
    },
    "/v1/organization/projects/{project_id}/blocked_identifiers": {"identifier": "a"},
    "/v1/organization/access_requests/{request_id}/approve": DECIDE,
    "/v1/organization/access_requests/{request_id}/deny": DECIDE,
    "/v1/organization/access_requests/{request_id}/waitlist": DECIDE,
}
SAMPLES["/tokenize"], SAMPLES["/detokenize"] = SAMPLES["/v1/tokenize"], SAMPLES["/v1/detokenize"]
SAMPLES[EVERYBODYS_LIMIT] = SUMS  # the last
FORMS: dict[str, dict[str, Any]] = {
    "/v1/files": {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", ROWS)}},
    "/v1/uploads/{upload_id}/parts": {"files": {"data": ("part", b"123456789")}},
    "/v1/adapters": {
        "data": {"suffix": "a"},
        "files": {"config": ("adapter_config.json", b"{}"), "weights": ("w", b"123")},
    },
}
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400),
    *("", " ", "a", "null", "\x00", "\ud83d", "\u202e", "x" * 5000, "9" * 400, "../../etc/passwd"),
    *("%00", "{file}", "ft:x", "sk-x", "'; DROP TABLE files;--", "1e999", "2024-13-45"),
    *([], [[]], [None], [1, "a"], [[70], "x"], ["x"] * 3000, {}, {"": None}, {"a": {"b": [{}]}}),
]
BODIES: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("space", b" \n"),
    ("cut", b'{"model": "a'),
    ("open", b"{"),
    ("comma", b'{"a": 1,}'),
    ("two", b"{}{}"),
    ("quotes", b"{'a': 1}"),
    ("comment", b'{"a": 1} // x'),
    ("array", b"[]"),
    ("null", b"null"),
    ("true", b"true"),
    ("number", b"12"),
    ("string", b'"text"'),
    ("nan", b'{"model": NaN}'),
    ("infinity", b'{"model": -Infinity}'),
    ("overflow", b'{"model": 1e999}'),
    ("digits", b'{"model": ' + b"9" * 5000 + b"}"),
    ("nested arrays", b'{"model": ' + b"[" * NESTED + b"]" * NESTED + b"}"),
    ("nested objects", b'{"a":' * NESTED + b"1" + b"}" * NESTED),
    ("unclosed arrays", b"[" * NESTED),
    ("not utf-8", b'{"model": "\xff\xfe"}'),
    ("overlong", b'{"model": "\xc0\xaf"}'),
    ("utf-16", '{"model": "a"}'.encode("utf-16")),
    ("bom", b"\xef\xbb\xbf{}"),
    ("surrogate", b'{"model": "\\ud800"}'),
    ("nul", b'{"model": "a\\u0000b"}'),
    ("raw nul", b'{"model": "a\x00b"}'),
    ("same key twice", b'{"model": "a", "model": "b", "metadata": {"a": "1", "a": "2"}}'),
    ("long key", b'{"' + b"k" * 100_000 + b'": 1}'),
    ("many keys", json.dumps({str(i): i for i in range(5000)}).encode()),
    ("gzip", b"\x1f\x8b\x08\x00" + bytes(20)),
]
TYPES = [
    "application/json",
    "text/plain",
    "application/xml",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "multipart/form-data; boundary=" + "y" * 300,
    "application/json; charset=utf-16",
    "nonsense",
    "",
]
QUERY = ["limit=0", "limit=-1", "limit=9e9", "limit=", "limit=a&limit=b", "after=%00", "after=x"]
QUERY += ["order=up", "stream=perhaps", "metadata[a]=b", "metadata%5B%5D=", "x=" + "y" * 2000]
QUERY += ["start_time=99999999999999999999", "effective_at[gt]=x", "group_by=1", "%ff=%fe", "&&="]
ODD_IDS = [
    "absent",
    "%00",
    "%ff",
    "a%2Fb",
    "..",
    "%2e%2e",
    "x" * 3000,
    "'",
    "ft:a:b:c:d",
    "{}",
    "-1",
]


@dataclass
class Sent:
    """A request; `raw` replaces what the client library would make of the body."""

    method: str
    path: str
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Mutator:
    """Makes requests that are a little wrong.

    Args:
        routes: (method, path pattern).
        ids: An id that exists, by name of the path parameter; `file` and so on for the bodies.
    """

    def __init__(self, routes: list[tuple[str, str]], ids: dict[str, str], seed: int):
        self._routes = routes
        self._ids = ids
        self._draw = random.Random(seed)

    def next(self) -> Sent:
        """Return the next request."""
        method, pattern = self._draw.choice(self._routes)
        path = self._path(pattern)
        if self._draw.random() < 0.3:
            path += "?" + "&".join(self._draw.sample(QUERY, self._draw.randint(1, 3)))
        if method == "GET":
            return Sent(method, path)
        if pattern in FORMS:
            return self._form(method, path, pattern)
        content = self._content(pattern)
        kind = TYPES[0] if self._draw.random() < 0.9 else self._draw.choice(TYPES)
        headers = {"content-type": kind}
        if self._draw.random() < 0.1:
            headers["idempotency-key"] = self._draw.choice(["a", "b", "c" * 300, "d"])
        if self._draw.random() < 0.1:
            headers["x-stainless-retry-count"] = self._draw.choice(["0", "1", "x", "-1"])
        return Sent(method, path, content, headers)

    def _path(self, pattern: str) -> str:
        def fill(found: re.Match[str]) -> str:
            known = self._ids.get(found[1], "absent")
            odd = self._draw.random() < 0.3
            return self._draw.choice(ODD_IDS) if odd else quote(known, safe="")

        return re.sub(r"\{(\w+)\}", fill, pattern)

    def _content(self, pattern: str) -> bytes:
        if self._draw.random() < 0.1:
            return self._draw.choice(BODIES)[1]
        body = self._named(copy.deepcopy(SAMPLES.get(pattern, {})))
        for _ in range(self._draw.choice((0, 1, 1, 1, 2, 3))):
            body = self._change(body)
        content = json.dumps(body).encode()
        if self._draw.random() < 0.1:
            content = self._spoil(content)
        return content

    def _form(self, method: str, path: str, pattern: str) -> Sent:
        form, boundary = FORMS[pattern], "boundary7"
        parts = [(name, None, value.encode()) for name, value in form.get("data", {}).items()]
        parts += [(name, filename, value) for name, (filename, value) in form["files"].items()]
        if self._draw.random() < 0.5:
            spoilt = self._draw.randrange(len(parts))
            name, filename, value = parts[spoilt]
            value = self._spoil(value) if self._draw.random() < 0.5 else b""
            name = self._draw.choice([name, name, "", "x", 'a"b', name + "\x00"])
            parts[spoilt] = (name, self._draw.choice([filename, None, "", "../a"]), value)
        content = (
            b"".join(_part(boundary, *part) for part in parts) + f"--{boundary}--\r\n".encode()
        )
        if self._draw.random() < 0.2:
            content = self._spoil(content)
        return Sent(
            method, path, content, {"content-type": f"multipart/form-data; boundary={boundary}"}
        )

    def _named(self, value: Any) -> Any:
        text = json.dumps(value)
        for name, known in self._ids.items():
            text = text.replace("{" + name + "}", known)
        return json.loads(text)

    def _change(self, value: Any) -> Any:
        """Change one place of a value, its own or somewhere inside."""
        inside = isinstance(value, dict | list) and value and self._draw.random() < 0.9
        if not inside:
            return copy.deepcopy(self._draw.choice(JUNK))
        if isinstance(value, list):
            place = self._draw.randrange(len(value))
            value[place] = self._change(value[place])
            return value
        key = self._draw.choice(list(value))
        act = self._draw.random()
        if act < 0.15:
            del value[key]
        elif act < 0.25:
            value[self._draw.choice(["", "x", key.upper(), key + "s", "\x00"])] = value[key]
        else:
            value[key] = self._change(value[key])
        return value

    def _spoil(self, content: bytes) -> bytes:
        """Change a few bytes."""
        found = bytearray(content)
        for _ in range(self._draw.randint(1, 4)):
            place = self._draw.randrange(len(found) + 1)
            act = self._draw.random()
            if act < 0.4 and found:
                found[place % len(found)] = self._draw.randrange(256)
            elif act < 0.7:
                found[place:place] = self._draw.randbytes(self._draw.randint(1, 3))
            else:
                del found[place:]
        return bytes(found)


def _part(boundary: str, name: str, filename: str | None, value: bytes) -> bytes:
    shown = "" if filename is None else f'; filename="{filename}"'
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"{shown}\r\n\r\n'
    return head.encode() + value + b"\r\n"
