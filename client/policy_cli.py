"""`wardround client policy`: what this hospital allows, in sentences. Mounted by client/cli.py."""

from __future__ import annotations

import json
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.group()
def policy() -> None:
    """This hospital's own limits, [policy] in site.toml; no coordinator can loosen them."""


@policy.command(epilog="Example: wardround client policy explain site.toml")
@click.argument("site_toml", type=_PATH, default=Path("site.toml"))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, limit by limit.")
def explain(site_toml: Path, as_json: bool) -> None:
    """Print every limit of SITE_TOML as a sentence, also those that are off."""
    from ..common.config import load_site
    from .policy_words import explain as sentences

    config = load_site(site_toml)
    found = sentences(config.policy)
    if as_json:
        click.echo(json.dumps(dict(found), indent=1, ensure_ascii=False))
        return
    click.echo(f"{config.name}, {site_toml}: what this hospital allows\n")
    width = max(len(name) for name, _ in found)
    for name, sentence in found:
        click.echo(f"  {name:{width}}  {sentence}")
