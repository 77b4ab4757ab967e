"""What users say of completions: thumbs, ratings, preferences, corrections.

A completion must have been stored (`store=true`). What was said keeps the prompt, the answer, the
model version that gave it, its sampling fields and token ids, so that it can be learned from after
the completion itself is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from data.db import Database
from data.errors import Forbidden, InvalidInput, NotFound
from data.feedback.privacy import policy_of
from data.tables import new_id
from data.tables_feedback import Feedback, StoredCompletion
from data.tables_surface import ChatRecord

THUMBS = {"up": True, "good": True, "true": True, "down": False, "bad": False, "false": False}
MAX_TEXT = 200_000


@dataclass(frozen=True, slots=True)
class Said:
    """One thing that a user says of a completion; exactly one of the four is given.

    Attributes:
        thumb: Good or bad.
        rating: 1 (worst) to 5.
        preferred_over: Id of a stored completion of the same prompt that is worse.
        correction: What the answer should have been.
        index: Which choice of the completion.
    """

    thumb: bool | None = None
    rating: int | None = None
    preferred_over: str | None = None
    correction: str | None = None
    index: int = 0
    end_user: str | None = None

    def check(self) -> str:
        """Return which of the four it is; raises InvalidInput."""
        names = ("thumb", "rating", "preferred_over", "correction")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidInput(
                f"Give exactly one of {', '.join(names)}; got {', '.join(given) or 'none'}.",
                param=given[0] if given else "rating",
            )
        if self.rating is not None and not 1 <= self.rating <= 5:
            raise InvalidInput(
                f"Invalid 'rating': {self.rating}; expected 1 (worst) to 5.", param="rating"
            )
        text = self.correction
        if text is not None and (not text.strip() or len(text) > MAX_TEXT):
            raise InvalidInput(
                f"Invalid 'correction': give the better answer, 1 to {MAX_TEXT} characters.",
                param="correction",
            )
        if self.end_user is not None and not 0 < len(self.end_user) <= 128:
            raise InvalidInput("Invalid 'user': 1 to 128 characters.", param="user")
        return given[0]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored completion, whichever route it came from."""

    model: str
    prompt: Any
    answers: list[str]
    request: dict[str, Any]
    token_ids: list[list[int]]
    end_user: str | None


def give(
    database: Database, project_id: str, completion_id: str, said: Said, source: str = "api"
) -> Feedback:
    """Keep what a user says of a stored completion.

    Raises:
        NotFound: It is not stored, or is another account's.
        InvalidInput: What is said is not one thing, or compares answers to different prompts.
        Forbidden: The account has withdrawn its consent to keep feedback.
    """
    what = said.check()
    with database.write() as session:
        if not policy_of(session, project_id).consent:
            raise Forbidden(
                "This account keeps no feedback: its consent was withdrawn. Give it with "
                "POST /v1/feedback/policy."
            )
        stored = _stored(session, project_id, completion_id)
        if not 0 <= said.index < len(stored.answers):
            raise InvalidInput(
                f"Invalid 'index': {said.index}; {completion_id} has {len(stored.answers)} "
                "choices.",
                param="index",
            )
        if what == "preferred_over":
            kind, value = "preference", _worse(session, project_id, stored, said)
        elif what == "correction":
            kind, value = "correction", {"text": said.correction}
        else:
            kind, value = "rating", {what: getattr(said, what)}
        made = Feedback(
            id=new_id("fb-"),
            project_id=project_id,
            completion_id=completion_id,
            index=said.index,
            model=stored.model,
            prompt=stored.prompt,
            answer=stored.answers[said.index],
            kind=kind,
            value=value,
            request=stored.request,
            token_ids=stored.token_ids[said.index] if stored.token_ids else [],
            end_user=said.end_user or stored.end_user,
            source=source,
        )
        session.add(made)
    return made


def read_metadata(
    database: Database, project_id: str, completion_id: str, metadata: Mapping[str, str] | None
) -> None:
    """Take metadata that says something of a completion as feedback, in place of what was said so.

    `rating` is 1 to 5, up, down, good or bad; `correction` is a text, `preferred_over` an id.
    Anything else stays metadata.
    """
    said = []
    for name, text in (metadata or {}).items():
        if name == "rating" and text.lower() in THUMBS:
            said.append(Said(thumb=THUMBS[text.lower()]))
        elif name == "rating" and text in ("1", "2", "3", "4", "5"):
            said.append(Said(rating=int(text)))
        elif name == "correction" and text.strip():
            said.append(Said(correction=text))
        elif name == "preferred_over":
            said.append(Said(preferred_over=text))
    with database.write() as session:
        mine = (Feedback.completion_id == completion_id, Feedback.project_id == project_id)
        session.execute(delete(Feedback).where(*mine, Feedback.source == "metadata"))
        if not policy_of(session, project_id).consent:
            return
    for one in said:
        try:
            give(database, project_id, completion_id, one, "metadata")
        except (InvalidInput, NotFound):
            continue  # it compares with something that is not stored: metadata, and nothing more


