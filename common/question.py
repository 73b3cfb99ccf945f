r"""A multiple-choice question, its prompt, and parsing an answer: the same code trains and evaluates.

Runs at the sites (training, held-out evaluation) and at the coordinator (public warm-up, reports on public registries).
What enters: rendered questions (client/questions.py) and a prompt template (configs/prompts/*.toml). What leaves: chat
messages for the local model. A `Question` holds a patient's record, so it never leaves a hospital.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from .config import Frozen, packaged, parse, read_toml
from .errors import ConfigError

LETTERS = "ABCDEFGHIJ"
USUAL_LEVELS = 3  # most levels of which a question says how usual they are


@dataclass(frozen=True, slots=True)
class Question:
    """One masked feature or outcome of one patient, as the model sees it.

    Attributes:
        target: the masked feature's or outcome's name in the dictionary.
        section: its section.
        kind: what is asked.
        text: the whole user message: record, question, options.
        options: the values offered, in letter order, without letter or unit; 2 to 10, all different.
        answer: index of the truth in `options`.
        majority: index of the option that is most frequent (levels) or densest (numbers) under the schema: the baseline
            that knows the registry but not the patient.
    """

    target: str
    section: str
    kind: Literal["feature", "outcome"]
    text: str
    options: tuple[str, ...]
    answer: int
    majority: int


# Which placeholders each format of a template may use; everything else in a template is taken literally.
_PLACEHOLDERS: Mapping[str, frozenset[str]] = {
    "section": frozenset({"section"}),
    "line": frozenset({"label", "value", "unit"}),
    "masked": frozenset({"label", "unit"}),
    "question": frozenset({"label", "unit", "section"}),
    "outcome": frozenset({"label", "question"}),
    "usual_number": frozenset({"middle", "low", "high", "unit"}),
    "usual_levels": frozenset({"levels"}),
    "option": frozenset({"letter", "value", "unit"}),
    "user": frozenset({"record", "question", "options"}),
}
_REQUIRED: Mapping[str, frozenset[str]] = {
    "line": frozenset({"label", "value"}),
    "question": frozenset({"label"}),
    "option": frozenset({"letter", "value"}),
    "user": frozenset({"record", "question", "options"}),
}


class PromptTemplate(Frozen):
    r"""How a question is worded: data, from configs/prompts/<name>.toml; one code path formats every language.

    `section`, `line`, `masked`, `question`, `outcome`, `usual_number`, `usual_levels`, `option` and `user` are
    `str.format` strings ("{{" is a brace); `{unit}` comes with a space before it, or is empty. `masked`, `section` and
    the two of what is usual may be empty: nothing is written then. Missing values are never written: a record says what
    is known.
    """

    name: str
    language: str
    system: str  # the system message, literal
    section: str = ""  # heading of a section; empty: no headings
    line: str  # one feature of the record
    masked: str = ""  # the target's own line in the record; empty: left out
    separator: str = "\n"  # between the record's parts
    question: str  # asks for a masked feature
    outcome: str = "{question}"  # asks for an outcome; {question} is the dictionary's own text
    # Written after the question: what is usual of the target among all patients, by the published schema, as a
    # laboratory prints its reference range. Both or neither.
    usual_number: str = ""  # its densest value, and the range of the middle two thirds
    usual_levels: str = ""  # its most frequent levels with their shares
    option: str  # one option
    option_separator: str = "\n"
    user: str  # the user message
    cue: str  # assistant prefill of a reasoning answer, literal
    forced: str  # assistant prefill of an answer without reasoning, and appended where no box came; ends in \boxed{

    @model_validator(mode="after")
    def formats_use_known_placeholders(self) -> Self:
        for key, allowed in _PLACEHOLDERS.items():
            text: str = getattr(self, key)
            try:
                text.format(**dict.fromkeys(allowed, ""))
            except (KeyError, IndexError, ValueError) as error:
                names = ", ".join(f"{{{name}}}" for name in sorted(allowed))
                raise ValueError(f"{key}: expected only {names} as placeholders, got {text!r} ({error!r})") from None
            for name in _REQUIRED.get(key, frozenset()):
                if f"{{{name}}}" not in text:
                    raise ValueError(f"{key}: expected the placeholder {{{name}}}, got {text!r}")
        return self

    @model_validator(mode="after")
    def numbers_and_levels_both_say_what_is_usual(self) -> Self:
        if bool(self.usual_number) != bool(self.usual_levels):
            raise ValueError("usual_number, usual_levels: expected both or neither")
        return self

    @property
    def says_usual(self) -> bool:
        """Whether questions say what is usual of their target."""
        return bool(self.usual_number)

    def usual_shares(self, shares: Sequence[tuple[str, float]]) -> str:
        """What is written of levels with these frequencies, the most frequent first."""
        first = sorted(shares, key=lambda item: -item[1])[:USUAL_LEVELS]
        return self.usual_levels.format(levels=", ".join(f"{level} {100 * share:.0f} %" for level, share in first))

    @model_validator(mode="after")
    def forced_answer_opens_a_box(self) -> Self:
        if not self.forced.endswith("\\boxed{"):
            raise ValueError(f"forced: expected to end in '\\boxed{{', got {self.forced!r}")
        return self

    def digest(self) -> str:
        """SHA-256 hex of the content: a run names its prompt, and a file of that name may have been edited."""
        return hashlib.sha256(b"wardround prompt 1\0" + self.model_dump_json().encode()).hexdigest()


def load_prompt(name_or_path: str | Path) -> PromptTemplate:
    """A template by its name in configs/prompts ("en") or by the path of a TOML file.

    Raises:
        ConfigError: no such template; unknown key or placeholder.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = packaged("prompts", f"{name_or_path}.toml")
        if not path.exists():
            shipped = ", ".join(sorted(item.stem for item in packaged("prompts", "").glob("*.toml")))
            raise ConfigError(f"prompt '{name_or_path}': no such template; shipped are {shipped}, or give a .toml path")
    return parse(PromptTemplate, read_toml(path), str(path))


