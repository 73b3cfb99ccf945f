"""What a rater's browser gets: blinded, escaped, resumable pages; and what is refused."""

import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from wardround.server.review import raters
from wardround.server.review.app import make_app
from wardround.server.review.database import Database
from wardround.server.review.requests import HEADERS, Tries

from .study_case import MODELS, ORIGIN, Visitor, item, study, visitor, write_items

HOSTILE = """</textarea></script><script>alert(1)</script><img src=x onerror=alert(2)>"' onload='x' {{ 7*7 }} {% x %}"""


def test_no_page_address_or_header_says_whose_an_answer_is_or_that_a_pair_comes_twice(tmp_path: Path) -> None:
    with study(tmp_path) as database:
        rater = visitor(database, "Kim")
        seen = []
        paths = ["/start", "/pairs", "/static/review.css", "/static/review.js", "/nothing", "/login?why=ended"]
        for path in [*paths, *(f"/pairs/{number}" for number in range(1, 23))]:
            answer = rater.get(path)
            seen.append(answer.text + str(answer.headers) + str(answer.url) + str(rater.client.cookies))
        for number in range(1, 23):
            answer = rater.rate(number, "equal")
            seen.append(answer.text + str(answer.headers) + str(answer.url))
        assert "All 22 pairs are rated" in rater.page.text
    whole = "".join(seen).lower()
    for word in (*MODELS, "kept-0", "mimosa", "omega", "first_model", "repeats", "duplicate", "planted"):
        assert word not in whole, word


def test_the_two_pages_of_a_planted_pair_differ_in_nothing_but_place_and_order(tmp_path: Path) -> None:
    with study(tmp_path) as database:
        rater = visitor(database, "Kim")
        row = database.one("SELECT place, repeats FROM slots WHERE repeats IS NOT NULL")
        assert row is not None
        early, late = row["repeats"] + 1, row["place"] + 1
        assert rater.answers(early) == rater.answers(late)[::-1]

        def bare(number: int) -> list[str]:
            text = rater.get(f"/pairs/{number}").text
            text = re.sub(rf"/pairs/\d+|Pair {number} |(?s:<nav aria-label=.Pairs.*?</nav>)", "", text)
            for answer in rater.answers(number):
                text = text.replace(answer, "")
            return text.split()

        assert bare(early) == bare(late)


def test_the_record_is_shown_by_section_with_units_and_what_is_missing(tmp_path: Path) -> None:
    with study(tmp_path, 1) as database:
        page = visitor(database, "Kim").get("/pairs/1").text
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    assert "Vital signs Heart rate 60 /min Temperature not recorded Laboratory Creatinine 1.2 mg/dL" in text
    assert "A study" in page and "<strong>Synthetic records.</strong>" in page


@pytest.mark.parametrize(("kind", "words"), [("consented", "people who consented"), ("open", "an open registry")])
def test_every_page_says_which_kind_of_records_it_shows(tmp_path: Path, kind: str, words: str) -> None:
    from wardround.server.review.items import read_study

    path = write_items(tmp_path / "items.jsonl", [item(1)], {"data": kind})
    with Database.create(tmp_path / "study", read_study(path), 0.0) as database:
        rater = visitor(database, "Kim")
        for page in ("/start", "/pairs", "/pairs/1", "/nothing"):
            assert words in rater.get(page).text
        assert words in Visitor(database).page.text


def test_hostile_texts_are_shown_as_texts(tmp_path: Path) -> None:
    hostile = {
        "record": [{"section": HOSTILE, "label": HOSTILE, "value": HOSTILE, "unit": HOSTILE[:60]}],
        "question": HOSTILE,
        "options": [HOSTILE, "b"],
        "answers": {model: {"text": HOSTILE, "chosen": 0} for model in MODELS},
    }
    with study(tmp_path, 2, **hostile) as database:
        rater = visitor(database, HOSTILE[:80])
        pages = [
            rater.get("/start"),
            rater.get("/pairs/1"),
            rater.rate(1, "equal", comment=HOSTILE),
            rater.get("/pairs/1"),
        ]
        pages.append(rater.rate(1, "nonsense", comment=HOSTILE, reason=HOSTILE, unacceptable=HOSTILE))
        pages.append(rater.get(f"/pairs/{HOSTILE}"))
        pages.append(rater.get(f"/pairs?page={HOSTILE}"))
        for page in pages:
            assert (
                "<script>" not in page.text
                and "<img" not in page.text
                and "49" not in re.sub(r"\b\w{20,}", "", page.text)
            )
            scripts = re.findall(r"<script[^>]*>", page.text)
            assert all(re.fullmatch(r'<script src="/static/review\.js\?v=\w+" defer>', one) for one in scripts)
        assert "&lt;script&gt;alert(1)" in pages[3].text and pages[4].status_code == 422


