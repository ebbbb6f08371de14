"""TLS of the gRPC port, from files that may be replaced while the server runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from exportd_server.errors import ConfigurationError
from exportd_server.platform import metrics_service as metrics

log = structlog.get_logger(__name__)

_BEGINNING = 0.5
"""Seconds that a handshake is given from asking for its certificate to having hold of it,
which is some microseconds of one thread: one that is stopped for longer would still use
what was freed."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Certificate chain, its private key, and the certificates that those of clients must
    be signed by, all in PEM."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def _paths(self) -> dict[str, Path]:
        named = {"cert_file": self.cert, "key_file": self.key}
        return (
            named if self.client_ca is None else named | {"client_ca_file": self.client_ca}
        )

    def signature(self) -> Hashable:
        """Another one whenever a file was replaced or written to."""
        found: list[Hashable] = []
        for path in self._paths().values():
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError as error:
                found.append(error.errno)
        return tuple(found)

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check them; blocks. Raises `ConfigurationError`."""
        content: dict[str, bytes] = {}
        for name, path in self._paths().items():
            try:
                content[name] = path.read_bytes()
            except OSError as error:
                raise ConfigurationError(
                    f"tls.{name}: {path} cannot be read ({error.strerror})"
                ) from None
        chain = self._certificates("cert_file", self.cert, content["cert_file"])
        try:
            key = serialization.load_pem_private_key(content["key_file"], password=None)
        except (ValueError, TypeError) as error:
            # A TypeError says that a password is needed, which nobody could type.
            raise ConfigurationError(
                f"tls.key_file: {self.key} holds no private key in PEM without a password"
            ) from error
        if _encoded(key.public_key()) != _encoded(chain[0].public_key()):
            raise ConfigurationError(
                f"tls.key_file: {self.key} is not the key of the first certificate in "
                f"{self.cert}"
            )
        if self.client_ca is not None:
            self._certificates("client_ca_file", self.client_ca, content["client_ca_file"])
        metrics.tls_not_after.set(min(one.not_valid_after_utc.timestamp() for one in chain))
        log.info(
            "tls certificate",
            subject=chain[0].subject.rfc4514_string(),
            not_after=chain[0].not_valid_after_utc.isoformat(),
        )
        return grpc.ssl_server_certificate_configuration(
            [(content["key_file"], content["cert_file"])],
            root_certificates=content.get("client_ca_file"),
        )

    def _certificates(self, name: str, path: Path, text: bytes) -> list[x509.Certificate]:
        try:
            return x509.load_pem_x509_certificates(text)
        except ValueError:
            raise ConfigurationError(
                f"tls.{name}: {path} holds no certificate in PEM"
            ) from None


class ServerTls:
    """Gives gRPC the certificates. The files are looked at with each new connection, so a
    renewed certificate serves the next one; one that is broken is told, and the last good
    one serves on."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises `ConfigurationError` when the files will not do."""
        self._files = files
        self._lock = threading.Lock()
        # Before the content: what is written in between is then read the next time.
        self._signature = files.signature()
        self._current = files.read()

    def credentials(self, *, require_client_cert: bool) -> grpc.ServerCredentials:
        """For a port. Without `require_client_cert` it asks clients for none at all: the
        library has nothing in between."""
        first = self._latest()
        # None is what the library's stubs do not know of.
        renewals: Callable[[], Any] = _Renewals(self._latest, first)
        return grpc.dynamic_ssl_server_credentials(
            first, renewals, require_client_authentication=require_client_cert
        )

    def _latest(self) -> grpc.ServerCertificateConfiguration:
        """Called in threads of the library, which must not see an exception."""
        with self._lock:
            signature = self._files.signature()
            if signature != self._signature:
                self._signature = signature
                try:
                    self._current = self._files.read()
                except ConfigurationError as error:
                    log.error(  # noqa: TRY400 - its text tells all
                        "new TLS files are not used; the last good ones serve on",
                        error=str(error),
                    )
                except Exception:
                    log.exception("new TLS files are not used; the last good ones serve on")
            return self._current


class _Renewals:
    """Tells gRPC of one port's new certificates, each once.

    The library frees what served before as soon as it is given something, be it the same,
    while another thread may just have taken it up for a handshake that begins: the process
    then crashes (github.com/grpc/grpc/issues/36693). So it is given something only when
    that is new, and handshakes time to begin before. It asks for one connection at a time;
    others wait until it has its answer, and may keep its threads from calls meanwhile.
    """

    def __init__(
        self,
        latest: Callable[[], grpc.ServerCertificateConfiguration],
        served: grpc.ServerCertificateConfiguration,
    ) -> None:
        self._latest = latest
        self._served = served

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Called in threads of the library."""
        latest = self._latest()
        if latest is self._served:
            return None
        self._served = latest
        time.sleep(_BEGINNING)
        return latest


def _encoded(key: PublicKeyTypes) -> bytes:
    """The same for the same key."""
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
