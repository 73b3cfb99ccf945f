"""Columns that may be known only after the outcome: death, discharge, length of stay, what a stay cost.

Run at one hospital. Reads what a dictionary says of a column (name, label, section, levels) and says what it looks
like, so that a draft sets it aside and `check` asks about it: shown in a record, it would give the outcome away. It is
a net with holes, for English, some German, Dutch, French and Korean; who knows the table still has to look. Where it is
wrong the other way, the dictionary says `not_outcome = true` for the column.
"""

from __future__ import annotations

import re
import unicodedata

from ..common.dictionary import Feature
from .identifiers import words_of

# What a name is made of, in lower case and with single spaces → what it is; the first that fits.
_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = tuple((kind, re.compile("|".join(forms))) for kind, forms in (
    ("a death", (
        r"death", r"deceas", r"mortal", r"fatal", r"lethal", r"autops", r"necrops",
        r"\b(?:in|ih|icu|(?:in)?hosp\w*)?(?:dead(?! ?space)|died|dies)\b", r"\bexpire[ds]?\b", r"\bdemise\b",
        r"\bexitus\b", r"\btod(?:es\w*)?\b", r"verstorben", r"gestorben", r"overleden", r"overlijden", r"sterfte",
        r"\bdece(?:s|d\w*)\b", r"\bmort(?:e|s)?\b", r"사망",
    )),
    ("a survival", (
        r"surviv", r"\bsurv\b", r"\balive\b", r"\bvital status\b", r"\bcensor", r"\b(?:pfs|dfs|efs|rfs)\b",
        r"\bos (?:time|days|months|years|event|status|flag)\b", r"uberleb", r"ueberleb", r"overlevi", r"\bsurvie\b",
        r"생존",
    )),
    ("an outcome", (
        r"\boutcomes?\b", r"\bend ?points?\b", r"prognos", r"\bmace\b", r"\bre ?admi[st]", r"\bre ?hospital",
        r"\bevents?\b", r"\brelaps", r"\brecurrence", r"\bprogression\b", r"\bcomplications?\b", r"\bkomplikation",
        r"\bcomplicaties?\b", r"\buitkomst", r"예후", r"재입원", r"재발", r"합병증",
    )),
    ("a discharge", (r"\bdisch", r"\bdispo(?:sition)?\b", r"\bentlass", r"\bontslag", r"퇴원")),
    ("a length of stay", (
        r"\b(?:s|h|icu|hosp\w*)?los\b", r"(?:length|duration) of (?:\w+ )?(?:stay|hospitali[sz]ation|admission)",
        r"length ?of ?stay", r"\bstay (?:length|duration|days)\b", r"\b(?:hospital|icu) (?:stay|days)\b",
        r"\bdays (?:in|of) (?:the )?(?:hospital|icu|stay)", r"\bfree days\b", r"verweildauer", r"liegedauer",
        r"aufenthaltsdauer", r"opnameduur", r"ligduur", r"\bduree de sejour\b", r"재원", r"입원 ?기간",
    )),
    ("a cost", (r"\bcosts?\b", r"\b(?:tot\w*)?cst\b", r"\bcharges?\b", r"\bkosten\b", r"비용")),
    ("a follow-up", (
        r"\bfollow ?up", r"\bfu ?(?:time|days|months|years|status)\b", r"\blost to\b", r"^time$", r"^status$",
        r"\b(?:time|days|months|years) (?:to|until) (?:event|first|last|end|failure)\b", r"nachbeobachtung", r"추적",
    )),
))  # fmt: skip
_LEVEL = re.compile(
    r"\b(?:dead|died|deceased|death|expired|alive|survived|discharged|hospice|follow[- ]?up)\b"
    r"|\b(?:verstorben|gestorben|overleden|decede)\b|사망|생존|퇴원"
)
ASKED = ("a death", "a survival", "an outcome")  # with levels these are outcomes; the rest follows from one


def by_name(text: str) -> str | None:
    """What a column's name, label or section says it holds, or None.

    >>> by_name("died_30d"), by_name("hospdead"), by_name("ICU_LOS"), by_name("Décès à J28"), by_name("퇴원 상태")
    ('a death', 'a death', 'a length of stay', 'a death', 'a discharge')
    >>> by_name("dead_space"), by_name("studied"), by_name("prothrombin_time"), by_name("vital_capacity")
    (None, None, None, None)
    """
    plain = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    plain = unicodedata.normalize("NFC", plain)  # Hangul in whole syllables again
    words = " ".join(words_of(plain)) + " " + "".join(c for c in plain if not c.isascii())
    return next((kind for kind, form in _NAMES if form.search(words.strip())), None)


def in_feature(feature: Feature) -> tuple[str, str] | None:
    """What a feature looks like, and by what (name, label, levels, section); or None.

    What a person has judged (`not_outcome`) looks like none.
    """
    if feature.not_outcome:
        return None
    texts = {"name": feature.name, "label": feature.label, "section": feature.section}
    kinds = [(kind, where) for where, text in texts.items() if (kind := by_name(text)) is not None]
    if any(_LEVEL.search(word.lower()) for level in feature.levels.items() for word in level):
        kinds.append(("a death", "levels"))
    # What can be asked goes first: a discharge with the level "died" is an outcome, not what follows from one.
    kinds.sort(key=lambda found: found[0] not in ASKED or found[1] == "section")
    return kinds[0] if kinds else None
