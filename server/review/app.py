"""The pages on which experts compare answers: log in, pair after pair, finish. Rendered here; no script is needed.

Runs at the coordinator. Enters: requests of raters' browsers. Leaves: pages, and ratings to the database. Private: no
page, address, header or order of elements says whose an answer is, or that a pair comes twice. Every text is escaped.

One request is handled at a time, in the event loop: each is a few look-ups by primary key and one page.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from . import raters
from .blinding import USAGE_FORM, USAGE_LOGIN, USAGE_TAKE_OVER, derive
from .database import Database
from .items import Entry, ReviewError
from .raters import Rater
from .ratings import MAX_COMMENT, PREFERENCES, REASONS, Pair, Rating, next_open, pair_at, progress, rate
from .requests import Guard, Refusal, Tries, fields

KINDS = {
    "synthetic": ("Synthetic records.", "No real person is described here."),
    "consented": (
        "Records of people who consented to this use.",
        "Copy nothing, keep what you read to yourself, and do not try to find out who they are.",
    ),
    "open": (
        "Records of an open registry.",
        "Its publisher took identifiers out; do not try to find out who the people are.",
    ),
}
PER_PAGE = 100
_TICKET_S = 600
_COOKIE_S = 7 * 86_400  # how long a session lasts, the server decides
_HERE = Path(__file__).parent
_FILES = {
    "review.css": ("text/css", (_HERE.parent / "templates" / "report.css", _HERE / "templates" / "review.css")),
    "review.js": ("text/javascript", (_HERE / "templates" / "review.js",)),
}
_ENDED = "You are logged out: somebody went on with your token in another browser, or 12 hours had passed. "
_WHY = {"ended": _ENDED + "What was not saved then is not kept.", "out": "You are logged out."}

Handler = Callable[[Request, Rater], Awaitable[Response]]


def make_app(database: Database, *, tls: bool = False, hosts: frozenset[str] | None = None) -> Guard:
    """The review of one database.

    Args:
        database: open; used from one thread.
        tls: whether browsers come over TLS, so that cookies are for that only.
        hosts: names under which it may be asked; None: any.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    pages = _Pages(database, tls)
    for method, path, handler in (
        ("GET", "/start", pages.start),
        ("GET", "/next", pages.next),
        ("GET", "/pairs", pages.pairs),
        ("GET", "/go", pages.go),
        ("GET", "/pairs/{number}", pages.pair),
        ("POST", "/pairs/{number}", pages.save),
        ("GET", "/finish", pages.finish),
        ("POST", "/shortcuts", pages.shortcuts),
        ("POST", "/logout", pages.logout),
    ):
        app.add_api_route(path, pages.for_raters(handler), methods=[method], response_model=None)
    app.add_api_route("/", pages.home, methods=["GET"], response_model=None)
    app.add_api_route("/login", pages.login_page, methods=["GET"], response_model=None)
    app.add_api_route("/login", pages.login, methods=["POST"], response_model=None)
    app.add_api_route("/takeover", pages.take_over, methods=["POST"], response_model=None)
    app.add_api_route("/static/{name}", _static, methods=["GET"], response_model=None)

    async def refused(request: Request, error: Any) -> Response:
        known = isinstance(error, Refusal)
        status, heading, text = (error.status, error.heading, error.text) if known else _sentence(error)
        return pages.page("message.html.j2", None, status=status, heading=heading, text=text)

    for kind in (Refusal, 404, 405, 500):
        app.add_exception_handler(kind, refused)
    return Guard(app, hosts)  # also around the page that an error gets


def _sentence(error: Any) -> tuple[int, str, str]:
    if getattr(error, "status_code", 500) in (404, 405):
        return error.status_code, "No such page", "Nothing was changed."
    return 500, "Something went wrong", "Nothing of this step was saved. Go back and try again; then tell who runs it."


