"""Where the settings say that things lie: the ledger, the outputs, what is kept beside
them. Nothing here is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import SecretStr

from exportd_server.errors import ConfigurationError
from exportd_server.settings import Settings

if TYPE_CHECKING:
    from exportd_server.store.s3_client import S3Options

KEPT_SECRETS = "secrets.key"
"""File in data_dir that secrets of callers are kept under, without a setting."""
KEPT_LINK_KEY = "download-url.key"
"""File in data_dir that signs download URLs, without a setting."""


def is_embedded(settings: Settings) -> bool:
    """Whether the ledger is a file of this one process, and no server for a fleet.
    Raises `ConfigurationError`."""
    url = ledger_url(settings)
    scheme = url.partition(":")[0]
    if url and scheme not in ("sqlite", "postgresql", "postgres"):
        raise ConfigurationError(
            "ledger.url: must begin with sqlite:/// for one process, or with postgresql://"
        )
    return scheme in ("", "sqlite")


def ledger_url(settings: Settings) -> str:
    """The ledger's URL in clear; empty for the file in data_dir."""
    return settings.ledger.url.get_secret_value()


def ledger_file(settings: Settings) -> Path:
    """The file of an embedded ledger. Raises `ConfigurationError`."""
    return _path(
        ledger_url(settings), "sqlite", "ledger.url", settings.data_dir / "ledger.db"
    )


def refuse_embedded(settings: Settings, what: str) -> None:
    """Raises `ConfigurationError` where what only a fleet can do has no server."""
    if is_embedded(settings):
        raise ConfigurationError(
            f"ledger.url: {what} cannot share the embedded ledger, whose file belongs to "
            "one process; use a server: EXPORTD_LEDGER__URL=postgresql://..."
        )


def outputs(settings: Settings) -> Path | S3Options:
    """The directory of the outputs, or the place on S3. Raises `ConfigurationError`."""
    if not settings.store.url and not is_embedded(settings):
        raise ConfigurationError(
            "store.url: the processes of a fleet need one place for their outputs; give "
            "s3://BUCKET/PREFIX, or file:///PATH of a directory that all of them share"
        )
    if _split("store.url", settings.store.url).scheme == "s3":
        return _on_s3(settings)
    return _path(settings.store.url, "file", "store.url", settings.data_dir / "outputs")


def _on_s3(settings: Settings) -> S3Options:
    # Its SDK takes a while to load, and most do without.
    from exportd_server.store.s3_client import S3Options  # noqa: PLC0415 - see above

    url = _split("store.url", settings.store.url)
    if url.query or url.fragment or "@" in url.netloc:
        raise ConfigurationError(
            "store.url: s3://BUCKET/PREFIX has no more than that; keys, region and "
            "endpoint are settings of store.s3"
        )
    s3 = settings.store.s3
    return S3Options(
        bucket=url.netloc,
        prefix=url.path.strip("/"),
        endpoint_url=s3.endpoint_url,
        public_endpoint_url=s3.public_endpoint_url,
        region=s3.region,
        path_style=s3.path_style,
        access_key_id=s3.access_key_id,
        secret_access_key=_revealed(s3.secret_access_key),
        session_token=_revealed(s3.session_token),
        ca_file=s3.ca_file,
        part_bytes=s3.part_bytes,
        parts_in_flight=s3.parts_in_flight,
        attempts=s3.attempts,
        connect_timeout=s3.connect_timeout,
        read_timeout=s3.read_timeout,
        call_timeout=s3.call_timeout,
    )


def _revealed(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _path(url: str, scheme: str, key: str, default: Path) -> Path:
    """The path in a `scheme:///path` URL."""
    if not url:
        return default
    parts = _split(key, url)
    # It is not repeated: what was meant may be another URL, with a password.
    if parts.scheme != scheme or parts.netloc or not parts.path or parts.query:
        other = " or s3://BUCKET/PREFIX" if key == "store.url" else ""
        raise ConfigurationError(f"{key}: is not supported; use {scheme}:///PATH{other}")
    return Path(unquote(parts.path))


def _split(key: str, url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        # Its text repeats a part of the URL.
        raise ConfigurationError(f"{key}: is no URL; percent-encode what is odd") from None
