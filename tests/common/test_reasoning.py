r"""Flags of one completion (common/reasoning.py), sentence by sentence, over a small dictionary.

How often they are right on many texts is tests/simulations/test_planted_reasoning.py.
"""

import pytest
from wardround.common.dictionary import Dictionary, Feature
from wardround.common.question import Question, load_prompt
from wardround.common.reasoning import Flag, audit
from wardround.common.record import Record, record_of

YES_NO = {"0": "no", "1": "yes"}


def number(name: str, label: str, unit: str | None, low: float, high: float, decimals: int = 0) -> Feature:
    return Feature(name=name, label=label, section="S", kind="number", unit=unit, low=low, high=high, decimals=decimals)


def yes_no(name: str, label: str) -> Feature:
    return Feature(name=name, label=label, section="S", levels=YES_NO)


DICTIONARY = Dictionary(
    name="small",
    title="Small",
    features=(
        Feature(name="pid", label="Patient", role="id"),
        number("age", "Age", "years", 18, 100),
        Feature(name="sex", label="Sex", section="S", levels={"m": "male", "f": "female"}),
        number("hr1", "Heart rate, day 1", "beats/min", 20, 250),
        number("hr3", "Heart rate, day 3", "beats/min", 20, 250),
        number("crea", "Creatinine, day 1", "mg/dL", 0.2, 26, 1),
        number("temp", "Temperature, day 1", "°C", 27, 43, 1),
        number("urine", "Urine output", "mL/24h", 0, 9000),
        number("na", "Sodium", "mmol/L", 100, 185),
        number("bun", "Blood urea nitrogen", "mg/dL", 1, 200),
        Feature(name="smoking", label="Smoking", section="S", levels={"1": "never", "2": "former", "3": "current"}),
        Feature(name="coma", label="Coma score", section="S", levels={"0": "0 (awake)", "9": "9", "44": "44"}),
        Feature(
            name="cat", label="Disease category", section="S",
            levels={"s": "multi-organ failure with sepsis", "l": "lung cancer", "c": "congestive heart failure"},
        ),
        yes_no("diabetes", "Diabetes"),
        yes_no("ihd", "Ischaemic heart disease"),
        yes_no("af", "Atrial fibrillation"),
        yes_no("sepsis", "Sepsis diagnosis"),
        yes_no("stroke", "Previous stroke"),
        Feature(
            name="died", label="Hospital death", role="outcome", section="O", levels=YES_NO, known_at=3,
            question="Did the patient die in hospital?",
        ),
    ),
)  # fmt: skip
SHOWN = {
    "age": "72", "sex": "male", "hr1": "88", "hr3": "110", "crea": "2.3", "temp": "36.8", "urine": "1250",
    "smoking": "former", "coma": "9", "cat": "multi-organ failure with sepsis", "diabetes": "yes", "ihd": "no",
    "af": "no",
}  # fmt: skip


def asked(target: str = "na", options: tuple[str, ...] = ("131", "138", "145", "152", "124")) -> Record:
    shown = {name: value for name, value in SHOWN.items() if name != target}
    features = {feature.name: feature for feature in DICTIONARY.used}
    return Record(DICTIONARY.feature(target), shown, features, options)


DIED = ("no", "yes")


def kinds(text: str, record: Record | None = None, **rest: int) -> set[str]:
    """Kinds raised by a text that is padded to be some reasoning, and boxed as it says."""
    return {flag.kind for flag in audit(record or asked(), "Let me go through the findings first. " + text, **rest)}


@pytest.mark.parametrize("text", [
    "The patient is a 72-year-old man.",
    "A man aged 72 with a heart rate of 88 on day 1.",
    "Age: 72. Sex: male.",
    "Heart rate, day 1 was 88 beats/min and heart rate on day 3 was 110 bpm.",
    "The heart rate is 88.",  # which day is not said, and one day fits
    "Creatinine (2.3 mg/dL) is raised; the day 1 creatinine is about 2.4.",
    "The temperature is 37 °C.",  # rounded
    "The temperature is 36,8 °C and urine output is 1,250 mL/24h.",
    "He has no fever, headache, but diabetes is known.",
    "Known diabetes, no ischemic heart disease.",
    "The patient has no atrial fibrillation or ischaemic heart disease.",
    "Atrial fibrillation wasn't found, and diabetes is not absent.",
    "Diabetes: yes; atrial fibrillation: no.",
    "Smoking is former. He is a former smoker.",
    "The coma score is 9.",
    "This is a patient with sepsis.",  # other words of the record say so
    "The patient has multi-organ failure with sepsis.",
])  # fmt: skip
def test_what_the_record_says_is_not_flagged(text: str):
    assert kinds(text) == set()


