"""What every page shares: who looks at it, whether a form is genuine, how it is written out.

Pages work as plain forms; htmx swaps what it can. Templates escape everything, and the browser is
told to run and load nothing but the files in `static` (Content-Security-Policy), so that text of a
model or a user stays text. A form counts only if the browser says that it comes from here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import jinja2
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from data import audit, people
from data.errors import Forbidden, ToolkitError
from data.tables_people import Person
from serve.api.errors import status_of
from serve.runtime import Runtime
from serve.web.markdown import as_html

COOKIE = "hone_session"
HERE = Path(__file__).parent
RANK = {"labeler": 0, "reviewer": 1, "admin": 2}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
NOTES = {  # what a redirect may tell, by name: a link cannot put words into a page
    "late": "Your time for that task had run out and others judged it. Your answer is kept but "
    "does not count.",
    "withdrawn": "That task was withdrawn meanwhile. Your answer is kept but not used.",
    "twice": "You had sent that answer already; it counts once.",
    "other": "You had answered that task before, and differently. The first answer stands; change "
    'it below "Your progress".',
    "changed": "Your answer was changed; the earlier one is kept and no longer counts.",
    "gone": "That task is no longer in your hands. Here is what is next.",
    "right": "Right: that is the answer of the guidelines.",
    "wrong": "The guidelines ask for the other answer. Read them again, then go on.",
    "skipped": "Skipped; others will look at it.",
    "flagged": "Flagged; a reviewer will look at its content.",
    "saved": "Saved.",
}

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters["markdown"] = as_html
_templates.filters["percent"] = lambda value: "–" if value is None else f"{value:.0%}"


@dataclass(frozen=True, slots=True)
class Visit:
    """A request of somebody who is signed in."""

    request: Request
    runtime: Runtime
    person: Person
    form: FormData

    @property
    def account(self) -> str:
        """The id of the person's account."""
        return self.person.project_id

    def path(self, name: str) -> str:
        """Return a part of the path."""
        return str(self.request.path_params[name])

    def text(self, name: str, default: str = "") -> str:
        """Return a field of the form as text."""
        value = self.form.get(name, default)
        return value if isinstance(value, str) else default

    def render(self, template: str, status: int = 200, **values: Any) -> Response:
        """Write a page."""
        note = NOTES.get(self.request.query_params.get("note", ""))
        shared = {"person": self.person, "note": note, "rank": RANK[self.person.role]}
        return render(template, status, **shared, **values)


Handler = Callable[[Visit], Any]


def render(template: str, status: int = 200, **values: Any) -> Response:
    """Write a page for anybody."""
    filled = {"person": None, "note": None, "error": None, "rank": -1, **values}
    return HTMLResponse(_templates.get_template(template).render(filled), status, HEADERS)


def go(path: str, note: str | None = None) -> Response:
    """Send the browser to another page."""
    url = path + (f"?note={note}" if note else "")
    return RedirectResponse(url, 303, {"cache-control": "no-store"})


def page(role: str) -> Callable[[Handler], Callable[[Request], Any]]:
    """Let a function answer people of a role or a higher one.

    It may be async; otherwise it runs in a thread. An error of hone's becomes a page that tells it.
    """

    def wrap(handler: Handler) -> Callable[[Request], Any]:
        @functools.wraps(handler)
        async def answer(request: Request) -> Response:
            runtime: Runtime = request.app.state.runtime()
            request.state.route = f"/web{request.scope['route'].path}"
            token = request.cookies.get(COOKIE, "")
            person = await run_in_threadpool(people.of_session, runtime.database, token)
            if person is None:
                return go(f"/web/login?next={quote(_page_of(request))}")
            form = FormData()
            try:
                if RANK[person.role] < RANK[role]:
                    raise Forbidden(f"This page is for people with the role {role}.")
                if request.method == "POST":
                    check_origin(request)
                    form = await request.form()
                client = request.client.host if request.client else None
                audit.actor.set(audit.Actor(person.id, client, request.state.request_id))
                visit = Visit(request, runtime, person, form)
                if inspect.iscoroutinefunction(handler):
                    return await handler(visit)
                return await run_in_threadpool(handler, visit)
            except ToolkitError as error:
                shown = {"person": person, "rank": RANK[person.role]}
                return render("error.html", status_of(error), message=error.public, **shown)
            finally:
                await form.close()  # uploaded files

        return answer

    return wrap


def _page_of(request: Request) -> str:
    """Return the path of the page at hand; of a form, the page that it was sent from."""
    if request.method == "GET":
        return "/web" + request.url.path.removeprefix("/web")
    sent_from = urlsplit(request.headers.get("referer", ""))
    is_here = sent_from.netloc == request.headers.get("host")
    return sent_from.path if is_here else "/web/"


def check_origin(request: Request) -> None:
    """Make sure that a form comes from a page of this server.

    Raises:
        Forbidden: It comes from elsewhere, or the browser does not say.
    """
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        good = site == "same-origin"
    else:
        good = origin is not None and urlsplit(origin).netloc == request.headers.get("host")
    if not good:
        raise Forbidden(
            "This form was not sent from a page of this server. Open the page again and send it "
            "from there."
        )


def whole_number(values: Mapping[str, Any], name: str) -> int | None:
    """Return a field as a whole number; None where it is empty or none."""
    text = str(values.get(name, "")).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
