"""The coordinator's own certificate authority, and the TLS certificate of its SuperLink.

Run by the coordinator (`wardround server init`, `server start`). Enters: the address that hospitals dial. Leaves:
ca.pem, which goes to every hospital in its invitation. Private: ca.key and server.key, mode 0600. In the folder:

    ca.pem, ca.key          the authority, ten years; hospitals trust this one and no other
    server.pem, server.key  what the SuperLink shows, 397 days; made anew well before it ends

The two keys are not encrypted: the SuperLink starts without a person. Whoever holds ca.key can pretend to be the
coordinator to the network, and read what TLS hides: updates stay masked (docs/secure-sums.md), and a hospital still
signs and checks everything by identity keys. Keep ca.key off the machine that listens, if you like: only making a new
server certificate needs it.

Formal Guarantees:
    A server certificate that `make_server` wrote is signed by the authority in the same folder, names the host it was
    given, `localhost` and 127.0.0.1, and serves for servers only. No key file is readable by others.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..common.errors import ConfigError
from ..common.files import private_folder, write_atomic
from ..common.key_file import read_secret, write_once

CA_DAYS, SERVER_DAYS = 3653, 397  # ten years; the longest that clients take from a public authority, by habit
RENEW_DAYS = 60  # before its end; `server start` then makes a new one
_BACKDATED = timedelta(hours=1)  # a hospital's clock may be behind
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Validity:
    """From when to when a certificate holds, UTC, and for which hosts."""

    begins: datetime
    ends: datetime
    hosts: tuple[str, ...]

    def days_left(self, now: datetime | None = None) -> int:
        """Whole days until it ends; negative once it has."""
        return (self.ends - (now or datetime.now(UTC))).days


def make_authority(folder: Path, consortium: str) -> None:
    """Makes ca.pem and ca.key where there are none.

    Args:
        folder: made with mode 0700 if it is not there.
        consortium: the name on it, for people.

    Raises:
        ConfigError: there is a key or a certificate already.
    """
    private_folder(folder)
    for name in ("ca.key", "ca.pem"):
        if os.path.lexists(folder / name):
            raise ConfigError(f"{folder / name}: is there already, and hospitals trust it: it is never replaced")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"wardround: {consortium}"[:64])])
    now = datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = _usage(signs_certificates=True)
    certificate = (
        _builder(name, name, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, SHA256())
    )
    write_once(folder / "ca.key", _private(key), 0o600)
    write_once(folder / "ca.pem", certificate.public_bytes(Encoding.PEM), 0o644)


def replace_authority(folder: Path, consortium: str) -> None:
    """Puts the authority aside, as ca.pem.old, and makes another; the old key is deleted.

    Args:
        folder: with ca.pem, or without.
        consortium: the name on the new one.
    """
    (folder / "ca.key").unlink(missing_ok=True)
    if (folder / "ca.pem").exists():
        (folder / "ca.pem").replace(folder / "ca.pem.old")
    make_authority(folder, consortium)


def make_server(folder: Path, host: str) -> Validity:
    """Makes server.pem and server.key, in the place of what is there.

    Args:
        folder: with ca.pem and ca.key.
        host: name or IP address that hospitals dial.

    Raises:
        ConfigError: not a host; the authority is missing, damaged, readable by others or about to end.
    """
    authority = _certificate(folder / "ca.pem")
    signer = _key(folder / "ca.key")
    if signer.public_key().public_numbers() != _public(authority, folder / "ca.pem").public_numbers():
        raise ConfigError(f"{folder / 'ca.key'}: not the key of ca.pem beside it; restore both from a copy")
    now = datetime.now(UTC)
    days = min(SERVER_DAYS, (authority.not_valid_after_utc - now).days)
    if days < 1:
        raise ConfigError(
            f"{folder / 'ca.pem'}: ended {authority.not_valid_after_utc:%Y-%m-%d}: the consortium needs a new one"
        )
    names = _names(host)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    certificate = (
        _builder(subject, authority.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(signer, SHA256())
    )
    # One after the other: a start between the two fails with a mismatch, and the next call makes both again.
    write_atomic(folder / "server.key", _private(key))
    write_atomic(folder / "server.pem", certificate.public_bytes(Encoding.PEM), mode=0o644)
    return validity(folder / "server.pem")


def validity(path: Path) -> Validity:
    """What a certificate file says.

    Raises:
        ConfigError: missing, or not a certificate.
    """
    certificate = _certificate(path)
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = tuple(str(name.value) for name in found)
    except x509.ExtensionNotFound:
        hosts = ()
    return Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc, hosts)


def check_server(folder: Path, host: str) -> Validity:
    """Checks that the server certificate can be shown to hospitals now.

    Raises:
        ConfigError: it is missing, ended, not yet valid, for another host, of another authority, or not of its key.
    """
    path = folder / "server.pem"
    found, remedy = validity(path), "call `wardround server renew`"
    certificate, now = _certificate(path), datetime.now(UTC)
    if not found.begins <= now < found.ends:
        raise ConfigError(
            f"{path}: holds from {found.begins:%Y-%m-%d} to {found.ends:%Y-%m-%d}, it is {now:%Y-%m-%d}: {remedy}"
        )
    if host not in found.hosts:
        raise ConfigError(f"{path}: for {', '.join(found.hosts)}, and hospitals dial {host}: {remedy}")
    try:
        certificate.verify_directly_issued_by(_certificate(folder / "ca.pem"))
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(f"{path}: not signed by ca.pem beside it, which hospitals trust: {remedy}") from None
    if _key(folder / "server.key").public_key().public_numbers() != _public(certificate, path).public_numbers():
        raise ConfigError(f"{folder / 'server.key'}: not the key of server.pem beside it: {remedy}")
    return found


def _names(host: str) -> list[x509.GeneralName]:
    """The host and this machine's own names; each once."""
    local = ipaddress.ip_address("127.0.0.1")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
            raise ConfigError(f"'{host:.80}': expected a host name or an IP address") from None
        names = [host] if host == "localhost" else [host, "localhost"]
        return [*map(x509.DNSName, names), x509.IPAddress(local)]
    return [x509.DNSName("localhost"), *map(x509.IPAddress, dict.fromkeys((address, local)))]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: a certificate") from None
    except ValueError:
        raise ConfigError(f"{path}: expected a certificate in PEM; restore the file from a copy") from None


def _public(certificate: x509.Certificate, path: Path) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path}: expected an elliptic-curve key")
    return key


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(read_secret(path, "TLS key"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: expected an unencrypted private key in PEM; restore the file from a copy") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: expected an elliptic-curve key")
    return key