class _Pages:
    """Handlers: each looks something up or writes it, and renders a page or sends the browser on."""

    def __init__(self, database: Database, tls: bool) -> None:
        self._db, self._tls, self._tries = database, tls, Tries()
        self._session, self._visit = ("__Host-session", "__Host-visit") if tls else ("session", "visit")

    # ---- what pages have in common

    def page(self, template: str, rater: Rater | None, *, status: int = 200, **values: Any) -> HTMLResponse:
        """A page of HTML."""
        text = (
            _templates()
            .get_template(template)
            .render(
                study=self._db.facts,
                kind=KINDS[self._db.facts.data],
                rater=rater,
                style=f"/static/review.css?v={_file('review.css')[2]}",
                script=f"/static/review.js?v={_file('review.js')[2]}",
                **values,
            )
        )
        return HTMLResponse(text, status)

    def for_raters(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """A handler that is called only for who is logged in, and for a form only with that session's secret in it."""

        async def handle(request: Request) -> Response:
            session = request.cookies.get(self._session, "")
            rater = raters.by_session(self._db, session)
            if rater is None:
                return RedirectResponse("/login?why=ended" if session else "/login", 303)
            request.state.form = self._secret(USAGE_FORM, session)
            if request.method == "POST":
                request.state.fields = await fields(request)
                _check(request.state.fields, request.state.form)
            return await handler(request, rater)

        return handle

    def _secret(self, usage: bytes, what: str) -> str:
        return derive(self._db.facts.seed, usage, what).hex()

    def _cookie(self, response: Response, name: str, value: str) -> None:
        age = _COOKIE_S if value else 0
        response.set_cookie(name, value, max_age=age, path="/", secure=self._tls, httponly=True, samesite="strict")

    # ---- in and out

    async def home(self, request: Request) -> Response:
        return RedirectResponse("/start", 303)

    async def login_page(self, request: Request) -> Response:
        if raters.by_session(self._db, request.cookies.get(self._session, "")) is not None:
            return RedirectResponse("/start", 303)
        return self._login(request, _WHY.get(request.query_params.get("why", ""), ""))

    def _login(self, request: Request, message: str = "", status: int = 200, wrong: bool = False) -> Response:
        visit = request.cookies.get(self._visit) or secrets.token_urlsafe(16)
        response = self.page(
            "login.html.j2", None, status=status, form=self._secret(USAGE_LOGIN, visit), message=message, wrong=wrong
        )
        self._cookie(response, self._visit, visit)
        return response

    async def login(self, request: Request) -> Response:
        given, address = await fields(request), request.client.host if request.client else ""
        _check(given, self._secret(USAGE_LOGIN, request.cookies.get(self._visit, "")))
        if self._tries.exhausted(address):
            text = "Too many wrong tokens came from your address. Wait a minute, and try again."
            return self._login(request, text, 429)
        rater = raters.by_token(self._db, _one(given, "token"))
        if rater is None:
            if self._tries.wrong(address):
                with self._db.transaction():
                    self._db.note(None, "wrong tokens")
            text = "No rater has this token. Copy all of it; if it was replaced, only the newest one works."
            return self._login(request, text, 401, wrong=True)
        if rater.busy:
            until = str(int(time.time()) + _TICKET_S)
            return self.page(
                "takeover.html.j2",
                None,
                status=409,
                form=self._secret(USAGE_LOGIN, request.cookies.get(self._visit, "")),
                ticket=f"{rater.number}.{until}.{self._ticket(rater, until)}",
                seen=f"{datetime.fromtimestamp(rater.seen, UTC):%H:%M on %Y-%m-%d}",
            )
        return self._enter(rater)

    def _ticket(self, rater: Rater, until: str) -> str:
        """Proof that a token was given, good for a while and against the session that was there then."""
        session = (rater.session or b"").hex()
        return self._secret(USAGE_TAKE_OVER, f"{rater.number}.{until}.{session}")

    async def take_over(self, request: Request) -> Response:
        given = await fields(request)
        _check(given, self._secret(USAGE_LOGIN, request.cookies.get(self._visit, "")))
        number, _, rest = _one(given, "ticket").partition(".")
        until, _, proof = rest.partition(".")
        rater = raters.by_number(self._db, _number(number) or 0)
        good = rater is not None and hmac.compare_digest(proof.encode(), self._ticket(rater, until).encode())
        if rater is None or not good or time.time() > (_number(until) or 0):
            return self._login(request, "That took too long, or somebody else logged in meanwhile. Log in again.", 409)
        return self._enter(rater)

    def _enter(self, rater: Rater) -> Response:
        response = RedirectResponse("/start", 303)
        self._cookie(response, self._session, raters.log_in(self._db, rater))
        self._cookie(response, self._visit, "")
        return response

    async def logout(self, request: Request, rater: Rater) -> Response:
        raters.log_out(self._db, rater)
        response = RedirectResponse("/login?why=out", 303)
        self._cookie(response, self._session, "")
        return response

    # ---- rating

    async def start(self, request: Request, rater: Rater) -> Response:
        done, total = progress(self._db, rater.number)
        return self.page("start.html.j2", rater, form=request.state.form, done=done, total=total)

    async def shortcuts(self, request: Request, rater: Rater) -> Response:
        raters.set_shortcuts(self._db, rater, _one(request.state.fields, "on") == "1")
        return RedirectResponse("/start", 303)

    async def next(self, request: Request, rater: Rater) -> Response:
        place = next_open(self._db, rater.number)
        return RedirectResponse("/finish" if place is None else f"/pairs/{place + 1}", 303)

    async def pairs(self, request: Request, rater: Rater) -> Response:
        done, total = progress(self._db, rater.number)
        pages = max(1, -(-total // PER_PAGE))
        page = min(max(1, _number(request.query_params.get("page", "1")) or 1), pages)
        first = (page - 1) * PER_PAGE
        rows = self._db.all(
            "SELECT place, preference FROM slots WHERE rater = ? AND place >= ? AND place < ? ORDER BY place",
            rater.number, first, first + PER_PAGE,
        )  # fmt: skip
        places = [(row["place"] + 1, row["preference"] is not None) for row in rows]
        return self.page(
            "pairs.html.j2", rater, form=request.state.form, done=done, total=total, places=places, page=page,
            first=first + 1, last=first + len(places),
        )  # fmt: skip

    async def go(self, request: Request, rater: Rater) -> Response:
        return RedirectResponse(f"/pairs/{_number(request.query_params.get('pair', '')) or 0}", 303)

    async def pair(self, request: Request, rater: Rater) -> Response:
        pair = self._pair(request, rater)
        said = pair.rating
        given: dict[str, Any] = {"preference": "", "reasons": (), "unacceptable": (), "comment": ""}
        if said is not None:
            names = tuple(name for name, bad in zip(("first", "second"), said.unacceptable, strict=True) if bad)
            given = {
                "preference": said.word, "reasons": said.reasons, "unacceptable": names, "comment": said.comment
            }  # fmt: skip
        saved = _number(request.query_params.get("saved", "")) or 0
        return self._show(request, rater, pair, given, saved=saved)

    def _pair(self, request: Request, rater: Rater) -> Pair:
        number = _number(request.path_params["number"]) or 0
        pair = pair_at(self._db, rater.number, number - 1)
        if pair is None:
            raise Refusal(404, "No such pair", "Look at all pairs to find one.")
        return pair

    def _show(
        self, request: Request, rater: Rater, pair: Pair, given: Mapping[str, Any], problem: str = "", saved: int = 0
    ) -> Response:
        done, total = progress(self._db, rater.number)
        record: dict[str, list[Entry]] = {}
        for entry in pair.item.record:
            record.setdefault(entry.section, []).append(entry)
        return self.page(
            "pair.html.j2", rater, status=422 if problem else 200, form=request.state.form, number=pair.place + 1,
            done=done, total=total, item=pair.item, record=record, answers=pair.answers, given=given, problem=problem,
            saved=saved, rated=pair.rating is not None, preferences=PREFERENCES, reasons=REASONS,
            max_comment=MAX_COMMENT,
        )  # fmt: skip

    async def save(self, request: Request, rater: Rater) -> Response:
        pair, said = self._pair(request, rater), request.state.fields
        given = {
            "preference": _one(said, "preference"), "reasons": said.get("reason", []),
            "unacceptable": said.get("unacceptable", []), "comment": _one(said, "comment"),
        }  # fmt: skip
        try:
            rate(self._db, rater.number, pair.place, Rating.of(**given))
        except ReviewError as error:
            return self._show(request, rater, pair, given, problem=str(error))
        place = next_open(self._db, rater.number, pair.place)
        where = "/finish" if place is None else f"/pairs/{place + 1}?saved={pair.place + 1}"
        return RedirectResponse(where, 303)

    async def finish(self, request: Request, rater: Rater) -> Response:
        done, total = progress(self._db, rater.number)
        if done < total:
            return RedirectResponse("/next", 303)
        return self.page("finish.html.j2", rater, form=request.state.form, total=total)


def _check(given: Mapping[str, list[str]], secret: str) -> None:
    """Refuses a form that no page of this browser's session holds."""
    if not hmac.compare_digest(_one(given, "form").encode(), secret.encode()):
        raise Refusal(403, "Not saved", "This form is of another session. Open the page again, and send it from there.")


def _one(given: Mapping[str, list[str]], name: str) -> str:
    return given.get(name, [""])[0]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _FILES:
        raise Refusal(404, "No such page", "Nothing was changed.")
    kind, content, _ = _file(name)
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}  # the address changes with the content
    return Response(content, media_type=kind, headers=headers)


@cache
def _file(name: str) -> tuple[str, bytes, str]:
    """Media type, content, and a digest for its address."""
    kind, paths = _FILES[name]
    content = b"\n".join(path.read_bytes() for path in paths)
    return kind, content, hashlib.sha256(content).hexdigest()[:12]


@cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shown"] = _shown
    return made


def _shown(value: str | float | bool) -> str:
    """A value as it is read: yes and no, and numbers as they were given."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
