"""Signing in and out."""

from __future__ import annotations

import re

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from data import people
from data.errors import Forbidden, RateLimited, Unauthorized
from serve.runtime import Runtime
from serve.web.view import COOKIE, check_origin, go, render

PATH = re.compile(r"/web(/[A-Za-z0-9_./-]*)?")


async def login_page(request: Request) -> Response:
    """Ask for login and password."""
    request.state.route = "/web/login"
    return render("login.html", next=_target(request.query_params.get("next", "")), login="")


async def login(request: Request) -> Response:
    """Start a session."""
    request.state.route = "/web/login"
    runtime: Runtime = request.app.state.runtime()
    form = await request.form()
    name, password = str(form.get("login", "")), str(form.get("password", ""))
    target = _target(str(form.get("next", "")))
    shown = {"next": target, "login": name}
    try:
        check_origin(request)
        address = request.client.host if request.client else ""
        runtime.login_throttle.admit(f"{address} {name.lower()[:128]}")
        token = await run_in_threadpool(people.sign_in, runtime.database, name, password)
    except Forbidden as error:
        return render("login.html", 403, error=error.message, **shown)
    except Unauthorized as error:
        return render("login.html", 401, error=error.message, **shown)
    except RateLimited as error:
        return render("login.html", 429, error=error.message, **shown)
    response = go(target)
    response.set_cookie(
        COOKIE,
        token,
        max_age=people.LONGEST_S,
        path="/web",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


async def logout(request: Request) -> Response:
    """End the session."""
    request.state.route = "/web/logout"
    runtime: Runtime = request.app.state.runtime()
    try:
        check_origin(request)
    except Forbidden as error:
        return render("error.html", 403, message=error.message)
    token = request.cookies.get(COOKIE, "")
    await run_in_threadpool(people.sign_out, runtime.database, token)
    response = go("/web/login")
    response.delete_cookie(COOKIE, path="/web")
    return response


def _target(given: str) -> str:
    """Return where to go after signing in: a page of this server, never an address."""
    return given if PATH.fullmatch(given) else "/web/"
