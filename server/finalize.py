"""The end of a run: the adapter as a peft folder and the merged model as a plain one, verified, with their provenance.

Run by the coordinator. Enters: the model with the final adapter in it. Leaves: OUT/adapter and OUT/model, each with
README.md (model card) and provenance.json. Holds no patient row; what the weights themselves say about patients is the
privacy statement's subject.

Both folders are written under temporary names, verified (common/lm/merge.py says what), then renamed: a failure leaves
nothing half-written, and a finalize that is repeated replaces them. Under strategy `full` there is no adapter:
OUT/adapter then holds only README.md and provenance.json, and OUT/model the trained model.

Memory: the caller's model and one more copy of it (merging loads the base anew, so that what is verified is what the
files give). A coordinator short of memory for two copies releases its model and calls
`merge_adapter` on the adapter folder, which needs one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from ..common.adapter import flatten, vector_digest
from ..common.errors import VerificationError
from ..common.lm.merge import (
    MergeReport,
    difference,
    logits,
    merge_into,
    new_folder,
    probe_prompts,
    require_disk,
    save_verified,
)
from ..common.lm.models import LanguageModel, read_tensors
from . import evaluate
from .provenance import privacy_statement

_TEMPLATES = Path(__file__).parent / "templates"
_ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Finalized:
    """The two folders, and what was verified about them."""

    adapter: Path
    model: Path
    checks: MergeReport


def finalize(
    lm: LanguageModel,
    out: Path,
    provenance: Mapping[str, Any],
    *,
    evaluation: Mapping[str, Any] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
) -> Finalized:
    """Writes OUT/adapter and OUT/model.

    Args:
        lm: holds the final adapter; left as it is.
        out: the run's folder.
        provenance: of server/provenance.py; its `adapter_digest` must be that of the adapter in `lm`.
        evaluation: content of evaluation.json, for the model card.
        prompts: token ids that outputs are compared on (no patient's: the coordinator has none); None: built-in ones.

    Raises:
        RunFolderError: not enough disk; nothing was written.
        VerificationError: `lm` holds another adapter than `provenance` says, or a file or output is not what it must
            be; nothing is left behind.
    """
    vector = lm.vector(trainable_only=False)
    digest = vector_digest(lm.manifest, vector)
    if digest != provenance["adapter_digest"]:
        raise VerificationError(f"final adapter: expected {provenance['adapter_digest'][:12]}…, got {digest[:12]}…")
    out.mkdir(parents=True, exist_ok=True)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in lm.model.parameters())
    require_disk(out, weights if lm.manifest.strategy == "full" else weights + vector.nbytes)
    with new_folder(out / "adapter") as adapter, new_folder(out / "model") as model:
        if lm.manifest.strategy == "full":
            checks = _save_full(lm, model, prompts)
        else:
            _save_adapter(lm, adapter)
            checks = merge_into(lm.path, adapter, model, prompts=prompts)
        facts = {**provenance, "verified": asdict(checks)}
        for what, folder in (("adapter", adapter), ("model", model)):
            (folder / "README.md").write_text(model_card(what, facts, evaluation), encoding="utf-8")
            text = json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
            (folder / "provenance.json").write_text(text, encoding="utf-8")
            for file in folder.iterdir():  # safetensors writes for its owner alone, everything else as the umask says
                shutil.copymode(folder / "README.md", file)
    return Finalized(out / "adapter", out / "model", checks)


def model_card(what: str, facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """README.md of the "model" or the "adapter" folder.

    Args:
        what: "model" or "adapter".
        facts: provenance, with "verified".
        evaluation: content of evaluation.json.
    """
    if evaluation and not facts["warmup"]:
        evaluation = evaluate.without_warmup(evaluation)
    shown: list[dict[str, str]] = []
    evaluation = evaluation or {}
    for name in evaluate.rows_of(evaluation):
        if name == "chance":
            numbers = {"accuracy": evaluate.percent(evaluation["chance"]), "interval": ""}
        else:
            row = evaluation[name]
            numbers = {"accuracy": evaluate.percent(row["accuracy"]), "interval": evaluate.interval(row["ci95"])}
        shown.append({"label": evaluate.LABELS[name], **numbers})
    card = _environment().get_template("model_card.md.j2")
    return card.render(
        what=what,
        p=facts,
        evaluation=evaluation,
        verdict=evaluate.verdict(evaluation) if evaluation else "",
        tasks=evaluation.get("tasks", ()),
        baselines=evaluate.baselines(evaluation) if evaluation else "",
        rows=shown,
        privacy=privacy_statement(facts),
        facts=_facts(facts),
    )


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The provenance table of the model card."""
    checks = facts["verified"]
    agreement = f"{evaluate.percent(checks['greedy_agreement'])} of probe positions with the same most likely token"
    rows = [
        ("base model", f"`{facts['base_model']}`, digest `{facts['base_digest']}`"),
        ("trained", f"strategy `{facts['strategy']}`, {facts['questions_trained']:,} questions, seed {facts['seed']}"),
        ("rounds", f"{facts['rounds_run']} run, the final model is of round {facts['kept_round']} (0: before them)"),
        ("sites", str(facts["sites"])),
        ("adapter digest", f"`{facts['adapter_digest']}`"),
        ("config digest", f"`{facts['config_digest']}`"),
        ("schema digest", f"`{facts['schema_digest']}`"),
        ("dictionary digest", f"`{facts['dictionary_digest']}`"),
        ("merge", f"logits within {checks['merge_difference']:.1e} of the largest of base + adapter; {agreement}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in sorted(facts["versions"].items()))),
        ("commit", f"`{facts['commit']}`" if facts["commit"] else "not known: an installed package, or git is missing"),
    ]
    return [(name, value.replace("|", "\\|")) for name, value in rows]


def _save_adapter(lm: LanguageModel, folder: Path) -> None:
    """The adapter in peft's format with the tokenizer beside it; its tensors are read back bit for bit."""
    lm.save_adapter(folder)
    # Without a tokenizer in the folder, AutoPeftModelForCausalLM asks the model hub whether there is one.
    lm.tokenizer.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(lm.path.resolve())  # from_pretrained must find it from any folder
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # peft writes a set: another order in every process
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {name: tensor.float().numpy() for name, tensor in read_tensors(folder / _ADAPTER_FILE).items()}
    written = vector_digest(lm.manifest, flatten(tensors, lm.manifest, trainable_only=False))
    if written != vector_digest(lm.manifest, lm.vector(trainable_only=False)):
        raise VerificationError(f"{_ADAPTER_FILE}: does not hold the final adapter")


def _save_full(lm: LanguageModel, folder: Path, prompts: Sequence[Sequence[int]] | None) -> MergeReport:
    """Strategy `full`: the trained model itself."""
    probes = prompts if prompts is not None else probe_prompts(lm.tokenizer)
    final = logits(lm.model, probes)
    with lm.base_only():
        effect = difference(logits(lm.model, probes), final)
    written = save_verified([lm.model], lm.tokenizer, folder, probes)
    return MergeReport(effect == 0.0, effect, 0.0, 0.0, 1.0, len(probes), written)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML
    )
