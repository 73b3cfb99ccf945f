"""A site's own report: its samples are in it, and in nothing that leaves."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from wardround.client import local_report, payload, site
from wardround.client.folder import Site
from wardround.client.registry import to_registry
from wardround.common.config import NO_PRIVACY, RunConfig
from wardround.common.counts import count
from wardround.common.global_model import GlobalModel
from wardround.common.lm import models
from wardround.common.messages import EvaluateInstruction, SchemaInstruction, WarmupInstruction, encode
from wardround.common.question import load_prompt
from wardround.common.schema import derive_schema
from wardround.common.secagg.keys import TEST
from wardround.common.statistics import CHANCE_UNIT, Tally
from wardround.simulations.federation import write_sites
from wardround.simulations.synthetic_registry import make

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

RUN = "0123456789abcdef" * 2
HOSTILE = "</pre><script>alert(1)</script>\"'&"


def tally() -> Tally:
    result = Tally.empty(["age", "sex"], site.EVALUATED)
    result.patterns[0, [0, 8, 15]] = [6, 3, 1]
    result.chance[0] = 10 * CHANCE_UNIT // 5
    return result


def sample(text: str = "") -> dict:
    models = {"base": {"chosen": "–", "text": ""}, "final": {"chosen": "B", "text": "so it is \\boxed{A}" + text}}
    return {"target": "age", "text": "Age: ?" + text, "answer": "B", "models": models}


def page(folder: Path, answer_only: bool = True, text: str = "") -> str:
    path = folder / "report.html"
    local_report.write(
        path,
        site="site-01",
        run_id=RUN,
        tally=tally(),
        labels={"age": "Age" + text},
        samples=[sample(text)],
        answer_only=answer_only,
    )
    assert path.stat().st_mode & 0o777 == 0o600
    return path.read_text()


def test_the_page_has_counts_and_samples(tmp_path: Path):
    shown = re.sub(r"<[^>]+>", "|", page(tmp_path))
    assert "base||1 of 10" in shown and "final||4 of 10" in shown
    assert "Age||10||1||1||4" in shown  # questions, and right answers of base, warmed-up and final model
    assert "base| chose – (scored: letters only, no text)" in shown
    assert "final| chose B (scored: letters only, no text)" in shown and "asked to think aloud, not scored:" in shown
    assert "scored: the answer its text ends in" in page(tmp_path, answer_only=False)


def test_hostile_texts_stay_texts_and_nothing_is_loaded(tmp_path: Path):
    text = page(tmp_path, text=HOSTILE)
    assert "<script" not in text and "alert(1)" in text
    assert not re.search(r"src=|href=|url\(|https?:", text)


@pytest.fixture
def here(tmp_path: Path) -> Site:
    table, dictionary = make(200, seed=2)
    registry = to_registry("synthetic", pa.Table.from_pandas(table, preserve_index=False), dictionary)
    write_sites(registry, [np.arange(200)], RunConfig(name="t", privacy=NO_PRIVACY), tmp_path)
    return Site.open(tmp_path / "site-01" / "site.toml")


@pytest.mark.parametrize("public", [True, False])
def test_samples_of_a_registry_that_is_not_open_stay_in_the_sites_own_report(
    here: Site, tiny_model_path: Path, public: bool
):
    path = here.folder / "dictionary.toml"
    path.write_text(path.read_text().replace("public = true", f"public = {str(public).lower()}"))
    config = RunConfig.model_validate(
        {
            "name": "t",
            "privacy": {"enabled": False},
            "model": {"id": str(tiny_model_path), "device": "cpu", "prompt": "en_short"},
            "evaluation": {"questions_per_site": 6, "samples": 2, "sample_tokens": 3},
        }
    )
    lm = models.shared(config.model, config.lora, config.seed)
    model = GlobalModel(lm.manifest, lm.vector(trainable_only=False))
    head = {"run_id": RUN, "config": config.to_json(), "config_digest": config.digest(), "model_digest": model.digest}
    given = {
        "manifest": model.manifest.to_json(),
        "dictionary_digest": here.dictionary.digest(),
        "prompt_digest": load_prompt("en_short").digest(),
    }
    site.warm_up(here, WarmupInstruction(**head, round_index=0, **given, vector=model.full))
    schema = derive_schema(count(here.registry.values, here.dictionary), here.dictionary, config.questions)
    site.take_schema(here, SchemaInstruction(**head, round_index=0, schema=schema.to_json()))
    digests = {"schema_digest": schema.digest(), "warmup_digest": model.digest}
    reply = site.evaluate(
        here, EvaluateInstruction(**head, round_index=1, attempt=1, **digests, warmup=model.full, final=model.full)
    )
    text = (here.state / "runs" / RUN / "report.html").read_text()
    assert text.count("<h3>") == 2 and text.count("True answer") == 2
    record = re.search(r"<pre>(.{30})", text, re.DOTALL)
    assert record is not None
    assert (record[1].split("\n")[0] in reply.samples) == public
    assert (reply.samples == "[]") == (not public)
    leaving = encode(reply)
    assert (b"options" in leaving) == public
    own = payload.require(here.run_folder(RUN), 1, TEST)
    assert own.tail.sum() > 0 and own.tail.astype("<i8").tobytes() not in leaving
