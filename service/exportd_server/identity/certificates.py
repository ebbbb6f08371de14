"""Client certificates: which caller one stands for. They have been verified before, in the
handshake."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography import x509
from cryptography.x509.oid import NameOID

from exportd_server.errors import Unauthenticated
from exportd_server.identity.base import Method, Principal, Scope
from exportd_server.platform.clock import Clock


@dataclass(frozen=True, slots=True)
class CertificateName:
    """A name in a certificate: `kind` is `cn`, `dns` or `uri`."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.text}"


@dataclass(frozen=True, slots=True)
class _Certificate:
    names: frozenset[CertificateName]
    not_after: datetime


class CertificateCallers:
    """The callers that the operator has named, found by a name in their certificate. It
    must be the same, letter by letter: no wildcards, no parts of names."""

    def __init__(
        self,
        callers: Mapping[CertificateName, tuple[str, Collection[Scope]]],
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._callers = {
            name: Principal(str(name), tenant, frozenset(scopes), Method.CERTIFICATE)
            for name, (tenant, scopes) in callers.items()
        }

    def authenticate(self, pem: bytes) -> Principal:
        """Whose certificate it is. Raises `Unauthenticated`, also when it has expired
        since the connection was made."""
        try:
            certificate = _read(pem)
        except _UNREADABLE as error:
            raise Unauthenticated(
                cause=f"unreadable client certificate: {type(error).__name__}"
            ) from None
        if certificate.not_after <= self._clock.now():
            raise Unauthenticated("the client certificate has expired")
        found = [self._callers[name] for name in certificate.names if name in self._callers]
        if len(found) != 1:
            # With two it would be chance whose call it is.
            shown = ", ".join(sorted(map(str, certificate.names)))
            raise Unauthenticated(
                "the client certificate names "
                + ("several callers" if found else "nobody who is known here"),
                cause=f"client certificate of {len(found)} callers: {shown}",
            )
        return found[0]


_UNREADABLE = (
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What the library makes of certificates that an authority may have signed all the same."""


@lru_cache(maxsize=1024)
def _read(pem: bytes) -> _Certificate:
    """A connection shows the same certificate with each call."""
    certificate = x509.load_pem_x509_certificate(pem)
    names = {
        CertificateName("cn", _text(attribute.value))
        for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    }
    try:
        extension = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound:
        pass
    else:
        other = extension.value
        for kind, type_ in (("dns", x509.DNSName), ("uri", x509.UniformResourceIdentifier)):
            names |= {
                CertificateName(kind, text) for text in other.get_values_for_type(type_)
            }
    return _Certificate(frozenset(names), certificate.not_valid_after_utc)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
