"""A headless Chromium, driven over the WebDriver protocol by plain HTTP: keys, reloads, what has the focus.

Chromium and chromedriver are Debian's packages of these names. No client library: its newest one wants a newer certifi
than Flower allows.
"""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "no Chromium with chromedriver on this machine (Debian: chromium, chromium-driver)"
TAB, ENTER, SPACE, RIGHT, CONTROL, SHIFT = "\ue004", "\ue007", " ", "\ue014", "\ue009", "\ue008"
# Without the background-networking flags it tries to reach its maker's hosts at every start.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb",
)  # fmt: skip
_WAIT_S = 30.0


class Browser:
    """One window of one browser profile."""

    def __init__(self, driver: httpx.Client, session: str) -> None:
        self._driver, self._session = driver, session

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        answer = self._driver.request(
            method, f"/session/{self._session}{path}", json=body if method == "POST" else None
        )
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self._ask("POST", "/url", url=url)

    def reload(self) -> None:
        self._ask("POST", "/refresh")

    def close_window(self) -> None:
        """Closes the page as a person does, with another left in its place; cookies stay."""
        kept = self._ask("POST", "/window/new", type="tab")["handle"]
        self._ask("DELETE", "/window")
        self._ask("POST", "/window", handle=kept)

    @property
    def url(self) -> str:
        return self._ask("GET", "/url")

    @property
    def source(self) -> str:
        return self._ask("GET", "/source")

    def run(self, script: str, *arguments: Any) -> Any:
        return self._ask("POST", "/execute/sync", script=script, args=list(arguments))

    def run_async(self, script: str) -> Any:
        return self._ask("POST", "/execute/async", script=script, args=[])

    def text(self, css: str = "body") -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def focused(self) -> str:
        """What has the focus: tag, name, value, and the text of a link or button."""
        return self.run(
            "const e = document.activeElement;"
            "return [e.tagName.toLowerCase(), e.name ?? '', ['radio', 'checkbox'].includes(e.type) ? e.value : '',"
            " ['A', 'BUTTON'].includes(e.tagName) ? e.innerText.trim() : ''].filter(Boolean).join(' ')"
        )

    def keys(self, *keys: str, holding: str = "") -> None:
        """Presses keys one after another, as a keyboard does, with another held down."""
        actions = [{"type": "keyDown", "value": holding}] if holding else []
        for key in "".join(keys):
            actions += [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        actions += [{"type": "keyUp", "value": holding}] if holding else []
        self._ask("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def tab_to(self, wanted: str) -> None:
        """Presses Tab until what has the focus begins with `wanted`."""
        seen: list[str] = []
        for _ in range(60):
            self.keys(TAB)
            seen.append(self.focused())
            if seen[-1].startswith(wanted):
                return
        raise AssertionError(f"Tab never reaches {wanted!r}: {seen}")

    def wait(self, condition: str, *arguments: Any) -> None:
        """Until a script's condition holds; pages come and go meanwhile."""
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            try:
                if self.run(f"return document.readyState === 'complete' && Boolean({condition})", *arguments):
                    return
            except AssertionError:
                pass  # between two pages
            time.sleep(0.02)
        raise AssertionError(f"not within {_WAIT_S} s: {condition} {arguments}; {self.url}\n{self.text()}")

    def wait_for_title(self, start: str) -> None:
        self.wait("document.title.startsWith(arguments[0])", start)

    def size(self, width: int, height: int) -> None:
        """Of the page, not of the window."""
        self._ask(
            "POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride",
            params={"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )  # fmt: skip

    def picture(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page."""
        shot = self._ask(
            "POST", "/goog/cdp/execute", cmd="Page.captureScreenshot", params={"captureBeyondViewport": whole}
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self._ask("POST", "/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def browsers(folder: Path, count: int = 1) -> Iterator[list[Browser]]:
    """So many browsers, each with an empty profile; they end with the block."""
    assert CHROMIUM and DRIVER, MISSING
    port = free_port()
    log = (folder / "chromedriver.log").open("wb")
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=log, stderr=subprocess.STDOUT)
    sessions: list[str] = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as driver:
        try:
            _until_up(driver, process)
            for index in range(count):
                args = [*_FLAGS, f"--user-data-dir={folder / f'profile-{index}'}"]
                options = {"binary": CHROMIUM, "args": args}
                asked = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
                answer = driver.post("/session", json=asked).json()["value"]
                assert "sessionId" in answer, answer
                sessions.append(answer["sessionId"])
            yield [Browser(driver, session) for session in sessions]
        finally:
            for session in sessions:
                driver.delete(f"/session/{session}")
            process.terminate()
            process.wait(30)
            log.close()


def _until_up(driver: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if driver.get("/status").json()["value"]["ready"]:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("chromedriver did not come up")
