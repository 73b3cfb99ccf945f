"""Studies to review: a file of items, the pages over it, and a rater's browser without a browser."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from wardround.server.review import raters
from wardround.server.review.app import make_app
from wardround.server.review.database import Database
from wardround.server.review.items import read_study

MODELS = ("mimosa-7b", "omega-13b")  # words that are nowhere else
ORIGIN = "http://127.0.0.1:8421"


def item(number: int, **changes: Any) -> dict[str, Any]:
    """One item; each model's text is marked, so that a test knows whose it is, and no rater would."""
    marks = {
        model: {"text": f"{mark}-{number}: thus \\boxed{{A}}", "chosen": 0}
        for model, mark in zip(MODELS, "xy", strict=True)
    }
    return {
        "id": f"kept-{number:04d}",
        "section": "Laboratory" if number % 2 else "Vital signs",
        "target": "Lactate",
        "record": [
            {"section": "Vital signs", "label": "Heart rate", "value": 60 + number, "unit": "/min"},
            {"section": "Laboratory", "label": "Creatinine", "value": 1.20, "unit": "mg/dL"},
            {"section": "Vital signs", "label": "Temperature", "value": None, "unit": "°C"},
        ],
        "question": f"Which lactate was measured in case {number}?",
        "options": ["below 2", "2 or more"],
        "answers": marks,
    } | changes


def write_items(path: Path, items: list[dict[str, Any]], header: dict[str, Any] | None = None) -> Path:
    lines = [{"wardround_review": 1, "data": "synthetic", "title": "A study"} | (header or {}), *items]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def study(folder: Path, count: int = 20, share: float = 0.1, **changes: Any) -> Database:
    """A new review of `count` items."""
    path = write_items(folder / "items.jsonl", [item(number, **changes) for number in range(count)])
    return Database.create(folder / "study", read_study(path), share)


class Visitor:
    """A browser of one person: keeps cookies, follows redirects, sends the forms that pages hold."""

    def __init__(self, database: Database, tls: bool = False) -> None:
        origin = ORIGIN.replace("http:", "https:") if tls else ORIGIN
        self.client = TestClient(make_app(database, tls=tls), base_url=origin, follow_redirects=True)
        self.page = self.get("/")

    def get(self, path: str) -> Any:
        self.page = self.client.get(path)
        return self.page

    def hidden(self, name: str = "form") -> str:
        """A hidden field of the page that is open."""
        found = re.search(rf'name="{name}" value="([^"]*)"', self.page.text)
        assert found, self.page.text
        return unescape(found[1])

    def post(self, path: str, **fields: Any) -> Any:
        self.page = self.client.post(path, data={"form": self.hidden(), **fields}, headers={"Origin": ORIGIN})
        return self.page

    def log_in(self, token: str) -> Any:
        self.get("/login")
        return self.post("/login", token=token)

    def rate(self, number: int, preference: str, **fields: Any) -> Any:
        self.get(f"/pairs/{number}")
        return self.post(f"/pairs/{number}", preference=preference, **fields)

    def answers(self, number: int) -> list[str]:
        """The two texts of a pair, as they stand."""
        return re.findall(r'<div class="text" lang="en">([^<]*)</div>', self.get(f"/pairs/{number}").text)


def visitor(database: Database, name: str) -> Visitor:
    """Somebody who was invited and has logged in."""
    found = Visitor(database)
    assert found.log_in(raters.invite(database, name)).status_code == 200
    return found