def chat(template: PromptTemplate, question: Question) -> list[dict[str, str]]:
    """The messages before the assistant's turn: system (where the template has one), then user."""
    messages = [{"role": "system", "content": template.system}] if template.system else []
    return [*messages, {"role": "user", "content": question.text}]


def prefill(template: PromptTemplate, reasoning: bool) -> str:
    r"""How the assistant's turn begins: the step-by-step cue, or (answer-only) the text up to an open `\boxed{`."""
    return template.cue if reasoning else template.forced


_BOX = re.compile(r"\\boxed\s*\{")
# Styles that models put around a letter; taken off before it is read.
_STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|bf|rm)\b")
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:,;)].*)?\s*", re.DOTALL)


def parse_answer(text: str, n_options: int) -> int | None:
    r"""The option that a completion chose: the last `\boxed{…}` counts, whatever boxes came before it.

    Args:
        text: the assistant's turn. A box left open at the end is read to the end (a forced answer may be one letter and
            nothing more).
        n_options: how many options the question has, 2 to 10.

    Returns:
        The index of the option, or None: no box, or the last one holds no letter of an option.

    >>> parse_answer(r"It is \boxed{A}? No: \boxed{\text{B. 3.5}}", 5)
    1
    >>> parse_answer(r"\boxed{C}", 2) is None
    True
    """
    found = boxes(text)
    if not found:
        return None
    letter = _LETTER.fullmatch(found[-1][2])
    if letter is None:
        return None
    index = LETTERS.find(letter[1].upper())
    return index if 0 <= index < n_options else None


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content without styles) of every `\boxed{…}` of a text, in order.

    >>> boxes(r"\boxed{\text{B}} or \boxed{C")
    [(0, 16, 'B'), (20, 28, 'C')]
    """
    found: list[tuple[int, int, str]] = []
    for box in _BOX.finditer(text):
        content = _balanced(text[box.end() :])
        plain = re.sub(r"[{}$*`\s]+", " ", _STYLE.sub("", content)).strip()
        found.append((box.start(), min(len(text), box.end() + len(content) + 1), plain))
    return found


def _balanced(text: str) -> str:
    """`text` up to the brace that closes a box opened just before it."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return text