@pytest.mark.parametrize("text", [
    "A normal creatinine is between 0.6 and 1.2 mg/dL.",
    "Creatinine above 4.0 mg/dL would be worse.",
    "If the heart rate were 150, I would worry.",
    "In patients with atrial fibrillation, outcomes are worse.",
    "Atrial fibrillation is a risk factor for stroke.",
    "Is the heart rate 150?",
    "The heart rate is usually around 70.",
    "Option B, 138, would be low.",
    "A sodium of 145 is possible.",
    "A previous stroke is not recorded.",
    "The record does not mention blood urea nitrogen.",
    "Blood urea nitrogen is unknown.",
    "Diabetes raises the risk in general.",
    "The heart rate on day 3 is above the age of 72.",
    "The creatinine of 203 µmol/L fits.",  # converted: the unit is another one
    "The day 3 values matter most.",
])  # fmt: skip
def test_what_weighs_asks_or_generalises_states_nothing(text: str):
    assert kinds(text) == set()


@pytest.mark.parametrize(("text", "quote"), [
    ("The patient is a 27-year-old man.", "27-year-old"),
    ("This is a 72-year-old woman.", "woman"),
    ("The heart rate on day 1 is 110 beats/min.", "heart rate on day 1 is 110 beats/min"),  # that of day 3
    ("The heart rate is 95.", "heart rate is 95"),
    ("Creatinine: 3.2 mg/dL", "Creatinine: 3.2 mg/dL"),
    ("Creatinine was 2,8.", "Creatinine was 2,8"),
    ("The temperature is 36 °C.", None),  # cut, not rounded: people do
    ("Urine output (250 mL/24h) is low.", "Urine output (250 mL/24h"),
    ("The patient has no diabetes.", "diabetes"),
    ("There is no history of atrial fibrillation, stroke or diabetes.", "diabetes"),
    ("He has diabetes, atrial fibrillation and little else.", "atrial fibrillation"),
    ("Ischemic heart disease: yes", "Ischemic heart disease: yes"),
    ("Smoking: never.", "Smoking: never"),
    ("The coma score is 44.", "coma score is 44"),
    ("The patient has lung cancer.", "lung cancer"),
    ("Disease category: congestive heart failure.", "Disease category: congestive heart failure"),
])  # fmt: skip
def test_another_value_than_the_records_contradicts_it(text: str, quote: str | None):
    flags = audit(asked(), "I look at this. " + text)
    found = [flag for flag in flags if flag.kind == "contradicts_record"]
    assert [("I look at this. " + text)[flag.start : flag.end] for flag in found] == ([quote] if quote else [])
    assert not any(flag.kind == "invented_value" for flag in flags)


@pytest.mark.parametrize("text", [
    "The blood urea nitrogen is 60 mg/dL.",
    "BUN 60 mg/dL.",
    "The patient has a previous stroke.",
    "There is no history of previous stroke.",
    "The lactate is 4.2 mmol/L.",
    "CRP: 148",
    "The fibrinogen is 1.7 g/L.",
    "The record shows a sodium of 131 mmol/L.",  # masked
    "Given the sodium of 131, the patient is ill.",
])  # fmt: skip
def test_a_value_that_the_record_does_not_show_is_invented(text: str):
    assert kinds(text) == {"invented_value"}


@pytest.mark.parametrize("text", [
    "Therefore, the answer is B. \\boxed{B}",
    "So sodium is most likely 138. \\boxed{B}",
    "A is too low, and the answer is not C. I choose B.\n\\boxed{B}",
    "At first the answer is A, it seems. But the findings point to option B. \\boxed{B}",
    "Option C can be ruled out. \\boxed{B}",
    "The temperature of 36.8 °C is the most likely reason. \\boxed{B}",
    "So A or B. \\boxed{B}",
])  # fmt: skip
def test_an_answer_that_follows_is_not_flagged(text: str):
    assert "answer_does_not_follow" not in kinds(text)


@pytest.mark.parametrize("text", [
    "Therefore, the answer is C. \\boxed{B}",
    "So sodium is most likely 145 mmol/L. \\boxed{B}",
    "The answer is B. 145. \\boxed{B}",  # a letter with another option's value
    "The masked value of 'Sodium' is 145. \\boxed{B}",
    "Option B can be ruled out, and only D remains. \\boxed{B}",
    "We can eliminate A and B. \\boxed{B}",
])  # fmt: skip
def test_an_answer_that_does_not_follow_is_flagged(text: str):
    assert kinds(text) == {"answer_does_not_follow"}


def test_a_forced_answer_is_held_against_the_text_too():
    assert kinds("So the answer is C.", chosen=1) == {"answer_does_not_follow"}
    assert kinds("So the answer is C.", chosen=2) == set()
    assert kinds("So the answer is C.", chosen=-1) == set()


