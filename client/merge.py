"""The final model of a run, made at the hospital: its base model with the adapter it was given, merged and verified.

Run by the site, `wardround client merge`. Enters: `state/runs/<run id>/adapter/`, which the finalize phase left, and
the base model's files on this machine. Leaves: nothing; OUT is this hospital's. Nothing of a patient is read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..common.adapter import Manifest, flatten, vector_digest
from ..common.errors import ModelError, RunFolderError, UserError, VerificationError
from ..common.files import check_writable, read_record
from .folder import Site


def merge(site_toml: Path, run_id: str, out: Path, base: str | None = None) -> str:
    """Writes OUT, a model folder that loads with `AutoModelForCausalLM.from_pretrained`, or nothing.

    Args:
        site_toml: this site.
        run_id: a run whose final adapter is here.
        out: the folder to make.
        base: a packaged name, a local folder or a cached id; None: where the base model lay when the adapter came.

    Returns:
        The final adapter's digest, as the run's report and model card give it.

    Raises:
        UserError: no such run here, its adapter has not come, OUT is there already, no such base model.
        VerificationError: adapter or base model are not the run's, or the merged model is not what it must be.
    """
    runs = Site.open(site_toml).state / "runs"
    known = sorted(folder.name for folder in runs.iterdir()) if runs.is_dir() else []
    if run_id not in known:
        raise UserError(
            f"run '{run_id}': expected one that this site took part in, there is {', '.join(known) or 'none'}"
        )
    adapter = runs / run_id / "adapter"
    if not adapter.is_dir():
        raise UserError(
            f"run '{run_id}': its final adapter is not here yet; it comes at the end, or when it is resumed"
        )
    if out.exists():
        raise RunFolderError(f"{out}: exists already; choose a new folder")
    check_writable(out)
    manifest = Manifest.from_json(read_record(runs / run_id / "round-0.record").values["manifest"])
    if manifest.strategy == "full":
        raise UserError(f"run '{run_id}': trained all parameters, so {adapter} is the whole model; nothing to merge")
    from ..common.lm.merge import merge_into, new_folder
    from ..common.lm.models import read_tensors
    from ..common.lm.packaged import base_digest, resolve

    tensors = {key: value.float().numpy() for key, value in read_tensors(adapter / "adapter_model.safetensors").items()}
    digest = vector_digest(manifest, flatten(tensors, manifest, trainable_only=False))
    if digest != (adapter / "digest.txt").read_text(encoding="ascii").strip():
        raise VerificationError(f"{adapter}: does not hold the adapter that this site confirmed")
    path = resolve(base if base is not None else _base_of(adapter))
    if base_digest(path) != manifest.base_digest:
        raise VerificationError(f"base model {path}: its files are not those that the run was trained on")
    with new_folder(out) as work:
        merge_into(path, adapter, work)
        for file in work.iterdir():  # safetensors writes for its owner alone, everything else as the umask says
            shutil.copymode(work / "config.json", file)
    return digest


def _base_of(adapter: Path) -> str:
    """Where the base model lay when the adapter was stored."""
    try:
        found = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{adapter}: does not say which base model it belongs to; name it with --base") from None
    if not Path(found).is_dir():
        raise ModelError(f"{found}: the base model is no longer there; say with --base where it is")
    return str(found)
