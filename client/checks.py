"""`wardround client check`: everything that must be right before this hospital can take part, a line each.

Run by the site. Enters: its folder, this machine, the coordinator's address. Leaves: two HTTPS requests to that
address, without a body or a name; nothing else. Private: counts of patients, for the hospital's own screen.

No check changes anything but what opening a site always does. One that fails never hides another.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ..common.bundle import wardround_version
from ..common.dictionary import load_dictionary
from ..common.errors import ConfigError, WardroundError
from ..common.messages import PROTOCOL_VERSION
from . import policy
from .folder import Site
from .node import Node, check_bundle, node_key
from .opt_out import opted_out
from .quality import assess

State = Literal["ok", "note", "error"]
MIN_FREE_BYTES = 2 << 30  # records of a run and a base model's working files; a model itself is imported elsewhere
MAX_CLOCK_S = 30.0  # Flower refuses a SuperNode whose clock is a few minutes off
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Line:
    """One check.

    Attributes:
        name: what was looked at.
        state: "error" ends the command with 1; a "note" does not.
        text: what was found.
        fix: what to do, for an error.
    """

    name: str
    state: State
    text: str
    fix: str = ""


def run_checks(site_toml: Path) -> list[Line]:
    """Every check of a site, in the order in which a person mends them.

    Raises:
        ConfigError: site.toml itself is missing or malformed: then nothing can be looked at.
    """
    node = Node.open(site_toml)
    checks: list[tuple[str, Callable[[Node], Line]]] = [
        ("registry", _registry),
        ("policy", _policy),
        ("identity", _identity),
        ("ledger", _ledger),
        ("SuperNode key", _node_key),
        ("consortium", _consortium),
        ("versions", _versions),
        ("roster", _roster),
        ("network", _network),
        ("clock", _clock),
        ("disk", _disk),
        ("GPU", _gpu),
        ("base model", _base_model),
    ]
    lines: list[Line] = []
    for name, check in checks:
        try:
            lines.append(check(node))
        except (WardroundError, OSError) as error:
            text, _, fix = str(error).partition(": call ")
            lines.append(
                Line(name, "error", text, f"call {fix}" if fix else _FIXES.get(name, "mend what the line names"))
            )
    return lines


_FIXES = {
    "registry": "mend the table or its [mapping] in site.toml; `wardround client check TABLE DICTIONARY` shows it all",
    "policy": "mend [policy] in site.toml; `wardround client policy explain` says every limit in a sentence",
    "identity": "restore state/identity.pem and its passphrase from your copy",
    "ledger": "do not start: find out what changed it (docs/deployment-site.md), and put the newest copy back",
    "SuperNode key": "restore state/node.pem from your copy",
    "consortium": "wardround client join INVITATION",
    "versions": "install the coordinator's version of wardround",
    "roster": "wardround client join with a new invitation, or put the pinned roster back",
}


def _registry(node: Node) -> Line:
    config = node.config
    path = node.folder / config.dictionary
    dictionary = load_dictionary(path if path.is_file() else Path(config.dictionary))
    quality = assess(node.folder / config.table, dictionary, config.mapping)
    texts = [finding.text for finding in quality.errors]
    if texts:
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        return Line("registry", "error", f"{config.table}: {texts[0]}{more}", _FIXES["registry"])
    left = len(opted_out(config, node.folder, dictionary).ids)
    text = f"{quality.patients} patients in {quality.rows} rows, dictionary '{dictionary.name}'"
    return Line("registry", "ok", text + (f", {left} ids on the opt-out list" if left else ""))


def _policy(node: Node) -> Line:
    config = node.config
    path = node.folder / config.dictionary
    policy.check_targets(config.policy, load_dictionary(path if path.is_file() else Path(config.dictionary)))
    limits = config.policy
    if policy.requires_privacy(limits, open_site=limits.simulated) and limits.epsilon is None:
        return Line(
            "policy", "error", "no privacy budget is set, so every run is refused",
            "set epsilon and delta in [policy] of site.toml, as agreed with the privacy officer",
        )  # fmt: skip
    if limits.epsilon is not None:
        return Line("policy", "ok", f"budget ε = {limits.epsilon:g} at δ = {limits.delta:g} over all runs")
    return Line("policy", "ok", "runs without differential privacy are accepted")


def _identity(node: Node) -> Line:
    return Line("identity", "ok", node.keys.load().fingerprint)


def _ledger(node: Node) -> Line:
    ledger = Site(node.folder, node.config).ledger
    if not ledger.path.exists():
        ledger.verify()
        return Line("ledger", "ok", "nothing has left this site")
    return Line("ledger", "ok", f"{ledger.verify()} entries, each as it was written")


def _node_key(node: Node) -> Line:
    if not node.key_path.exists():
        return Line("SuperNode key", "error", f"{node.key_path}: no such file", "wardround client init, or your copy")
    node_key(node.key_path)
    return Line("SuperNode key", "ok", "EC P-384, readable by this user alone")


def _consortium(node: Node) -> Line:
    invitation = node.invitation
    return Line("consortium", "ok", f"'{invitation.pinned().consortium}' at {invitation.address}")


def _versions(node: Node) -> Line:
    own = f"wardround {wardround_version()}, protocol {PROTOCOL_VERSION}, Flower {version('flwr')}"
    if not node.invitation_path.exists():
        return Line("versions", "note", f"{own}; not compared: this site has joined nothing")
    node.invitation.check_versions()
    check_bundle(node.invitation)
    return Line("versions", "ok", f"{own}: as the coordinator's, and so is the bundle")


def _roster(node: Node) -> Line:
    if node.config.identity.roster_digest is None:
        return Line("roster", "note", "none is pinned: joining a consortium pins it")
    members = node.keys.members(node.keys.load().id)
    verified, wanted = len(members.verified), node.config.policy.min_sites
    text = f"serial {members.roster.serial}: {verified} of {len(members.active)} active hospitals verified"
    if verified < wanted:
        return Line(
            "roster", "error", f"{text}; policy.min_sites = {wanted} counts verified ones only",
            "compare fingerprints by telephone, then wardround client roster verify FINGERPRINT",
        )  # fmt: skip
    return Line("roster", "ok", text)


@dataclass(frozen=True)
class Contact:
    """What one request to the coordinator showed: its clock less this machine's, s; None: it did not say."""

    clock_s: float | None


