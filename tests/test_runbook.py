"""docs/runbook.md quotes the program: every line and code in it is written by the source, so that it cannot rot.

And every command that it and the two pages on deployment name is one that the command line takes.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest
from wardround.common import errors
from wardround.common.errors import SumError, WardroundError

from .test_docker import resolve

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "runbook.md").read_text("utf-8")
CHANGES = "\0"
# What stands for what changes. All other capitals are the program's own.
PLACEHOLDER = re.compile(r"\b(?:NAME|PATH|ADDRESS|DATE|WHY|N)\b")
FORMATTED = re.compile(r"%[.\d]*[sdrf]")


def rows() -> Iterator[tuple[str, str]]:
    """(heading, first cell) of every row of every table, without the head rows."""
    heading, table = "", False
    for line, following in pairwise([*TEXT.splitlines(), ""]):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            table = False
        elif set(line) <= set("|- "):
            table = True
        elif table:
            yield heading, line.split("|")[1].strip()
        else:
            assert set(following) <= set("|- "), f"no table: {line}"


def quoted() -> list[str]:
    """Every line that the runbook quotes."""
    return [
        code for heading, cell in rows() if heading != "Codes of hospitals" for code in re.findall(r"`([^`]+)`", cell)
    ]


def literals(file: Path) -> Iterator[str]:
    """Every text in a source file, with a mark for what is put in."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else CHANGES
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield FORMATTED.sub(CHANGES, node.value)


@pytest.fixture(scope="module")
def source() -> str:
    files = [file for folder in ("client", "server", "common") for file in sorted((ROOT / folder).rglob("*.py"))]
    return "\n".join(text for file in files for text in literals(file))


@pytest.mark.parametrize("line", quoted())
def test_every_quoted_line_is_written_by_the_program(source: str, line: str):
    fixed = PLACEHOLDER.sub(CHANGES, line)
    assert len(re.findall(r"[A-Za-z_]{2,}", fixed)) >= 2, "too little to be told by"
    assert fixed in source, line


def test_the_runbook_quotes_enough_to_be_one():
    assert len(quoted()) >= 40 and len(set(quoted())) == len(quoted())


def kinds(kind: type[WardroundError] = WardroundError) -> Iterator[str]:
    yield kind.code
    for one in kind.__subclasses__():
        yield from kinds(one)


def test_every_code_of_a_hospital_is_one_that_the_program_has():
    named = [
        code for heading, cell in rows() if heading == "Codes of hospitals" for code in re.findall(r"`(.+?)`", cell)
    ]
    known = {*kinds(errors.WardroundError), *SumError.WORDS, "silent", "transport", "site", "bundle"}
    assert named and set(named) <= known and len(set(named)) == len(named)
    for code in ("silent", "transport", "site", "bundle", "refused", "config", "ledger-behind", "other-roster"):
        assert code in named, f"{code} needs a person"


def test_every_link_of_the_runbook_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        name, _, anchor = target.partition("#")
        text = TEXT if not name else (ROOT / "docs" / name).read_text("utf-8")
        heads = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()
                 if line.startswith("#")]  # fmt: skip
        assert not anchor or anchor in heads, target


def blocks(text: str) -> list[str]:
    """The lines of a document's blocks of commands, comments cut off."""
    found = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    return [line.split(" # ")[0].strip() for line in found.splitlines()]


def commands(text: str) -> list[str]:
    """Every whole `wardround …` command of a document: those in blocks, and those in the text that name an action."""
    spans = re.findall(r"`(wardround [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for line in blocks(text) if line.startswith("wardround ")]
    return [*lines, *(span for span in spans if "…" not in span and len(span.split()) > 2)]


@pytest.mark.parametrize("name", ["deployment.md", "deployment-site.md", "runbook.md"])
def test_every_command_of_the_pages_is_one_that_the_command_line_takes(name: str):
    text = (ROOT / "docs" / name).read_text("utf-8")
    found = commands(text)
    assert len(found) >= 8
    for line in found:
        words = shlex.split(line)[1:]
        try:
            assert resolve(words)
        except click.MissingParameter:  # of a command that the text only names
            assert line not in blocks(text), line
        except click.ClickException as error:
            pytest.fail(f"{line}: {error.format_message()}")
