"""What every request of the review's pages goes through: size, origin, host, headers; and how often tokens are tried.

Runs at the coordinator, before server/review/app.py. Enters: anything that connects. Leaves: requests that a page of
this server sent. Private: nothing is logged, and no address is kept longer than a minute.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from urllib.parse import parse_qs, urlsplit

from fastapi import Request, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES, MAX_FIELDS = 65_536, 40
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with none, a form's Origin would be null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Refusal(Exception):  # noqa: N818
    """A request that is answered with a page of one sentence.

    Attributes:
        status: of HTTP.
        heading, text: of the page.
    """

    def __init__(self, status: int, heading: str, text: str) -> None:
        super().__init__(text)
        self.status, self.heading, self.text = status, heading, text


class Tries:
    """Counts wrong tokens by address, for a minute. 256 random bits are not guessed: this keeps the trail short.

    Args:
        limit: wrong ones a minute and address.
        window_s: the minute.
    """

    _MAX_ADDRESSES = 10_000

    def __init__(self, limit: int = 10, window_s: float = 60.0) -> None:
        self.limit, self.window_s = limit, window_s
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()

    def exhausted(self, address: str) -> bool:
        """Whether an address has to wait."""
        return len(self._recent(address)) >= self.limit

    def wrong(self, address: str) -> bool:
        """Notes a wrong one; whether the limit was reached with it."""
        recent = [*self._recent(address), time.monotonic()]
        self._wrong[address] = recent
        self._wrong.move_to_end(address)
        while len(self._wrong) > self._MAX_ADDRESSES:
            self._wrong.popitem(last=False)
        return len(recent) == self.limit

    def _recent(self, address: str) -> list[float]:
        since = time.monotonic() - self.window_s
        return [moment for moment in self._wrong.get(address, ()) if moment > since]


class Guard:
    """Around the application: refuses other hosts' names and forms of other origins, puts the headers on every answer.

    Args:
        app: the application.
        hosts: names under which this server may be asked; None: any. On loopback it keeps out a page that points a
            name of its own at this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer: ASGIApp = self._app
        if self._hosts is not None and _host(request.headers.get("host", "")) not in self._hosts:
            answer = Response("unknown host\n", 421, media_type="text/plain")
        elif request.method not in ("GET", "HEAD") and not _same_origin(request):
            answer = Response("a form of another site\n", 403, media_type="text/plain")
        await answer(scope, receive, send_with_headers)


def _host(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _same_origin(request: Request) -> bool:
    """What the browser itself says of where a form came from; a browser that says nothing needs the form's secret."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    return origin is None or origin == f"{request.url.scheme}://{request.headers.get('host', '')}"


async def fields(request: Request) -> dict[str, list[str]]:
    """A form's fields.

    Raises:
        Refusal: not a form, or a large one.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Refusal(413, "Too long", "Nothing was saved: shorten the comment, and save again.")
    if kind != "application/x-www-form-urlencoded":
        raise Refusal(415, "Not a form", "Nothing was saved.")
    try:
        return parse_qs(body.decode("ascii"), keep_blank_values=True, errors="replace", max_num_fields=MAX_FIELDS)
    except ValueError:
        raise Refusal(400, "Not a form", "Nothing was saved.") from None
