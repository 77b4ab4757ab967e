"""What the keys of an account may do: owner, member, reader, labeler.

An owner does everything. A member does all but delete models, share them, and manage keys. A reader
reads: GET and nothing else. A labeler compares answers and nothing else. Admin keys have no role:
they manage accounts and run nothing. Nobody but an owner may call a path with control characters:
routes and the patterns here might read it differently.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from data.errors import Forbidden, InvalidInput

Role = Literal["owner", "member", "reader", "labeler"]
ROLES: tuple[Role, ...] = get_args(Role)
LABELING = "/v1/comparisons"
NEXT = f"{LABELING}/next"
# Method and path of what owners alone may do; a path stands for what lies below it too.
OWNERS_ONLY = (
    (re.compile("DELETE"), re.compile(r"/v1/models/.*", re.DOTALL)),
    (
        re.compile("POST|DELETE"),
        re.compile(r"/v1/fine_tuning/checkpoints/.*/permissions(/.*)?", re.DOTALL),
    ),
    (re.compile(".*"), re.compile(r"/v1/api_keys(/.*)?", re.DOTALL)),
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def check_name(role: str) -> Role:
    """Return a role by its name; raises InvalidInput."""
    if role not in ROLES:
        raise InvalidInput(
            f"Invalid 'role': '{role}'. Supported values are: {', '.join(map(repr, ROLES))}.",
            param="role",
        )
    return next(known for known in ROLES if known == role)


def check(role: str, method: str, path: str) -> None:
    """Make sure that a role may make a call.

    Raises:
        Forbidden: It may not.
    """
    if not _may(role, method, path):
        raise Forbidden(
            f"A key with the role '{role}' may not {method} {printable(path)}. Use a key whose "
            "role allows it; the account's owner or the server's operator makes one."
        )


def printable(path: str) -> str:
    """Return a path on one line, with control characters escaped, as it may be logged."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", path)


def _may(role: str, method: str, path: str) -> bool:
    if role == "owner":
        return True
    if CONTROL.search(path):
        return False
    if role == "labeler":
        return path == LABELING or path.startswith(LABELING + "/")
    if any(m.fullmatch(method) and p.fullmatch(path) for m, p in OWNERS_ONLY):
        return False
    if role == "member":
        return True
    return method in ("GET", "HEAD") and path != NEXT  # which takes a task into hand