def test_a_death_is_concluded_in_plain_words():
    record = asked("died", DIED)
    assert kinds("The patient died in hospital. \\boxed{A}", record) == {"answer_does_not_follow"}
    assert kinds("The patient survived. \\boxed{A}", record) == set()
    assert kinds("He did not survive. \\boxed{B}", record) == set()


@pytest.mark.parametrize(("text", "reason"), [
    ("\\boxed{B}. The reasons are that the patient is old and ill.", "before any reasoning"),
    ("The answer is B. The reasons are that the patient is old and ill. \\boxed{B}", "before any reasoning"),
    ("B. The reasons are that the patient is old and ill. \\boxed{B}", "before any reasoning"),
    ("The patient is old and quite ill. \\boxed{A} \\boxed{B}", "2 boxes with different letters"),
    ("The patient is old and quite ill. \\boxed{A, B}", "one box with 2 letters"),
    ("The patient is old and quite ill. \\boxed{\\text{G}}", "letter G is none of the 5 options"),
    ("The patient is old and quite ill: option I fits. \\boxed{B}", "letter I is none of the 5 options"),
])  # fmt: skip
def test_leaked_letters(text: str, reason: str):
    found = [flag for flag in audit(asked(), text) if flag.kind == "leaked_letters"]
    assert len(found) == 1
    assert reason in found[0].reason


@pytest.mark.parametrize("text", [
    "A 72-year-old man is seriously ill here. \\boxed{B}",
    "A. 131\nB. 138\nC. 145\nD. 152\nE. 124\nThe findings fit a normal value. \\boxed{B}",
    "The findings fit the option I choose. \\boxed{B}",
    "D-dimers are not known, the patient is old. \\boxed{B}",
    "The findings fit. So \\boxed{B}\nTherefore, the answer is \\boxed{B}",
])  # fmt: skip
def test_letters_in_their_place_are_not_leaked(text: str):
    assert not any(flag.kind == "leaked_letters" for flag in audit(asked(), text))


@pytest.mark.parametrize("text", [
    "",
    "\\boxed{B}",
    "Therefore, the answer is \\boxed{B}",
    "A. 131\nB. 138\nC. 145\nD. 152\nE. 124\nThe answer is B. 138. \\boxed{B}",
    "The patient is ill. " * 8 + "\\boxed{B}",
    "the patient is the patient is " * 8,
    "\n".join(f"{n}. The patient's {'history' if n % 2 else 'condition'} is no." for n in range(1, 9)),
])  # fmt: skip
def test_no_reasoning(text: str):
    assert {flag.kind for flag in audit(asked(), text)} == {"no_reasoning"}


def test_the_cue_of_the_prompt_is_not_the_models_reasoning_and_spans_are_of_the_whole_text():
    template = load_prompt("en_short")
    text = f"{template.cue} The heart rate is 95, which is a bit high. \\boxed{{B}}"
    assert [text[flag.start : flag.end] for flag in audit(asked(), text, template=template)] == ["heart rate is 95"]
    bare = audit(asked(), f"{template.cue}\n\\boxed{{B}}", template=template)
    assert [flag.kind for flag in bare] == ["no_reasoning"]


def test_what_is_said_twice_is_flagged_once():
    text = "The heart rate is 95. Much is unclear in this case. The heart rate is 95. \\boxed{B}"
    assert len(audit(asked(), text)) == 1


def test_korean_text_has_its_numbers_and_levels_matched_by_the_dictionarys_labels():
    options = ("131", "138")
    question = Question(
        "na", "S", "feature",
        "환자 기록\n\n[S]\nAge: 72 years\nSodium: (가려짐)\nDiabetes: yes\n\n"
        "문제: 'S' 항목에서 가려진 'Sodium' 값은 무엇이겠습니까?"
        "\n\nA. 131 mmol/L\nB. 138 mmol/L",
        options, 0, 0,
    )  # fmt: skip
    template = load_prompt("ko")
    record = record_of(question, template, DICTIONARY)
    assert record.pairs() == [("Age", "72 years"), ("Diabetes", "yes")]
    right = f"{template.cue} Age는 72 years이고 Diabetes: yes 입니다. 그러므로 환자는 위험이 높습니다. \\boxed{{A}}"
    assert audit(record, right, template=template) == []
    wrong = right.replace("72", "48").replace("yes", "no")
    assert [flag.kind for flag in audit(record, wrong, template=template)] == ["contradicts_record"] * 2


@pytest.mark.parametrize(
    "piece", ["heart rate, ", "no ", "A, ", "\\boxed{A}", "1 ", "(", "has a history of ", "\n", " "]
)
def test_a_model_that_has_got_stuck_is_audited_all_the_same(piece: str):
    flags = audit(asked(), piece * 3000)
    assert all(isinstance(flag, Flag) and 0 <= flag.start <= flag.end <= 3000 * len(piece) for flag in flags)