def rows(
    database: Database, project_id: str, kind: str, model: str | None = None
) -> list[dict[str, Any]]:
    """Return an account's feedback as rows to train on: preference, unpaired, sft or raw.

    Raises:
        InvalidInput: No such kind.
    """
    if kind not in ("preference", "unpaired", "sft", "raw"):
        raise InvalidInput(
            f"Invalid 'kind': '{kind}'. Supported values are: 'preference', 'unpaired', 'sft', "
            "'raw'.",
            param="kind",
        )
    query = select(Feedback).where(Feedback.project_id == project_id)
    if model is not None:
        query = query.where(Feedback.model == model)
    with database.read() as session:
        found = list(session.scalars(query.order_by(Feedback.created_at, Feedback.id)))
    made = []
    for one in found:
        if kind == "raw":
            made.append(describe(one))
            continue
        answer = _form(one.prompt, one.answer)
        if kind == "unpaired" and one.kind == "rating":
            label = one.value.get("thumb", one.value.get("rating"))
            made.append({"prompt": one.prompt, "completion": answer, "label": label})
        elif one.kind == "correction" and kind in ("preference", "sft"):
            better = _form(one.prompt, one.value["text"])
            pair = {"chosen": better, "rejected": answer}
            made.append(
                {"prompt": one.prompt} | (pair if kind == "preference" else {"completion": better})
            )
        elif one.kind == "preference" and kind == "preference":
            rejected = _form(one.prompt, one.value["rejected"])
            made.append({"prompt": one.prompt, "chosen": answer, "rejected": rejected})
    return made


def list_feedback(
    database: Database, project_id: str, limit: int, after: str | None = None
) -> tuple[list[Feedback], bool]:
    """Return a page of an account's feedback, newest first, and whether more follows."""
    query = select(Feedback).where(Feedback.project_id == project_id)
    with database.read() as session:
        if after is not None:
            mark = session.get(Feedback, after)
            if mark is None or mark.project_id != project_id:
                raise InvalidInput(f"Invalid 'after': no feedback {after}", param="after")
            same = (Feedback.created_at == mark.created_at) & (Feedback.id < mark.id)
            query = query.where((Feedback.created_at < mark.created_at) | same)
        order = (Feedback.created_at.desc(), Feedback.id.desc())
        found = list(session.scalars(query.order_by(*order).limit(limit + 1)))
    return found[:limit], len(found) > limit


def describe(one: Feedback) -> dict[str, Any]:
    """Return feedback as the API tells it."""
    return {
        "id": one.id,
        "object": "feedback",
        "created_at": one.created_at,
        "completion_id": one.completion_id,
        "index": one.index,
        "model": one.model,
        "kind": one.kind,
        **one.value,
        "prompt": one.prompt,
        "answer": one.answer,
        "request": one.request,
        "token_ids": one.token_ids,
        "user": one.end_user,
        "source": one.source,
    }


def summary(database: Database, project_id: str) -> dict[str, dict[str, int]]:
    """Return how much feedback of each kind each model of an account has."""
    query = (
        select(Feedback.model, Feedback.kind, func.count())
        .where(Feedback.project_id == project_id)
        .group_by(Feedback.model, Feedback.kind)
    )
    found: dict[str, dict[str, int]] = {}
    with database.read() as session:
        for model, kind, count in session.execute(query):
            found.setdefault(model, {})[kind] = count
    return found


def _stored(session: Session, project_id: str, completion_id: str) -> _Stored:
    chat = session.get(ChatRecord, completion_id)
    if chat is not None and chat.project_id == project_id:
        answers = [c["message"]["content"] or "" for c in chat.completion["choices"]]
        request = {k: v for k, v in chat.request.items() if k not in ("token_ids", "user")}
        ids = chat.request.get("token_ids") or []
        user = chat.request.get("user")
        return _Stored(chat.model, chat.messages, answers, request, ids, user)
    plain = session.get(StoredCompletion, completion_id)
    if plain is not None and plain.project_id == project_id:
        answers = [choice["text"] for choice in plain.completion["choices"]]
        request = {k: v for k, v in plain.request.items() if k != "token_ids"}
        ids = plain.request.get("token_ids") or []
        return _Stored(plain.model, plain.prompt, answers, request, ids, plain.end_user)
    raise NotFound(
        f"No stored completion {completion_id}. Ask for it with store=true, and judge it then.",
        param="completion_id",
    )


def _worse(session: Session, project_id: str, stored: _Stored, said: Said) -> dict[str, Any]:
    other = _stored(session, project_id, said.preferred_over or "")
    if other.prompt != stored.prompt:
        raise InvalidInput(
            "The two completions answer different prompts, so they do not compare.",
            param="preferred_over",
        )
    return {
        "preferred_over": said.preferred_over,
        "rejected": other.answers[0],
        "rejected_model": other.model,
    }


def _form(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
