"""The pages over a real socket: with TLS, without, on a port that is taken, twice at once."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from wardround.common.errors import RunFolderError
from wardround.server import certificates
from wardround.server.review import raters
from wardround.server.review.cli import _only_one
from wardround.server.review.database import Database
from wardround.server.review.items import ReviewError
from wardround.server.review.serve import Address, address, serve

from .browser import free_port
from .study_case import study


@contextmanager
def serving(database: Database, where: Address) -> Iterator[None]:
    servers: list[Any] = []
    thread = threading.Thread(target=serve, args=(database, where, servers.append), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not (servers and servers[0].started):
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
        yield
    finally:
        servers[0].should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def tls(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, by an authority beside them."""
    folder = tmp_path / "tls"
    folder.mkdir(mode=0o700)
    certificates.make_authority(folder, "Review")
    certificates.make_server(folder, "127.0.0.1")
    return folder / "server.pem", folder / "server.key"


def test_with_a_certificate_others_may_connect_and_only_over_tls(tmp_path: Path, tls: tuple[Path, Path]) -> None:
    where = address(f"0.0.0.0:{free_port()}", *tls)
    assert not where.loopback and where.url.startswith("https://")
    with study(tmp_path, 3) as database, serving(database, where):
        url = f"https://127.0.0.1:{where.port}"
        with httpx.Client(verify=str(tls[0].parent / "ca.pem"), trust_env=False, follow_redirects=True) as browser:
            page = browser.get(url + "/")
            assert page.status_code == 200 and "server" not in page.headers
            form = page.text.split('name="form" value="')[1].split('"')[0]
            given = {"form": form, "token": raters.invite(database, "Kim")}
            page = browser.post(url + "/login", data=given, headers={"Origin": url})
            assert page.url.path == "/start" and "__Host-session" in browser.cookies
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{where.port}/", trust_env=False)


def test_a_certificate_of_another_key_is_refused(tmp_path: Path, tls: tuple[Path, Path]) -> None:
    with pytest.raises(ReviewError, match="cannot be used for TLS"):
        address("0.0.0.0:443", tls[0], tls[0].parent / "ca.key")


def test_without_a_certificate_it_answers_loopback_names_only(tmp_path: Path) -> None:
    where = address(f"127.0.0.1:{free_port()}", None, None)
    with study(tmp_path, 3) as database, serving(database, where):
        assert httpx.get(where.url + "login", trust_env=False).status_code == 200
        rebound = httpx.get(where.url + "login", headers={"Host": f"evil.example:{where.port}"}, trust_env=False)
        assert rebound.status_code == 421
        with pytest.raises(ReviewError, match="cannot listen there"):
            serve(database, where, lambda _: None)


def test_a_folder_is_served_once_at_a_time(tmp_path: Path) -> None:
    study(tmp_path, 3).close()
    with (
        _only_one(tmp_path / "study"),
        pytest.raises(RunFolderError, match="running already"),
        _only_one(tmp_path / "study"),
    ):
        pass