def test_every_answer_forbids_inline_scripts_framing_and_caching(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        rater = visitor(database, "Kim")
        for path in ("/start", "/pairs/1", "/nothing", "/login"):
            headers = rater.get(path).headers
            assert all(headers[name.lower()] == value for name, value in HEADERS.items())
            assert headers["cache-control"] == "no-store"
        assert (
            "unsafe" not in HEADERS["Content-Security-Policy"]
            and "script-src 'self'" in HEADERS["Content-Security-Policy"]
        )
        for path in ("/start", "/pairs", "/pairs/1"):
            assert not re.search(r"\son\w+=|style=|javascript:", rater.get(path).text)


def test_an_error_of_the_program_is_a_page_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("patient 17")

    monkeypatch.setattr("wardround.server.review.app.progress", broken)
    with study(tmp_path, 2) as database:
        rater = Visitor(database)
        rater.client = TestClient(make_app(database), base_url=ORIGIN, raise_server_exceptions=False)
        answer = rater.log_in(raters.invite(database, "Kim"))
        assert answer.status_code == 500 and "Something went wrong" in answer.text and "patient 17" not in answer.text
        assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]


def test_a_form_without_the_sessions_secret_changes_nothing(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        rater, other = visitor(database, "Kim"), visitor(database, "Lee")
        good = {"preference": "equal"}
        for secret in (None, "", "0" * 64, other.get("/start") and other.hidden()):
            fields = good if secret is None else {**good, "form": secret}
            for path in ("/pairs/1", "/logout", "/shortcuts"):
                answer = rater.client.post(path, data=fields, headers={"Origin": ORIGIN})
                assert answer.status_code == 403, (path, secret)
        assert not database.all("SELECT 1 FROM slots WHERE preference IS NOT NULL")
        assert rater.get("/start").status_code == 200  # still logged in


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://elsewhere.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_a_form_that_another_site_sent_is_refused_even_with_the_secret(tmp_path: Path, headers: dict) -> None:
    with study(tmp_path, 2) as database:
        rater = visitor(database, "Kim")
        rater.get("/pairs/1")
        answer = rater.client.post("/pairs/1", data={"form": rater.hidden(), "preference": "equal"}, headers=headers)
        assert answer.status_code == 403
        assert not database.all("SELECT 1 FROM slots WHERE preference IS NOT NULL")


def test_on_loopback_another_hosts_name_is_refused(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        client = TestClient(make_app(database, hosts=frozenset({"127.0.0.1"})), base_url=ORIGIN)
        assert client.get("/login").status_code == 200
        assert client.get("/login", headers={"Host": "rebound.example:8421"}).status_code == 421


def test_closing_the_page_half_way_loses_nothing_and_continue_goes_to_the_first_open_pair(tmp_path: Path) -> None:
    with study(tmp_path, 4, share=0.0) as database:
        token = raters.invite(database, "Kim")
        first = Visitor(database)
        first.log_in(token)
        first.rate(1, "first-much", reason=["safety", "record"], unacceptable="second", comment="α < β\nsecond line")
        assert str(first.rate(3, "equal").url).endswith("/pairs/4?saved=3")
    with Database.open(tmp_path / "study") as database:  # the server was started again
        again = Visitor(database)
        again.client.cookies = first.client.cookies
        assert "You have rated 2 of 4 pairs" in again.get("/start").text
        assert str(again.get("/next").url).endswith("/pairs/2")
        page = again.get("/pairs/1").text
        for checked in ("first-much", "record", "safety", "second"):
            assert f'value="{checked}" required checked' in page or f'value="{checked}" checked' in page
        assert page.count(" checked") == 4 and "α &lt; β\nsecond line" in page


def test_a_changed_rating_is_kept_with_the_one_before(tmp_path: Path) -> None:
    with study(tmp_path, 3, share=0.0) as database:
        rater = visitor(database, "Kim")
        rater.rate(1, "first-much", comment="a")
        rater.rate(1, "first-much", comment="a")  # the same again is no change
        rater.rate(1, "second-slightly")
        told = [entry for entry in database.trail() if entry.action in ("rated", "changed")]
        assert [entry.action for entry in told] == ["rated", "changed"] and told[1].old == told[0].new
        assert [json.loads(entry.new or "")["preference"] for entry in told] == [-2, 1]
        assert all((entry.rater, entry.place) == (1, 0) for entry in told)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "Choose which answer is better"),
        ({"preference": "third"}, "Choose which answer is better"),
        ({"preference": "equal", "comment": "x" * 2001}, "The comment has 2,001 characters"),
        ({"preference": "equal", "reason": "because"}, "A reason that this page does not offer"),
    ],
)
def test_a_rating_that_is_not_whole_is_not_saved_and_what_was_typed_stays(tmp_path: Path, fields, words) -> None:
    with study(tmp_path, 2) as database:
        rater = visitor(database, "Kim")
        rater.get("/pairs/1")
        answer = rater.post("/pairs/1", **{"comment": "typed", **fields})
        assert answer.status_code == 422 and words in answer.text and 'role="alert"' in answer.text
        assert fields.get("comment", "typed") in answer.text
        assert not database.all("SELECT 1 FROM slots WHERE preference IS NOT NULL")