def contact(address: str, authority: str) -> Contact:
    """Asks the coordinator's address for anything at all, trusting the pinned authority alone.

    Whatever status comes back is an answer; a hospital's proxy (HTTPS_PROXY) is used as it is by Flower.

    Raises:
        ConfigError: not reached, or it is not who the pinned authority vouches for; what to do is in it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority)
    began = time.time()
    try:
        with urllib.request.urlopen(f"https://{address}/health", timeout=_TIMEOUT_S, context=context) as answer:
            headers: Any = answer.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
    except (OSError, ValueError) as error:
        reason: Any = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConfigError(f"{address}: {_why(reason)}") from None
    said = headers.get("Date")
    if not said:
        return Contact(None)
    try:
        return Contact(parsedate_to_datetime(said).timestamp() - (began + time.time()) / 2)
    except ValueError:
        return Contact(None)


def _why(reason: object) -> str:
    """A failed connection in words, with what to do."""
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not one that the pinned authority vouches for ({reason.verify_message}): ask the "
            "coordinator; where its authority changed, join with a new invitation"
        )
    if isinstance(reason, ssl.SSLError):
        return "does not answer in TLS: look at the address, and whether something between opens the connection"
    if isinstance(reason, socket.gaierror):
        return "no such name: look at the address in the invitation, and at this machine's DNS"
    if isinstance(reason, TimeoutError):
        return "no answer: open the firewall for outgoing TCP connections to it"
    if isinstance(reason, ConnectionRefusedError):
        return "refused: the coordinator is not running, or a firewall rejects it"
    text = getattr(reason, "strerror", None) or type(reason).__name__
    return f"not reached ({str(text).lower()}): look at this machine's network and proxy settings"


def _network(node: Node) -> Line:
    if not node.invitation_path.exists():
        return Line("network", "note", "not tried: this site has joined nothing")
    invitation = node.invitation
    try:
        contact(invitation.address, invitation.ca_certificate)
    except ConfigError as error:
        text, _, fix = str(error).rpartition(": ")
        return Line("network", "error", text, fix)
    return Line("network", "ok", f"{invitation.address} answers, with the pinned authority's certificate")


def _clock(node: Node) -> Line:
    if not node.invitation_path.exists():
        return Line("clock", "note", "not compared: this site has joined nothing")
    try:
        off = contact(node.invitation.address, node.invitation.ca_certificate).clock_s
    except ConfigError:
        return Line("clock", "note", "not compared: the coordinator is not reached")
    if off is None:
        return Line("clock", "note", "not compared: the coordinator's answer has no date")
    if abs(off) > MAX_CLOCK_S:
        what = "behind" if off > 0 else "ahead of"
        return Line(
            "clock", "error", f"{abs(off):.0f} s {what} the coordinator's", "set this machine's clock (NTP); then again"
        )  # fmt: skip
    return Line("clock", "ok", f"within {MAX_CLOCK_S:.0f} s of the coordinator's")


def _disk(node: Node) -> Line:
    free = shutil.disk_usage(node.folder).free
    text = f"{free / 2**30:.1f} GB free at {node.folder}"
    if free < MIN_FREE_BYTES:
        return Line("disk", "error", text, f"free at least {MIN_FREE_BYTES >> 30} GB there")
    return Line("disk", "ok", text)


def _gpu(node: Node) -> Line:
    from ..common.lm.devices import describe

    found = describe()
    if found is None:
        return Line("GPU", "note", "none: training runs on the processor, which only small models allow")
    return Line("GPU", "ok", found)


def _base_model(node: Node) -> Line:
    from ..common.lm.packaged import imported, present

    allowed = node.config.policy.allowed_models
    if not allowed:
        found = imported()
        if not found:
            return Line("base model", "note", "none imported: a run's must be packaged or in Hugging Face's cache")
        return Line("base model", "ok", ", ".join(f"{digest[:12]}… imported" for digest in found))
    there = present()
    have = [f"{digest[:12]}… ({there[digest]})" for digest in allowed if digest in there]
    if not have:
        return Line(
            "base model", "error", f"none of the {len(allowed)} that policy.allowed_models names is on this machine",
            "wardround client model import FOLDER",
        )  # fmt: skip
    return Line("base model", "ok", ", ".join(have))
