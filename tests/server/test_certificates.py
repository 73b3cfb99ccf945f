"""The coordinator's authority and TLS certificate: whom it names, how long, who signed it, who may read the keys."""

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from wardround.common.errors import ConfigError
from wardround.server import certificates
from wardround.server.certificates import check_server, make_authority, make_server, validity

HOST = "coordinator.example.org"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_authority(tmp_path / "tls", "Stroke outcomes")
    make_server(tmp_path / "tls", HOST)
    return tmp_path / "tls"


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_server_certificate_names_the_host_and_this_machine(folder: Path) -> None:
    names = load(folder / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [HOST, "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7", "127.0.0.1", "localhost"])
def test_an_address_is_named_as_an_address_and_nothing_twice(tmp_path: Path, host: str) -> None:
    make_authority(tmp_path, "trial")
    hosts = make_server(tmp_path, host).hosts
    assert host in hosts and len(hosts) == len(set(hosts))
    assert check_server(tmp_path, host).hosts == hosts


@pytest.mark.parametrize("host", ["", "no host", "-a.example", "a..b", "*", "x" * 64])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    make_authority(tmp_path, "trial")
    with pytest.raises(ConfigError, match="host name or an IP address"):
        make_server(tmp_path, host)
    assert not (tmp_path / "server.key").exists()


def test_it_holds_for_397_days_and_the_authority_for_ten_years(folder: Path) -> None:
    server, authority = validity(folder / "server.pem"), validity(folder / "ca.pem")
    assert server.days_left() == 396 and authority.days_left() == 3652  # whole days: a moment has passed
    assert server.days_left(server.ends + timedelta(days=2, seconds=1)) == -3
    assert server.begins < datetime.now(UTC) - timedelta(minutes=30)  # a clock that is behind takes it too


def test_the_authority_signs_certificates_and_the_server_key_cannot(folder: Path) -> None:
    server, authority = load(folder / "server.pem"), load(folder / "ca.pem")
    server.verify_directly_issued_by(authority)
    assert isinstance(server.public_key(), ec.EllipticCurvePublicKey)
    constraints = [
        one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for one in (authority, server)
    ]
    assert constraints == [True, False]
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_keys_are_for_their_owner_alone(folder: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"ca.key": 0o600, "server.key": 0o600, "ca.pem": 0o644, "server.pem": 0o644}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_client_that_trusts_the_authority_takes_it_and_one_that_trusts_another_does_not(
    folder: Path, tmp_path: Path
) -> None:
    make_authority(tmp_path / "other", "another")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")

    def shake(authority: Path, host: str) -> None:
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.load_verify_locations(authority)
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            client.wrap_bio(to_client, to_server, server_hostname=host),
            server.wrap_bio(to_server, to_client, server_side=True),
        ]
        done = [False, False]
        for _ in range(10):
            for index, end in enumerate(ends):
                try:
                    end.do_handshake()
                    done[index] = True
                except ssl.SSLWantReadError:
                    continue
        assert all(done)

    shake(folder / "ca.pem", HOST)
    shake(folder / "ca.pem", "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(tmp_path / "other" / "ca.pem", HOST)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(folder / "ca.pem", "elsewhere.example.org")


def test_an_authority_is_never_replaced(folder: Path) -> None:
    before = (folder / "ca.pem").read_bytes()
    with pytest.raises(ConfigError, match="never replaced"):
        make_authority(folder, "again")
    assert (folder / "ca.pem").read_bytes() == before


def test_renewing_makes_a_new_key_of_the_same_authority(folder: Path) -> None:
    before = load(folder / "server.pem")
    make_server(folder, HOST)
    after = load(folder / "server.pem")
    assert before.serial_number != after.serial_number and before.public_key() != after.public_key()
    after.verify_directly_issued_by(load(folder / "ca.pem"))
    check_server(folder, HOST)


def test_what_cannot_be_shown_is_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hospitals dial elsewhere\.example\.org: call `wardround server renew"):
        check_server(folder, "elsewhere.example.org")
    good = (folder / "server.key").read_bytes()
    (folder / "server.key").write_bytes((folder / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"server\.key: not the key of server\.pem"):
        check_server(folder, HOST)
    (folder / "server.key").write_bytes(good)
    make_authority(tmp_path / "other", "another")
    authority = (folder / "ca.pem").read_bytes()
    (folder / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"not signed by ca\.pem"):
        check_server(folder, HOST)
    (folder / "ca.pem").write_bytes(authority)
    (folder / "server.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        check_server(folder, HOST)
    (folder / "server.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="expected a certificate in PEM"):
        check_server(folder, HOST)


def test_one_that_ended_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "SERVER_DAYS", 0)
    with pytest.raises(ConfigError, match="needs a new one"):  # what is left of the authority's time is none
        make_server(folder, HOST)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None) -> datetime:
            return datetime.now(tz) + timedelta(days=400)

    monkeypatch.setattr(certificates, "datetime", Later)
    with pytest.raises(ConfigError, match=r"it is 20.*: call `wardround server renew"):
        check_server(folder, HOST)
