r"""English phrases between a name and its value, and around them: what makes a statement of it, and what does not.

Read by common/claims.py. Data of the rules, not of any patient.
"""

from __future__ import annotations

import re


def _any(*words: str) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(words) + r")\b", re.IGNORECASE)


# Before a name in its sentence: what follows is not said of this patient as a fact.
NOT_SAID = _any(
    r"if", r"suppos\w+", r"imagin\w+", r"assum\w+", r"unless", r"whether", r"would", r"should", r"could", r"might",
    r"may",
    r"can(?! be seen)", r"expect\w*", r"usual\w*", r"typical\w*", r"normally", r"healthy", r"reference",
    r"in general",
    r"generally", r"often", r"frequently", r"commonly", r"options?", r"choices?", r"alternatives?", r"likely",
    r"unlikely",
    r"probabl[ey]", r"perhaps", r"possibl[ey]", r"maybe", r"plausible", r"estimat\w+", r"guess\w*", r"predict\w*",
    r"patients (?:with|who|whose|having|aged)",
    r"(?:people|persons|individuals|those|adults|men|women|anyone|someone)",
    r"had (?:the|his|her|their|this)", r"were (?:the|his|her)", r"values? of [^.;]* (?:over|above|below|under)",
    r"population", r"study|studies|literature", r"scores? (?:range|from)",
)  # fmt: skip
# Right before a name: "past the age of 20".
COMPARED = re.compile(
    r"\b(?:past|over|above|under|below|beyond|until|before|after|than|by)\s+(?:the |an? )?$", re.IGNORECASE
)
# Between a name and its value, or right after it.
BREAKS = _any(
    r"would", r"should", r"could", r"might", r"may", r"can", r"if", r"were", r"expect\w*", r"usual\w*", r"typical\w*",
    r"normally", r"range\w*", r"reference", r"average", r"mean", r"median", r"between", r"above", r"below", r"over",
    r"under", r"than", r"exceed\w*", r"least", r"most", r"up to", r"not", r"unknown", r"masked", r"missing",
    r"cut-?off",
    r"threshold", r"limit", r"target", r"goal", r"options?", r"choices?", r"answers?", r"likely", r"probabl[ey]",
    r"perhaps", r"possibl[ey]", r"maybe", r"estimat\w*", r"guess\w*", r"predict\w*", r"assum\w*", r"suggest\w*",
    r"impl(?:y|ies)", r"indicat\w*", r"associat\w*", r"correlat\w*", r"affect\w*", r"cause[sd]?", r"by", r"per",
    r"every",
    r"after", r"before", r"and", r"or", r"but", r"points? to", r"from", r"because", r"since", r"while", r"with",
)  # fmt: skip
AFTER = re.compile(
    r"^[\s,)]*(?:\([^)]*\)\s*)?(?:\w+\s+)?(?:would|could|might|may|should|"
    r"or (?:more|less|higher|lower|above|below|over)|and (?:above|over|below|older|more)|\+|(?:is|are) (?:usually|"
    r"often|typically|commonly|generally|considered|associated|normal(?! f)|possible|plausible|likely|unlikely|too|"
    r"the (?:most|best|normal|usual)))",
    re.IGNORECASE,
)
ABOUT = re.compile(r"\b(?:about|around|approximately|approx|roughly|nearly|almost|close to|circa|some)\b|[~≈]", re.I)
NO_VALUE = re.compile(r"(?:day|option|grade|class|type|stage|step|answer|choice|number|line|item)\s*$", re.IGNORECASE)
COMMA = re.compile(
    r",\s*(?:which|who|that|at|of|measured|recorded|listed|given|noted|reported|documented|now|the (?:figure|"
    r"value|reading)|"
    r"is|was|i\.e\.)\b|,\s*$",
    re.IGNORECASE,
)
UNKNOWN = re.compile(
    r"\b(?:not|n't|never)\s+(?:been\s+|be\s+|explicitly\s+|directly\s+)?(?:given|mentioned|recorded|reported|stated|"
    r"known|available|provided|specified|documented|measured|listed|shown|noted|assessed|clear|in the record)\b|"
    r"\b(?:unknown|missing|masked|unavailable|unclear|hidden|unspecified)\b",
    re.IGNORECASE,
)
UNKNOWN_BEFORE = re.compile(
    r"\b(?:not|n't)\s+(?:know|mention|state|say|give|list|report|include|show|specify|provide|tell)\w*|"
    r"\bno (?:information|"
    r"data|mention|details?|values?|record)\b|\bnothing (?:about|on)\b|\b(?:unknown|missing|masked)\b|"
    r"\bwithout knowing\b",
    re.IGNORECASE,
)

