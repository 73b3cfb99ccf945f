"""Questions as a task of EleutherAI's lm-evaluation-harness, so that others score a merged model with their own tool.

Runs where the questions are made: on one machine over an open or synthetic registry, or inside a hospital. Enters:
questions and the model's tokenizer. Leaves: a folder of three files, to be given to `lm_eval --include_path`:

    NAME.yaml         the task: multiple choice, accuracy
    questions.jsonl   one question a line: the prompt as the model sees it, the letters it may choose, the truth's index
    questions.py      reads the lines; nothing goes through the cache of `datasets`, where copies would stay behind

The questions ARE patients' records, word for word, so the folder is as private as the table they came from. It is
refused unless the registry is public or the caller says that the folder stays inside the hospital; it is then made for
its owner alone. The harness writes prompts out again under `--log_samples` and `--use_cache`.

The accuracy is that of `wardround evaluate` on the same questions, answer for answer, because both see the same tokens:
the prompt is written out with the model's chat template applied and the assistant's turn begun, up to the open
`\\boxed{`; nothing is put between it and a letter (`target_delimiter`), nothing before it (`add_bos_token=False`, which
is an argument of the model, so it stands in the command), and no chat template is applied again. Every letter is
checked to be one token of its own after every prompt. Prompts belong to one tokenizer: another model, another folder.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import ConfigError
from ..common.files import private_folder, write_atomic
from ..common.question import LETTERS, PromptTemplate, Question

if TYPE_CHECKING:
    from ..common.lm.scoring import Reader

# Of the task's definition; raised when the same questions would be asked in another way.
TASK_VERSION = 1
_NAME = re.compile("[a-z0-9]+(_[a-z0-9]+)*")  # the harness splits names at commas and matches patterns in them

_TASK = """\
# A task of lm-evaluation-harness, written by wardround; run it with
#   {command}
# Do not give --apply_chat_template or --num_fewshot: the prompts hold the model's chat template already.
task: {name}
custom_dataset: !function questions.load
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: letters
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: {version}
"""

_READER = '''\
"""The questions beside this file, for lm-evaluation-harness. Written by wardround."""

import json
from pathlib import Path


def load(**_):
    """One split, "test"; held in memory, so that no cache keeps a copy."""
    from datasets import Dataset

    with Path(__file__).with_name("questions.jsonl").open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}
'''


def task_name(registry: str) -> str:
    """A registry's name as the harness takes it for a task.

    >>> task_name("SUPPORT-ICU 2 (adults)")
    'support_icu_2_adults'
    """
    return "_".join(re.findall("[a-z0-9]+", registry.lower())) or "wardround"


def check_folder(folder: Path, *, public: bool, inside_hospital: bool) -> None:
    """Refuses a folder that questions may not be written to; see `write_harness_task`.

    Raises:
        ConfigError: the registry is not public and nobody said that the folder stays inside; the folder exists.
    """
    if not (public or inside_hospital):
        raise ConfigError(
            f"{folder}: these questions hold patients' records, and their dictionary does not say public = true: "
            "export them only to a folder that stays inside the hospital, and say so with --inside-hospital"
        )
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name a new folder")


def write_harness_task(
    folder: Path,
    questions: Sequence[Question],
    template: PromptTemplate,
    reader: Reader,
    name: str,
    *,
    public: bool,
    inside_hospital: bool = False,
) -> str:
    """Writes the task folder, complete or not at all.

    Args:
        folder: must not exist yet.
        questions: at least one; 2 to 10 options each.
        template: their prompt.
        reader: the model that will be scored, or its tokenizer alone: it decides the chat template and the tokens.
        name: of the task, lower case: letters, digits and single underscores (`task_name`).
        public: the dictionary says that the registry is public (`Dictionary.public`).
        inside_hospital: somebody answers for it that the folder does not leave the hospital.

    Returns:
        The command that scores a merged model with it; MODEL stands for the model's folder.

    Raises:
        ConfigError: the registry is not public and nobody said that the folder stays inside; a name that the harness
            would misread; a folder that exists; no question.
        ModelError: an option letter is not one token after a prompt, or the chat template refuses the messages.
    """
    from ..common.lm.scoring import option_token_ids, render

    check_folder(folder, public=public, inside_hospital=inside_hospital)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"task name '{name}': expected lower-case letters, digits and single underscores")
    if not questions:
        raise ConfigError(f"{folder}: no question to export")
    lines: list[str] = []
    for question in questions:
        prompt, n = render(reader, template, question, reasoning=False), len(question.options)
        option_token_ids(reader.tokenizer, prompt, n)
        line = {
            "prompt": prompt,
            "letters": list(LETTERS[:n]),
            "answer": question.answer,
            "target": question.target,
            "section": question.section,
            "kind": question.kind,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    command = (
        f"lm_eval --model hf --model_args pretrained=MODEL,dtype=float32,add_bos_token=False "
        f"--include_path {shlex.quote(str(folder))} --tasks {name} --batch_size 8"
    )
    if public:
        folder.mkdir(parents=True)
    else:
        private_folder(folder)
    mode = 0o644 if public else 0o600
    write_atomic(folder / "questions.jsonl", "".join(lines).encode(), mode=mode)
    write_atomic(folder / "questions.py", _READER.encode(), mode=mode)
    # Last: without it the harness finds no task.
    task = _TASK.format(command=command, name=name, version=TASK_VERSION)
    write_atomic(folder / f"{name}.yaml", task.encode(), mode=mode)
    return command
