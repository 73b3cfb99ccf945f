"""The review in a real browser: two raters with a keyboard and nothing else, and what an accessibility checker finds.

Skipped where no Chromium is installed. The checker is axe-core, as the package axe-playwright-python carries it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from .browser import CHROMIUM, CONTROL, DRIVER, ENTER, MISSING, RIGHT, SPACE, TAB, Browser, browsers, free_port
from .study_case import MODELS, item, write_items

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
WARDROUND = Path(sys.executable).parent / "wardround"
PAIRS = 20
# axe reports of how serious a finding is; the first two keep somebody from using the page.
SERIOUS = {"critical", "serious"}


def wardround(*arguments: object) -> str:
    done = subprocess.run(
        [WARDROUND, "server", "review", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def served(folder: Path, *names: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The command itself, with a new study of PAIRS pairs, or the one that is there: address and tokens."""
    items = write_items(folder / "items.jsonl", [item(number) for number in range(PAIRS)])
    command = [WARDROUND, "server", "review", "start", folder / "study", "--items", items]
    command += [part for name in names for part in ("--rater", name)]
    command += ["--listen", f"127.0.0.1:{free_port()}"]
    with (folder / "tokens").open("w") as out, (folder / "said").open("w") as err:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err, env=dict(os.environ))
    try:
        deadline, found = time.monotonic() + 60, None
        while found is None:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "said").read_text()
            time.sleep(0.05)
            found = re.search(r"http://\S+", (folder / "said").read_text())
        lines = (folder / "tokens").read_text().splitlines()
        yield found[0].rstrip("/"), dict(line.split("\t") for line in lines)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, (folder / "said").read_text()


def log_in(rater: Browser, url: str, token: str) -> None:
    rater.open(url)
    rater.wait_for_title("Log in")
    rater.tab_to("input token")
    rater.keys(token, ENTER)
    rater.wait_for_title("Instructions")


def test_two_raters_compare_twenty_pairs_with_the_keyboard_alone(tmp_path: Path) -> None:
    """One with shortcuts, one without; one reloads and closes the page half way; both go back and change a rating."""
    with served(tmp_path, "Kim", "Lee") as (url, tokens), browsers(tmp_path, 2) as (kim, lee):
        pages: list[str] = []

        log_in(kim, url, tokens["Kim"])
        kim.tab_to("a Begin")
        kim.keys(ENTER)
        for number in range(1, 23):
            kim.wait_for_title(f"Pair {number} of 22")
            pages.append(kim.source)
            kim.keys(str(number % 5 + 1))  # a shortcut, which also moves the focus there
            assert kim.focused().startswith("input preference ")
            if number == 2:
                kim.keys("c", "clear <b>reason</b>")
                assert kim.run("return document.getElementById('comment').value") == "clear <b>reason</b>"
                kim.keys(ENTER, holding=CONTROL)
            else:
                kim.keys(ENTER)
            if number == 7:
                kim.wait_for_title("Pair 8 of 22")
                kim.keys("3")
                kim.reload()
                kim.wait_for_title("Pair 8 of 22")
                assert not kim.run("return document.querySelector('[name=preference]:checked') !== null")
                assert "7 of 22 rated" in kim.text()
            if number == 9:
                kim.wait_for_title("Pair 10 of 22")
                kim.close_window()
                kim.open(url)  # the same browser comes back, without a token
                kim.wait_for_title("Instructions")
                kim.tab_to("a Continue")
                kim.keys(ENTER)
        kim.wait_for_title("Finished")

        log_in(lee, url, tokens["Lee"])
        lee.tab_to("button Turn keyboard shortcuts off")
        lee.keys(ENTER)
        lee.wait("document.body.innerText.includes('shortcuts on')")
        lee.tab_to("a Begin")
        lee.keys(ENTER)
        for number in range(1, 23):
            lee.wait_for_title(f"Pair {number} of 22")
            lee.keys("1")  # does nothing now
            lee.keys(TAB, TAB, ENTER)  # the second skip link: to the rating
            lee.tab_to("input preference")
            lee.keys(SPACE, *[RIGHT] * (number % 3))
            lee.tab_to("input reason safety")
            lee.keys(SPACE)
            lee.tab_to("textarea comment")
            lee.keys("two", ENTER, "lines")
            lee.tab_to("button Save and go on")
            lee.keys(ENTER)
        lee.wait_for_title("Finished")

        lee.tab_to("a Look at the pairs again")
        lee.keys(ENTER)
        lee.wait_for_title("All pairs")
        lee.tab_to("input pair")
        lee.keys("5", ENTER)
        lee.wait_for_title("Pair 5 of 22")
        assert lee.run("return document.getElementById('comment').value") == "two\nlines"
        lee.tab_to("input preference")
        lee.keys(RIGHT)
        lee.tab_to("button Save the change")
        lee.keys(ENTER)
        lee.wait_for_title("Finished")
        lee.tab_to("button Log out")
        lee.keys(ENTER)
        lee.wait("document.body.innerText.includes('You are logged out.')")

        whole = "".join(pages)
        assert not any(model in whole for model in MODELS) and "kept-0" not in whole

    rows = list(csv.DictReader(io.StringIO(wardround("export", tmp_path / "study", "--names"))))
    assert len(rows) == 44 and {row["rater"] for row in rows} == {"Kim", "Lee"}
    mine = {int(row["pair"]): row for row in rows if row["rater"] == "Kim"}
    assert mine[2]["comment"] == "clear <b>reason</b>"
    for number, row in mine.items():
        first_better = number % 5 + 1 < 3
        expected = "equal" if number % 5 == 2 else row["shown_first"] if first_better else None
        assert row["preferred"] == (expected or next(model for model in MODELS if model != row["shown_first"]))
        assert row["strength"] == str(abs(number % 5 - 2))
    theirs = [row for row in rows if row["rater"] == "Lee"]
    assert {(row["reasons"], row["comment"]) for row in theirs} == {("safety", "two\nlines")}
    found = json.loads(wardround("stats", tmp_path / "study", "--json"))
    people = found["people"]
    assert people["preference"]["n"] == 2 * PAIRS and people["agreement"]["shared_items"] == PAIRS
    assert people["self_consistency"]["same_preference"]["of"] == 4 and people["not_possible"] == {}
    assert people["position"]["count"] + 0 <= people["position"]["of"] <= 2 * PAIRS
    actions = [json.loads(line)["action"] for line in wardround(
        "export", tmp_path / "study", "--trail", "--format", "jsonl").splitlines()]  # fmt: skip
    assert actions.count("rated") == 44 and actions.count("changed") == 1
    assert actions.count("logged in") == 2 and actions.count("logged out") == 1 and "taken over" not in actions