# Words that may stand between what says yes or no and the name.
FILL = (
    r"(?:\s+(?:a|an|the|any|his|her|their|this|known|prior|previous|past|current|clear|documented|recorded|reported|"
    r"history|diagnosis|evidence|signs?|presence|symptoms|of|from|for|with|to|been|have|has|had|having|be|is|was|"
    r"diagnosed|suffer\w*|severe|mild|chronic|acute|long-?standing|established|active|significant|notable|such|also|"
    r"comorbid\w*|underlying|pre-?existing|medical|personal))*\s+"
)
LISTED = r"(?:§\s*(?:\([^)]*\)\s*)?(?:,\s*(?:and|or|nor)?|and|or|nor|/)\s*(?:the |a |an |any |his |her )?)*$"
_OTHER_WORD = r"(?!(?:but|has|have|had|is|was|with|which|who|and|so|the|he|she|patient)\b)[\w§'-]+"
_OTHER = rf"{_OTHER_WORD}(?:\s{_OTHER_WORD}){{0,2}}"
NONE_OF = rf"(?:{_OTHER},\s*)*{_OTHER},?\s(?:or|nor)\s+(?:any |a |an )?$"  # "no fever, stroke or (diabetes)"
DENIES = re.compile(
    r"(?:\bno\b|\bnot\b|n't|\bwithout\b|\bnever\b|\babsence of\b|\bnegative for\b|\bfree (?:of|from)\b|"
    r"\bden(?:ies|ied)\b|"
    r"\blacks?\b|\bneither\b|\bnor\b|\bnone of\b|\brul(?:es?|ed) out\b|\bnon-?)"
    + rf"(?:{FILL}|\s*)(?:{NONE_OF}|{LISTED})",
    re.IGNORECASE,
)
AFFIRMS = re.compile(
    r"(?:\b(?:has|have|had|having)\b|\bsuffer\w* from\b|\bhistory of\b|\bdiagnos(?:ed with|is of)\b|"
    r"\bknown (?:for|to have|"
    r"with)?|\bpositive for\b|\bpresence of\b|\bpresent(?:s|ed|ing)? with\b|\badmitted (?:with|for)\b|"
    r"\bliv(?:es|ing) with\b|"
    r"\b(?:underlying|pre-?existing|comorbid|concomitant|coexisting|established|documented)\b|\b(?:his|her|their|the "
    r"patient's|patient's)\b|\bthere (?:is|was|are)\b|\bwe (?:find|see|have|note)\b|\b(?:includ(?:e|es|ing)|"
    r"shows?|notes?|"
    r"lists?|reports?|documents?|mentions?)\b|\b(?:patient|man|woman|male|female|lady|gentleman|old)(?: is|"
    r" was)?(?: a| an)? "
    r"with\b|\bis (?:a |an )?(?=$))" + f"(?:{FILL}|\\s*)" + LISTED,
    re.IGNORECASE,
)
SAYS = re.compile(
    r"(?:(?<!\w)(?:(?P<no>no(?=\s*(?:[.,;:)\]\"'?!]|$|\n|[^\x00-\x7f]|\b(?:and|but|which|so)\b))|none|absent|negative|"
    r"false|not\s+(?:present|there|found|seen)|excluded|denied)|(?P<yes>yes|present|positive|true|confirmed))|"
    r"(?P<not>n't\s+(?:present|there|found|seen)))(?!\w)",
    re.IGNORECASE,
)
MAY_BE = _any(
    r"would", r"could", r"might", r"may", r"can", r"should",
    r"is (?:a|an|one of the|the)?\s*(?:\w+\s)?(?:risk|cause|common|"
    r"strong|major|known)", r"often", r"usually", r"typically", r"generally", r"is associated", r"is linked", r"are",
    r"increases?", r"tends?",
)  # fmt: skip
# Between a number and the name it belongs to, where the number comes first.
OF_NAME = re.compile(
    r"\s*(?:(?:is|was|were|as|found|measured|recorded|seen|noted|given|listed|reported)\s+)*(?:for|as|of|on|in)\s+"
    r"(?:the |a |an |his |her |their |patient's )*$",
    re.IGNORECASE,
)
# How a case opens.
AGE = re.compile(
    r"(?<![\w.,])(\d{1,3})[\s-]*(?:years?|yrs?|yr|y)[\s-]*/?\s*(?:olds?|of age|o)\b|\baged?:?\s+(\d{1,3})\b(?![.,]\d)",
    re.IGNORECASE,
)
PERSON = {
    sex: re.compile(
        r"\b(?:a|an|the|this|our|old|y/?o|is|was)\s+(?:elderly |young |older |adult |white |black )?"
        rf"({nouns})\b(?! (?:sex|gender|patients|relative))",
        re.IGNORECASE,
    )
    for sex, nouns in (("male", "man|gentleman|male"), ("female", "woman|lady|female"))
}
