r"""Wordings of clean and of defective reasoning, for planted truths (planted_reasoning.py).

Two sets that share no sentence. `TUNED` may be looked at while the rules of `wardround.common.reasoning` are changed;
`HELD_OUT` was written before those rules; what they miss there is left missed, and only one step back that it showed
(in "isn't present") was undone. Both are by the author of the rules: a model's own sentences are stranger than either.

Slots: {label} of a feature as one writes it, {value} of a number or level with its {unit} (" mg/dL" or empty), {low},
{high}, {other} numbers that are no patient's, {letter} of an option, {condition} a yes/no feature, {age}, {noun}.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """Sentences by what they do; each a tuple of templates.

    Attributes:
        who: age and sex in one phrase.
        number: states a number; `yes`, `no`: state that a condition is there or not; `level`: states a level.
        given: states a masked value as if the record showed it.
        general: speaks of a feature in general, or of what would be: says nothing about this patient.
        unknown: says that a feature is not in the record.
        weigh: weighs an option without deciding; `rule_out`, `keep`, `conclude`: decide.
        filler: says nothing that could be checked.
        box: the answer.
        first: gives the answer's letter before any reason; `several`: more than one box ({letter}, {second}).
        no_option: names a letter that no option has.
        repeated: what a model that has got stuck repeats.
        bare: an answer without a reason.
    """

    who: tuple[str, ...]
    number: tuple[str, ...]
    yes: tuple[str, ...]
    no: tuple[str, ...]
    level: tuple[str, ...]
    given: tuple[str, ...]
    general: tuple[str, ...]
    unknown: tuple[str, ...]
    weigh: tuple[str, ...]
    rule_out: tuple[str, ...]
    keep: tuple[str, ...]
    conclude: tuple[str, ...]
    filler: tuple[str, ...]
    box: tuple[str, ...]
    first: tuple[str, ...]
    several: tuple[str, ...]
    no_option: tuple[str, ...]
    repeated: tuple[str, ...]
    bare: tuple[str, ...]


TUNED = Wordings(
    who=(
        "A {age}-year-old {noun} is described.",
        "The patient is a {age} year old {noun}.",
        "This {noun} is {age} years old.",
    ),
    number=(
        "The {label} is {value}{unit}.",
        "{label}: {value}{unit}.",
        "The patient's {label} was {value}{unit}, as I read it.",
        "With a {label} of {value}{unit}, the patient looks unwell.",
        "{label} ({value}{unit}) deserves attention.",
        "We see {label} = {value}{unit}.",
        "A {label} of {value}{unit} stands out.",
        "The {label} is markedly abnormal at {value}{unit}.",
        "Looking at the record, {label} {value}{unit} is listed.",
        "The {label} was recorded as {value}{unit}, which matters here.",
        "First, {label} is given as {value}{unit}.",
        "The {label} of {value}{unit} suggests that the illness is severe.",
    ),
    yes=(
        "The patient has {label}.",
        "There is a history of {label}.",
        "{label}: yes.",
        "{label} is present.",
        "This is a patient with {label}.",
        "Since the patient has known {label}, the risk is raised.",
        "{label} = yes.",
        "{label} (yes) is relevant.",
    ),
    no=(
        "The patient has no {label}.",
        "There is no history of {label}.",
        "{label}: no.",
        "{label} is absent.",
        "The patient does not have {label}.",
        "Without {label}, the risk is lower.",
        "{label} = no.",
    ),
    level=(
        "{label}: {value}.",
        "The {label} is {value}.",
        "{label} is recorded as {value}.",
        "{label} ({value}) is known.",
        "We know that {label} = {value}.",
    ),
    given=(
        "The record shows a {label} of {value}{unit}.",
        "{label} is recorded as {value}{unit}.",
        "Given the {label} of {value}{unit}, the rest is clear.",
        "According to the record, {label} is {value}{unit}.",
        "The {label} is listed as {value}{unit}.",
    ),
    general=(
        "A normal {label} is between {low} and {high}{unit}.",
        "{label} above {other}{unit} would suggest trouble.",
        "Usually {label} is around {other}{unit} in such patients.",
        "In patients with {condition}, outcomes tend to be worse.",
        "{condition} is a risk factor for many complications.",
        "If {label} were {other}{unit}, things would differ.",
        "A {label} below {other}{unit} points to disease.",
        "The normal range of {label} is {low}-{high}{unit}.",
    ),
    unknown=(
        "{label} is not given.",
        "The record does not mention {label}.",
        "We do not know the {label}.",
    ),
    weigh=(
        "Option {letter} ({value}{unit}) seems rather low.",
        "{letter}. {value}{unit} is possible.",
        "A {label} of {value}{unit} would be high.",
        "Option {letter} is {value}{unit}.",
        "The {label} may be {value}{unit}, but I am not sure.",
    ),
    rule_out=(
        "Option {letter} can be ruled out.",
        "We can eliminate {letter}.",
        "{letter} is unlikely.",
        "{value}{unit} would be far too extreme.",
        "The answer is not {letter}.",
    ),
    keep=(
        "Only {letter} remains.",
        "That leaves {letter}.",
        "This leaves option {letter} as the best choice.",
    ),
    conclude=(
        "Therefore, the answer is {letter}.",
        "So the most likely value is {value}{unit}.",
        "Thus option {letter} is the best choice.",
        "I choose {letter}.",
        "Hence, the {label} is most likely {value}{unit}.",
        "The correct answer is {letter}: {value}{unit}.",
    ),
    filler=(
        "Let me go through the findings one by one.",
        "The whole picture is that of a seriously ill patient.",
        "Several of these findings go together.",
        "Taken together, the prognosis is guarded.",
        "I compare this with the options.",
    ),
    box=(
        "The answer is \\boxed{{{letter}}}.",
        "\\boxed{{{letter}}}",
        "Therefore, the answer is \\boxed{{{letter}}}",
    ),
    first=(
        "\\boxed{{{letter}}}. The reason is as follows.",
        "The answer is {letter}.",
        "Answer: {letter}",
    ),
    several=(
        "\\boxed{{{letter}}} \\boxed{{{second}}}",
        "It is \\boxed{{{letter}}} or \\boxed{{{second}}}.",
    ),
    no_option=(
        "The answer is \\boxed{{{letter}}}.",
        "Option {letter} fits.",
    ),
    repeated=(
        "The patient is in a serious condition. ",
        "The patient has a history of illness and ",
    ),
    bare=(
        "",
        "\\boxed{{{letter}}}",
        "The answer is \\boxed{{{letter}}}.",
    ),
)

HELD_OUT = Wordings(
    who=(
        "We have a {noun} aged {age}.",
        "{age} y/o {noun} in hospital.",
        "The {noun} in question is {age}.",
    ),
    number=(
        "{label} came back at {value}{unit}.",
        "Note the {label}, which stands at {value}{unit}.",
        "The {label} measured {value}{unit}.",
        "* {label} → {value}{unit}",
        "There is a {label} reading of {value}{unit}.",
        "The record puts the {label} at {value}{unit}.",
        "Because {label} equals {value}{unit}, I think about organ function.",
        "Turning to {label}, the figure is {value}{unit}.",
        "At {value}{unit}, the {label} is of interest.",
        "A value of {value}{unit} was found for {label}.",
        "{label} - {value}{unit}.",
        "The {label} happens to be {value}{unit}.",
        "**{label}**: {value}{unit}",
        "In short: {label} {value}{unit}; nothing else is remarkable.",
    ),
    yes=(
        "The patient also suffers from {label}.",
        "{label} is documented as yes.",
        "Underlying {label} is noted.",
        "The patient is positive for {label}.",
        "The patient's {label} complicates matters.",
        "{label} yes; this raises the risk.",
        "Known for {label}.",
        "Among the comorbidities we find {label}.",
    ),
    no=(
        "{label} is marked as no.",
        "The patient was never diagnosed with {label}.",
        "The record is negative for {label}.",
        "{label} no; this lowers the risk.",
        "The patient is free of {label}.",
        "There's no evidence of {label}.",
        "{label} isn't present.",
        "Neither {label} nor anything like it is found.",
    ),
    level=(
        "For {label} the record says {value}.",
        "{label} → {value}.",
        "The entry for {label} reads {value}.",
        "{label}, listed as {value}, matters.",
        "{label} was {value}.",
    ),
    given=(
        "As documented, {label} is {value}{unit}.",
        "Since the chart states {label} {value}{unit}, the rest follows.",
        "We are told that {label} is {value}{unit}.",
        "From the notes: {label} {value}{unit}.",
        "Because of the {label} of {value}{unit}, I think of organ failure.",
    ),
    general=(
        "Healthy adults have a {label} of {low} to {high}{unit}.",
        "One would expect {label} near {other}{unit} in a healthy person.",
        "Values of {label} over {other}{unit} are concerning.",
        "A {label} of {other}{unit} or more is associated with death.",
        "People with {condition} often do badly.",
        "{condition} could explain some of this.",
        "Had the {label} been {other}{unit}, I would worry more.",
        "Typical {label}: {low} to {high}{unit}.",
    ),
    unknown=(
        "No information on {label} is available.",
        "{label} was not measured.",
        "There's nothing about {label} in the record.",
    ),
    weigh=(
        "Choice {letter}, {value}{unit}, looks extreme.",
        "{value}{unit} as {label} would surprise me.",
        "Could the {label} be {value}{unit}? Possibly.",
        "Considering {letter}: {value}{unit} is plausible.",
    ),
    rule_out=(
        "{letter} does not fit the picture.",
        "I discard {letter}.",
        "{letter} makes no sense here.",
        "Option {letter} is off the table.",
        "{letter} is implausible.",
    ),
    keep=(
        "{letter} is the only one left.",
        "We are left with {letter}.",
    ),
    conclude=(
        "All things considered, I'd go with {letter}.",
        "My best guess is {value}{unit}.",
        "{letter} fits best.",
        "The findings point to option {letter}.",
        "{value}{unit} is the most plausible {label}.",
        "That makes {letter} the right answer.",
        "I settle on {letter} ({value}{unit}).",
        "I estimate the {label} at {value}{unit}.",
    ),
    filler=(
        "Step by step, then.",
        "All this fits a patient under considerable strain.",
        "It is hard to say more without an examination.",
        "On balance the patient is frail.",
        "What do the options offer?",
    ),
    box=(
        "Final answer: \\boxed{{\\text{{{letter}}}}}",
        "$\\boxed{{{letter}}}$",
        "So: \\boxed{{{letter}.}}",
    ),
    first=(
        "{letter}. Here is why.",
        "**{letter}** because the findings agree.",
        "$\\boxed{{{letter}}}$\n\nExplanation:",
    ),
    several=(
        "\\boxed{{{letter}, {second}}}",
        "Possible answers: \\boxed{{{letter}}} and \\boxed{{{second}}}.",
        "\\boxed{{{letter}}}\n\\boxed{{{second}}}",
    ),
    no_option=(
        "So: \\boxed{{\\text{{{letter}}}}}",
        "I'd go with choice {letter}.",
    ),
    repeated=(
        "Next, consider the options again.\n",
        "so the patient is ill, ",
        "Age and sex: ",
    ),
    bare=(
        "\n\n",
        "$\\boxed{{\\text{{{letter}}}}}$",
        "I don't know. \\boxed{{{letter}}}",
    ),
)
