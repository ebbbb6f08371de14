"""Certificates, token issuers and API keys made for tests."""

from __future__ import annotations

import base64
import ipaddress
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from exportd_server.identity.base import ApiKey, Scope
from exportd_server.identity.file import FileKeyStore
from exportd_server.identity.keys import new_key

DAY = timedelta(days=1)
ISSUER = "https://issuer.example"
AUDIENCE = "exports"


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call with a key or a token."""
    return (("authorization", f"Bearer {text}"),)


# --- certificates


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, in PEM, and as files."""

    cert: bytes
    key: bytes
    cert_file: Path
    key_file: Path


class Authority:
    """Signs certificates. Everything lies in a directory of its own."""

    def __init__(self, directory: Path, name: str = "Test authority") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        now = datetime.now(UTC)
        self._certificate = (
            _builder(self._name, self._name, self._key, now - DAY, now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.cert = _pem(self._certificate)
        self.cert_file = directory / "ca.pem"
        self.cert_file.write_bytes(self.cert)

    def pair(
        self,
        name: str,
        *,
        dns: Sequence[str] = (),
        uris: Sequence[str] = (),
        ips: Sequence[str] = (),
        not_after: datetime | None = None,
        extensions: Sequence[x509.ExtensionType] = (),
    ) -> Pair:
        """Sign a certificate for a common name and alternative names, and with more
        extensions, which may be odd."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = _builder(self._name, _name(name), key, now - DAY, not_after or now + DAY)
        alternative: list[x509.GeneralName] = [
            *map(x509.DNSName, dns),
            *map(x509.UniformResourceIdentifier, uris),
            *(x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips),
        ]
        if alternative:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternative), critical=False
            )
        for extension in extensions:
            # One by one the builder would refuse two of a kind.
            one = x509.CertificateBuilder().add_extension(extension, critical=False)
            builder._extensions = [*builder._extensions, *one._extensions]
        cert = _pem(builder.sign(self._key, hashes.SHA256()))
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        files = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        files[0].write_bytes(cert)
        files[1].write_bytes(private)
        return Pair(cert, private, *files)

    def trusted(self, pair: Pair | None = None) -> grpc.ChannelCredentials:
        """What a client needs that trusts this authority, with its own certificate."""
        if pair is None:
            return grpc.ssl_channel_credentials(self.cert)
        return grpc.ssl_channel_credentials(self.cert, pair.key, pair.cert)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


# --- tokens

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def encoded(content: Mapping[str, Any]) -> str:
    """A part of a token."""
    # A header that is None is left out.
    text = json.dumps({k: v for k, v in content.items() if v is not None or k != "kid"})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@dataclass
class Issuer:
    """Signs tokens, by keys that are named by their `kid`."""

    keys: dict[str, tuple[str, PrivateKey]] = field(default_factory=dict)

    def add(self, kid: str, algorithm: str = "ES256") -> None:
        """Make a key."""
        made: dict[str, PrivateKey] = {
            "ES256": ec.generate_private_key(ec.SECP256R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate(),
        }
        if algorithm == "RS256":
            made["RS256"] = rsa.generate_private_key(65537, 2048)
        self.keys[kid] = algorithm, made[algorithm]

    def jwks(self, kids: Iterable[str] | None = None) -> bytes:
        """The public keys."""
        entries: list[Mapping[str, Any]] = []
        for kid in self.keys if kids is None else kids:
            algorithm, key = self.keys[kid]
            kind = jwt.get_algorithm_by_name(algorithm)
            public = kind.to_jwk(key.public_key(), as_dict=True)
            entries.append({**public, "kid": kid, "use": "sig", "alg": algorithm})
        return json.dumps({"keys": entries}).encode()

    def token(
        self,
        kid: str = "",
        *,
        tenant: str | None = "acme",
        scope: object = "exports.read exports.write",
        lifetime: float = 600,
        without: Iterable[str] = (),
        headers: Mapping[str, Any] | None = None,
        **claims: Any,
    ) -> str:
        """A token that the tests' servers accept, unless told otherwise."""
        kid = kid or next(iter(self.keys))
        algorithm, key = self.keys[kid]
        now = time.time()
        said = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "somebody",
            "nbf": int(now) - 3600,
            "exp": int(now + lifetime),
            "tenant": tenant,
            "scope": scope,
            **claims,
        }
        kept = {name: value for name, value in said.items() if name not in set(without)}
        # By hand: the library signs nothing that is odd.
        header = {"alg": algorithm, "typ": "JWT", "kid": kid, **(headers or {})}
        text = f"{encoded(header)}.{encoded(kept)}"
        signature = jwt.get_algorithm_by_name(algorithm).sign(text.encode(), key)
        return f"{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


# --- API keys


async def api_key(
    data_dir: Path,
    tenant: str = "acme",
    scopes: Iterable[Scope] = (Scope.ADMIN,),
    *,
    lifetime: timedelta | None = None,
) -> tuple[str, ApiKey]:
    """A key for the embedded server with that directory."""
    text, key = new_key(tenant, list(scopes), now=datetime.now(UTC), lifetime=lifetime)
    await FileKeyStore(data_dir).add(key)
    return text, key