def test_a_body_that_no_form_has_is_refused(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        rater = visitor(database, "Kim")
        secret = {"form": rater.get("/pairs/1") and rater.hidden()}
        assert rater.client.post("/pairs/1", data={**secret, "comment": "x" * 70_000}).status_code == 413
        assert rater.client.post("/pairs/1", json=secret).status_code == 415
        many = "&".join(f"a{number}=1" for number in range(100))
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert rater.client.post("/pairs/1", content=many, headers=form).status_code == 400


def test_places_that_do_not_exist_are_not_found(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        rater = visitor(database, "Kim")
        for path in (
            "/pairs/0",
            "/pairs/4",
            "/pairs/-1",
            "/pairs/99999999999999999999",
            "/go?pair=x",
            "/static/app.py",
        ):
            assert rater.get(path).status_code == 404, path
        assert rater.get("/openapi.json").status_code == rater.get("/docs").status_code == 404


def test_all_pairs_are_listed_by_hundreds_with_what_is_rated(tmp_path: Path) -> None:
    with study(tmp_path, 120, share=0.0) as database:
        rater = visitor(database, "Kim")
        rater.rate(101, "equal")
        first, second = rater.get("/pairs").text, rater.get("/pairs?page=2").text
        assert "Pairs 1 to 100" in first and "Later pairs" in first and "Earlier pairs" not in first
        assert "Pairs 101 to 120" in second and "Earlier pairs" in second and "Later pairs" not in second
        assert second.count(">rated<") == 1 and second.count(">open<") == 19
        assert rater.get("/pairs?page=99").text.count('class="open"') == 19


def test_shortcuts_can_be_turned_off(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        rater = visitor(database, "Kim")
        assert "<script" in rater.get("/pairs/1").text
        rater.get("/start")
        rater.post("/shortcuts", on="0")
        assert "Turn keyboard shortcuts on" in rater.page.text
        assert "<script" not in rater.get("/pairs/1").text and "<kbd" not in rater.page.text


# ---- tokens and sessions


def test_without_a_token_every_page_is_the_login(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        stranger = Visitor(database)
        for path in ("/", "/start", "/next", "/pairs", "/pairs/1", "/go?pair=1", "/finish"):
            assert stranger.get(path).url.path == "/login"
        assert stranger.client.post("/pairs/1", data={"preference": "equal"}).url.path == "/login"


def test_only_digests_of_tokens_and_sessions_are_on_the_disk(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        token = raters.invite(database, "Kim")
        rater = Visitor(database)
        rater.log_in(token)
        session = rater.client.cookies["session"]
        files = list((tmp_path / "study").iterdir())
        content = b"".join(path.read_bytes() for path in files)
        assert token.encode() not in content and session.encode() not in content
        assert (tmp_path / "study").stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


@pytest.mark.parametrize("tls", [False, True])
def test_the_session_is_for_no_script_no_other_site_and_with_tls_for_tls_only(tmp_path: Path, tls: bool) -> None:
    with study(tmp_path, 2) as database:
        rater = Visitor(database, tls)
        rater.get("/login")
        rater.client.follow_redirects = False
        token = raters.invite(database, "Kim")
        answer = rater.client.post("/login", data={"form": rater.hidden(), "token": token})
        cookie = next(value for value in answer.headers.get_list("set-cookie") if "session=" in value)
        assert cookie.startswith("__Host-session=" if tls else "session=")
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and ("Secure" in cookie) == tls


def test_a_second_browser_is_told_and_takes_over_only_when_it_says_so(tmp_path: Path) -> None:
    with study(tmp_path, 3) as database:
        token = raters.invite(database, "Kim")
        first, second = Visitor(database), Visitor(database)
        first.log_in(token)
        first.rate(1, "equal")
        answer = second.log_in(token)
        assert answer.status_code == 409 and "in use in another browser" in answer.text
        assert second.get("/pairs/1").url.path == "/login"  # not in yet
        assert first.get("/pairs/2").status_code == 200  # and the first still is
        second.log_in(token)
        assert second.post("/takeover", ticket=second.hidden("ticket")).url.path == "/start"
        assert "You have rated 1 of" in second.page.text
        first.client.follow_redirects = True
        assert "somebody went on with your token in another browser" in first.get("/pairs/2").text
        actions = [entry.action for entry in database.trail() if entry.rater == 1]
        assert actions == ["invited", "logged in", "rated", "taken over"]


def test_a_ticket_to_take_over_is_for_one_rater_one_session_and_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with study(tmp_path, 3) as database:
        token, lee = raters.invite(database, "Kim"), visitor(database, "Lee")
        Visitor(database).log_in(token)
        second, third = Visitor(database), Visitor(database)
        second.log_in(token)
        third.log_in(token)
        number, until, proof = second.hidden("ticket").split(".")
        for ticket in (
            f"2.{until}.{proof}",
            f"{number}.{int(until) + 9}.{proof}",
            f"{number}.{until}.{'0' * 64}",
            "",
            "1",
        ):
            answer = second.client.post("/takeover", data={"form": second.hidden(), "ticket": ticket})
            assert answer.status_code == 409, ticket
        third.post("/takeover", ticket=third.hidden("ticket"))
        assert (
            second.post("/takeover", ticket=f"{number}.{until}.{proof}").status_code == 409
        )  # the session has changed
        assert third.get("/start").url.path == lee.get("/start").url.path == "/start"
        second.log_in(token)
        monkeypatch.setattr("wardround.server.review.app.time.time", lambda: float(until) + 3600)
        assert second.post("/takeover", ticket=second.hidden("ticket")).status_code == 409


def test_after_logging_out_or_twelve_hours_nobody_has_to_be_taken_over(tmp_path: Path) -> None:
    with study(tmp_path, 3) as database:
        token = raters.invite(database, "Kim")
        first, second = Visitor(database), Visitor(database)
        first.log_in(token)
        first.post("/logout")
        assert "You are logged out." in first.page.text and first.get("/start").url.path == "/login"
        assert second.log_in(token).url.path == "/start"
        with database.transaction():
            database.write("UPDATE raters SET seen = seen - ?", raters.SESSION_S + 1)
        assert second.get("/start").url.path == "/login"
        assert first.log_in(token).url.path == "/start"


def test_a_new_token_ends_the_old_one_and_its_session_and_keeps_the_ratings(tmp_path: Path) -> None:
    with study(tmp_path, 3) as database:
        old = raters.invite(database, "Kim")
        rater = Visitor(database)
        rater.log_in(old)
        rater.rate(1, "equal")
        new = raters.invite_again(database, "kim")
        assert rater.get("/start").url.path == "/login"
        assert rater.log_in(old).status_code == 401
        assert "You have rated 1 of" in rater.log_in(new).text


def test_wrong_tokens_are_slowed_down_by_address_and_noted_once(tmp_path: Path) -> None:
    with study(tmp_path, 3) as database:
        token, stranger = raters.invite(database, "Kim"), Visitor(database)
        assert {stranger.log_in(f"wr-{number}").status_code for number in range(10)} == {401}
        assert stranger.log_in("wr-10").status_code == stranger.log_in(token).status_code == 429
        assert [entry.action for entry in database.trail()].count("wrong tokens") == 1


def test_tries_are_forgotten_after_their_window_and_addresses_beyond_a_number() -> None:
    tries = Tries(limit=2, window_s=0.0)
    assert not tries.wrong("a") and not tries.wrong("a") and not tries.exhausted("a")
    tries = Tries(limit=2)
    tries._MAX_ADDRESSES = 3
    assert not tries.wrong("a") and tries.wrong("a") and tries.exhausted("a") and not tries.exhausted("b")
    for address in "bcde":
        tries.wrong(address)
    assert not tries.exhausted("a") and len(tries._wrong) == 3