def test_axe_finds_nothing_serious_on_any_page_in_light_and_dark_wide_and_narrow(tmp_path: Path) -> None:
    spec = find_spec("axe_playwright_python")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("axe-playwright-python is not installed (make install does it)")
    axe = (Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")
    found: list[str] = []

    def check(page: Browser, name: str) -> None:
        # A script of the driver's, so the page's content security policy stays as it is.
        page.run(f"{axe}; window.axe = axe;")
        result = page.run_async("const done = arguments[arguments.length - 1]; axe.run(document).then(done);")
        assert len(result["passes"]) > 10, name
        for violation in result["violations"]:
            targets = [node["target"] for node in violation["nodes"]]
            found.append(f"{name}: {violation['impact']}: {violation['id']}: {targets}")

    with served(tmp_path, "Kim") as (url, tokens), browsers(tmp_path, 2) as (kim, other):

        def each(page: Browser, name: str) -> None:
            for dark, width, height in ((False, 1280, 900), (True, 820, 1180), (False, 390, 844)):
                page.dark(dark)
                page.size(width, height)
                check(page, f"{name} {'dark' if dark else 'light'} {width}")
                over = page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert over <= 0, (name, width)

        kim.open(url)
        kim.wait_for_title("Log in")
        each(kim, "login")
        kim.tab_to("input token")
        kim.keys("wr-nonsense", ENTER)
        kim.wait("document.querySelector('[role=alert]')")
        each(kim, "wrong token")
        log_in(kim, url, tokens["Kim"])
        each(kim, "instructions")
        other.open(url)
        other.tab_to("input token")
        other.keys(tokens["Kim"], ENTER)
        other.wait_for_title("In use elsewhere")
        each(other, "in use elsewhere")
        kim.open(f"{url}/pairs/1")
        each(kim, "pair")
        kim.keys("1")
        kim.run(
            "document.querySelectorAll('[name=preference]').forEach(e => { e.checked = false; e.required = false; })"
        )
        kim.tab_to("button Save and go on")
        kim.keys(ENTER)
        kim.wait_for_title("Not saved")
        each(kim, "not saved")
        kim.keys("1", ENTER)
        kim.wait_for_title("Pair 2")
        each(kim, "next pair")
        kim.open(f"{url}/pairs")
        each(kim, "all pairs")
        kim.open(f"{url}/nothing")
        each(kim, "no such page")
        for number in range(2, 23):
            kim.open(f"{url}/pairs/{number}")
            kim.keys("1", ENTER)
            kim.wait("!location.pathname.endsWith('/' + arguments[0])", str(number))
        kim.wait_for_title("Finished")
        each(kim, "finished")
        kim.open(f"{url}/pairs")
        kim.run("document.querySelector('label').remove(); document.querySelector('h1').style.color = '#ddd'")
        clean, found = found, []
        check(kim, "broken on purpose")
    assert {one.split(": ")[2] for one in found} == {"label", "color-contrast"}  # so the checker does look
    found = clean
    serious = [one for one in found if any(f": {impact}: " in one for impact in SERIOUS)]
    assert serious == [], found
    assert found == []  # nor anything less serious
