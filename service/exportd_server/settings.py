"""What an operator may set: a TOML file, then `EXPORTD_*` variables, then flags; the
later wins. Keys that do not exist are refused."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from exportd_server.addresses import address_keys, check_address, is_loopback, rules
from exportd_server.errors import ConfigurationError
from exportd_server.platform.urls import BadUrl, parse_url
from exportd_server.store.key import is_tenant

PREFIX = "EXPORTD_"

PositiveInt = Annotated[int, Field(ge=1)]
MOST_SECONDS = 100 * 366 * 86_400
PositiveSeconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A table of the settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LedgerSettings(Section):
    """Where jobs are remembered."""

    url: SecretStr = Field(
        SecretStr(""),
        description="`postgresql://USER:PASSWORD@HOST:PORT/DATABASE` for a fleet, or "
        "`sqlite:///PATH` for one process; empty: a file in data_dir",
    )
    connections: PositiveInt = Field(
        8, description="connections of this process to PostgreSQL, besides two of its own"
    )


class S3Settings(Section):
    """How outputs get to S3, or to whatever speaks its language."""

    endpoint_url: str | None = Field(
        None, description="`https://HOST:PORT` of the service; absent: AWS"
    )
    public_endpoint_url: str | None = Field(
        None,
        description="`https://HOST:PORT` of the same service as callers reach it, for "
        "download URLs; absent: `store.s3.endpoint_url`",
    )
    region: str | None = Field(
        None,
        description="region of the bucket; absent: as AWS is configured, else us-east-1",
    )
    path_style: bool = Field(
        default=False,
        description="bucket in the path and not in the host's name, as most services "
        "other than AWS want it",
    )
    access_key_id: str | None = Field(
        None, description="absent: looked for as the AWS tools do"
    )
    secret_access_key: SecretStr | None = Field(None, description="goes with it")
    session_token: SecretStr | None = Field(None, description="goes with temporary keys")
    ca_file: Path | None = Field(
        None, description="certificates to trust; absent: the system's"
    )
    part_bytes: Annotated[int, Field(ge=5 * 2**20, le=2**30)] = Field(
        8 * 2**20, description="bytes sent in one piece"
    )
    parts_in_flight: PositiveInt = Field(
        2, description="pieces on their way at a time, for each part that is written"
    )
    attempts: PositiveInt = Field(5, description="tries of each call")
    connect_timeout: PositiveSeconds = Field(5.0, description="seconds to connect")
    read_timeout: PositiveSeconds = Field(
        30.0, description="seconds that an answer, or more of it, may take"
    )
    call_timeout: PositiveSeconds = Field(
        120.0, description="seconds of a call with all its tries"
    )


class StoreSettings(Section):
    """Where outputs lie."""

    url: str = Field(
        "",
        description="`file:///PATH`, or `s3://BUCKET/PREFIX`; empty: a directory in "
        "data_dir",
    )
    s3: S3Settings = S3Settings()


class WorkerSettings(Section):
    """How exports are worked off."""

    enabled: bool = Field(
        default=True, description="whether `serve` works off exports beside the API"
    )
    concurrency: PositiveInt = Field(2, description="exports at a time in this process")
    shard_rows: PositiveInt = Field(
        2_000_000,
        description="rows of the source that one task reads; larger exports are cut for "
        "several workers",
    )
    running_per_tenant: PositiveInt | None = Field(
        None, description="exports of one tenant at a time, over all processes"
    )
    max_attempts: PositiveInt = Field(
        3, description="how often work on a job is taken up before it fails"
    )
    lease: PositiveSeconds = Field(
        15.0, description="seconds after which a silent worker's work is taken over"
    )
    poll: PositiveSeconds = Field(
        5.0, description="seconds between looks for work that nothing announced"
    )
    source_timeout: PositiveSeconds = Field(
        900.0,
        description="seconds that a source may plan, or give no rows; the attempt fails "
        "then, and another one follows",
    )
    bytes_in_flight: PositiveInt = Field(
        6 * 2**20, description="bytes of batches between reading and encoding an export"
    )


class LimitSettings(Section):
    """What one export, one caller, or all callers together may use. What is counted is
    counted in each process, but for jobs, which are counted over the fleet."""

    max_rows: PositiveInt | None = Field(
        None, description="most rows of one export; absent: no cap"
    )
    max_bytes: PositiveInt | None = Field(
        None, description="most stored bytes of one export; absent: no cap"
    )
    max_seconds: PositiveInt | None = Field(
        86_400,
        description="longest that one export may run, from its start, whoever works on "
        "it; absent: no cap",
    )
    max_active_jobs: PositiveInt | None = Field(
        100, description="most pending and running jobs of one tenant"
    )
    max_queued_jobs: PositiveInt | None = Field(
        None, description="most pending jobs of one tenant; absent: `max_active_jobs` alone"
    )
    requests_per_second: PositiveSeconds | None = Field(
        1000.0,
        description="calls of one tenant a second, over time; absent: no limit. About a "
        "third of what one process answers, and ten a second for each active job",
    )
    request_burst: PositiveInt = Field(
        2000, description="calls of one tenant at once, above that rate"
    )
    max_calls_per_tenant: PositiveInt | None = Field(
        None,
        description="gRPC calls of one tenant under way at a time, streams included; "
        "absent: half of `max_calls`",
    )
    max_watches_per_tenant: PositiveInt = Field(
        500, description="WatchJob calls of one tenant at a time"
    )
    max_watches: PositiveInt = Field(2000, description="WatchJob calls at a time")
    max_downloads_per_tenant: PositiveInt = Field(
        64, description="downloads of one tenant at a time, over gRPC and HTTP together"
    )
    max_downloads: PositiveInt = Field(
        512, description="downloads at a time, over gRPC and HTTP together"
    )
    max_calls: PositiveInt = Field(
        4000,
        description="gRPC calls under way at a time, and a tenth of that of health and "
        "reflection, which anybody may call",
    )
    max_open_seconds: PositiveSeconds = Field(
        300.0,
        description="seconds that a call of health or reflection, which anybody may make, "
        "may last; of its streams one connection has at most a tenth, or 4",
    )
    max_request_bytes: Annotated[int, Field(ge=4096, le=64 * 2**20)] = Field(
        2**20, description="largest gRPC request"
    )
    request_timeout: PositiveSeconds = Field(
        10.0, description="seconds in which the request of a gRPC call must have come"
    )
    max_connections: PositiveInt = Field(
        1000, description="gRPC connections at a time, of each port"
    )
    max_http_connections: PositiveInt = Field(
        1000, description="connections of the HTTP port at a time"
    )
    max_streams_per_connection: PositiveInt = Field(
        250, description="calls at a time on one gRPC connection; further ones wait"
    )
    ping_seconds: PositiveSeconds = Field(
        60.0, description="the server pings a connection that was quiet for so long"
    )
    ping_timeout: PositiveSeconds = Field(
        20.0, description="a connection that leaves a ping unanswered so long is closed"
    )
    min_ping_seconds: PositiveSeconds = Field(
        20.0,
        description="shortest time between pings of a client without data in between; "
        "each that comes sooner is a strike",
    )
    max_ping_strikes: PositiveInt = Field(
        2, description="strikes after which a client's connection is closed"
    )
    max_idle_seconds: PositiveSeconds = Field(
        900.0, description="a gRPC connection without a call for so long is closed"
    )
    max_age_seconds: PositiveSeconds | None = Field(
        None,
        description="a gRPC connection takes no new call after so long, for clients to "
        "spread over the processes behind one address anew; absent: never",
    )


class RetentionSettings(Section):
    """How long jobs and outputs are kept, in seconds."""

    ttl: PositiveInt = Field(86_400, description="when the request does not say")
    max_ttl: Annotated[int, Field(ge=1, le=MOST_SECONDS)] = Field(
        604_800, description="most that a request may ask for, and not below `ttl`"
    )
    reap_interval: Annotated[float, Field(ge=1)] = Field(
        300.0, description="between two looks for expired jobs; at least 1"
    )
    orphan_interval: Annotated[float, Field(ge=60)] = Field(
        86_400.0,
        description="between two looks for output that belongs to no job, which goes at "
        "the second look that finds it; at least 60",
    )

    @model_validator(mode="after")
    def _default_within_bounds(self) -> Self:
        if self.ttl > self.max_ttl:
            raise ValueError(f"ttl ({self.ttl}) must not pass max_ttl ({self.max_ttl})")
        return self


class AuditSettings(Section):
    """Records of who did what."""

    retention_days: Annotated[int, Field(ge=1, le=36_500)] = Field(
        90, description="days that audit records are kept in the ledger"
    )


class PartSettings(Section):
    """Size of parts when the request does not say, in stored bytes."""

    text_bytes: Annotated[int, Field(ge=65_536)] = Field(
        256 * 2**20, description="CSV, JSON Lines and Arrow"
    )
    parquet_bytes: Annotated[int, Field(ge=65_536)] = Field(
        2**30, description="Parquet, whose parts do not join into one file"
    )


def _split_keys(value: object) -> object:
    """A variable has the keys in one text, or as JSON; a file may have a list."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.lstrip().startswith("[") else value.split()


def _long_keys(keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if any(len(key.get_secret_value().encode()) < 32 for key in keys):
        raise ValueError("each key needs at least 32 bytes: openssl rand -base64 32")
    return keys


SecretKeys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_keys)]


class DeliverySettings(Section):
    """How outputs are delivered to sinks."""

    concurrency: PositiveInt = Field(
        64,
        description="deliveries at a time in this process, of all sinks together; of one "
        "tenant at most half of them, and less the more others have",
    )
    block_timeout: Annotated[float, Field(ge=0, le=MOST_SECONDS)] = Field(
        600.0,
        description="seconds in all that a task of an export waits for room in full queues "
        "whose `on_full` is `BLOCK`; then the parts that find none are dropped",
    )
    secret_keys: SecretKeys = Field(
        (),
        description="keys of at least 32 characters that encrypt the secrets of callers, "
        "in a list or one text with spaces between: the first encrypts, all decrypt; none: "
        "one that is made and kept in data_dir, for the embedded ledger only",
    )

    _long_enough = field_validator("secret_keys")(_long_keys)


class JwtSettings(Section):
    """Which tokens are accepted."""

    issuer: str = Field(
        "", description="who signs them (`iss`); empty: tokens are not accepted"
    )
    audience: str = Field("", description="whom they are for (`aud`): this service")
    jwks_url: SecretStr = Field(
        SecretStr(""),
        description="`https://` URL of the issuer's keys (JWKS); this or `jwks_file`",
    )
    jwks_file: Path | None = Field(
        None, description="file of the issuer's keys; read anew when they are looked for"
    )
    algorithms: Annotated[
        tuple[Literal["RS256", "ES256", "EdDSA"], ...], Field(min_length=1)
    ] = Field(("RS256", "ES256", "EdDSA"), description="algorithms that are accepted")
    tenant_claim: str = Field("tenant", description="claim that names the tenant")
    scopes_claim: str = Field(
        "scope", description="claim that names the scopes, in one text or a list"
    )
    leeway_seconds: Annotated[float, Field(ge=0, le=300)] = Field(
        30.0, description="seconds that clocks may differ by"
    )
    require_nbf: bool = Field(
        default=False,
        description="whether a token must say from when on it is valid (`nbf`), which many "
        "issuers do not. When it says so, it is checked in any case",
    )
    refresh_seconds: PositiveSeconds = Field(
        300.0,
        description="seconds between looks for new keys; an unknown one is looked for at "
        "once, every 10 s at most",
    )

    @field_validator("jwks_url")
    @classmethod
    def _cannot_be_forged(cls, given: SecretStr) -> SecretStr:
        if not given:
            return given
        try:
            url = parse_url(given.get_secret_value(), {"https", "http"})
        except BadUrl as error:
            raise ValueError(f"is no URL: it {error}") from None
        ((host, _),) = url.hosts
        if url.scheme == "http" and not is_loopback(host.strip("[]")):
            raise ValueError("must be https://..., or http:// on this very machine")
        return given

    @model_validator(mode="after")
    def _all_or_nothing(self) -> Self:
        if not self.issuer:
            if self.audience or self.jwks_url or self.jwks_file:
                raise ValueError("issuer is missing; without it no token is accepted")
            return self
        if not self.audience:
            raise ValueError("audience is missing; tokens for others must not work here")
        if bool(self.jwks_url) == bool(self.jwks_file):
            raise ValueError("give jwks_url or jwks_file, and not both")
        return self


class CertificateSettings(Section):
    """Whose a client certificate is. Exactly one of `cn`, `dns` and `uri` names it."""

    cn: str = Field("", description="the subject's common name")
    dns: str = Field("", description="a DNS name among the subject's alternative names")
    uri: str = Field("", description="a URI among the subject's alternative names")
    tenant: str = Field(description="the tenant it calls for")
    scopes: Annotated[
        tuple[Literal["exports.read", "exports.write", "admin"], ...], Field(min_length=1)
    ] = Field(description="what it may do")

    @field_validator("tenant")
    @classmethod
    def _is_a_tenant(cls, text: str) -> str:
        if not is_tenant(text):
            raise ValueError(
                "must be 1 to 63 small letters, digits, - and _, a letter or digit first"
            )
        return text

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        if sum(map(bool, (self.cn, self.dns, self.uri))) != 1:
            raise ValueError("give exactly one of cn, dns and uri")
        return self


class IdentitySettings(Section):
    """How callers identify themselves. Several ways may be open at once; while none is,
    everybody may do everything."""

    api_keys: bool = Field(
        default=False,
        description="accept the API keys that `exportd-server keys` manages",
    )
    jwt: JwtSettings = JwtSettings()
    mtls: tuple[CertificateSettings, ...] = Field(
        (),
        description="callers with a client certificate: a list of tables with one of `cn`, "
        "`dns`, `uri`, and `tenant` and `scopes`",
    )

    @property
    def required(self) -> bool:
        """Whether callers must identify themselves."""
        return self.api_keys or bool(self.jwt.issuer) or bool(self.mtls)


class TlsSettings(Section):
    """Encryption of the gRPC port. The files are PEM, and are read anew when they
    change."""

    cert_file: Path | None = Field(
        None, description="certificate of the server and its chain; absent: plain text"
    )
    key_file: Path | None = Field(None, description="private key that goes with it")
    client_ca_file: Path | None = Field(
        None, description="certificates that those of clients must be signed by"
    )
    require_client_cert: bool = Field(
        default=False,
        description="whether `listen` is only for clients with a certificate; otherwise "
        "it asks nobody for one",
    )
    client_cert_listen: str = Field(
        "",
        description="`host:port` of a second port, for clients with a certificate, where "
        "others come without; empty: none",
    )
    allow_plaintext: bool = Field(
        default=False,
        description="listen beyond loopback without TLS, or give download URLs of "
        "`http://`, although credentials and data can be read on the way, because "
        "something in front of the server encrypts",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together; give both, or none")
        asks = self.require_client_cert or bool(self.client_cert_listen)
        if (self.client_ca_file is not None) != asks:
            raise ValueError(
                "client_ca_file goes with require_client_cert or client_cert_listen, "
                "which say where clients are asked for a certificate"
            )
        if asks and self.cert_file is None:
            raise ValueError("client certificates need cert_file and key_file")
        if self.require_client_cert and self.client_cert_listen:
            raise ValueError("give require_client_cert or client_cert_listen, not both")
        return self


class MetricsSettings(Section):
    """Where Prometheus finds metrics."""

    listen: str = Field(
        "", description="`host:port` of an HTTP port that serves `/metrics`; empty: none"
    )
    allow_remote: bool = Field(
        default=False,
        description="listen beyond loopback although anybody may then read the metrics",
    )


class TracingSettings(Section):
    """Where traces go, by OpenTelemetry. Needs the extra `tracing`."""

    endpoint: str = Field(
        "",
        description="`http://HOST:PORT` or `https://HOST:PORT` of what takes OTLP over "
        "gRPC, usually at port 4317; empty: nothing is traced",
    )
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="share of calls that are traced, of those that come without a trace; "
        "of others the caller has decided",
    )
    headers: SecretStr = Field(
        SecretStr(""),
        description="`name=value` with commas between, sent along with traces, such as "
        "`authorization=Bearer%20TOKEN`; values are percent-encoded",
    )

    @field_validator("endpoint")
    @classmethod
    def _is_an_endpoint(cls, text: str) -> str:
        if not text:
            return text
        try:
            url = parse_url(text, {"https", "http"})
        except BadUrl as error:
            raise ValueError(f"is no URL: it {error}") from None
        ((_, port),) = url.hosts
        if url.user or url.password or url.path or "?" in text or port is None:
            raise ValueError(
                "must be http://HOST:PORT or https://HOST:PORT and no more; credentials go "
                "to tracing.headers"
            )
        return text

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.headers.get_secret_value():
            return self
        read_headers(self.headers)
        if not self.endpoint:
            raise ValueError("endpoint is missing; without it headers go nowhere")
        url = parse_url(self.endpoint, {"https", "http"})
        ((host, _),) = url.hosts
        if url.scheme == "http" and not is_loopback(host.strip("[]")):
            raise ValueError(
                "headers could be read on the way; give an endpoint of https://..., or of "
                "http:// on this very machine"
            )
        return self


def read_headers(text: SecretStr) -> dict[str, str]:
    """The pairs of `tracing.headers`. Raises `ValueError`, which repeats no value."""
    read: dict[str, str] = {}
    for pair in filter(None, map(str.strip, text.get_secret_value().split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        value = unquote(value)
        # What metadata of gRPC may be; names ending in -bin have bytes.
        known = re.fullmatch(r"[0-9a-z_.-]+(?<!-bin)", name.lower())
        if not (equals and known and re.fullmatch(r"[ -~]+", value)):
            raise ValueError(
                "headers must be name=value with commas between, each value percent-encoded"
            )
        read[name.lower()] = value
    return read


class DownloadSettings(Section):
    """How downloads are sent."""

    chunk_bytes: Annotated[int, Field(ge=4096, le=2 * 2**20)] = Field(
        2**20, description="data of one message; smaller is fairer to other calls"
    )
    bytes_in_flight: PositiveInt = Field(
        16 * 2**20,
        description="data on its way to all readers together, each of whom may have 64 KiB "
        "in any case; messages are the smaller the more downloads there are",
    )
    stall_timeout: PositiveSeconds = Field(
        60.0,
        description="seconds until a reader or watcher that takes nothing is sent no more",
    )
    url_lifetime: PositiveInt = Field(
        3600, description="seconds that download URLs work when the request does not say"
    )
    max_url_lifetime: Annotated[int, Field(ge=1, le=7 * 86_400)] = Field(
        86_400,
        description="most that a request may ask for, and not below `url_lifetime`; at "
        "most a week, as S3 has it",
    )

    @model_validator(mode="after")
    def _default_within_bounds(self) -> Self:
        if self.url_lifetime > self.max_url_lifetime:
            raise ValueError(
                f"url_lifetime ({self.url_lifetime}) must not pass max_url_lifetime "
                f"({self.max_url_lifetime})"
            )
        return self


class HttpSettings(Section):
    """The HTTP port of `serve`, for download URLs of outputs that are not on S3, and for
    the console."""

    listen: str = Field(
        "", description="`host:port` of the HTTP port; empty: there is none"
    )
    public_url: str = Field(
        "",
        description="what callers reach the HTTP port by, such as "
        "`https://exports.example.com`; empty: `http://` and `http.listen`",
    )
    signing_keys: SecretKeys = Field(
        (),
        description="keys of at least 32 characters that sign download URLs, in a list or "
        "one text with spaces between: the first signs, all are accepted; none: one that "
        "is made and kept in data_dir, for the embedded ledger only",
    )

    console: bool = Field(
        default=False,
        description="serve pages at `/console`, to look at jobs and deliveries and to act "
        "on them",
    )
    console_session: Annotated[int, Field(ge=60, le=86_400)] = Field(
        3600, description="seconds after which the console has one sign in again"
    )

    _long_enough = field_validator("signing_keys")(_long_keys)

    @field_validator("public_url")
    @classmethod
    def _is_a_base(cls, text: str) -> str:
        parts = urlsplit(text)
        if text and not (
            parts.scheme in {"http", "https"}
            and parts.hostname
            and parts.port != 0
            and not parts.query
            and not parts.fragment
            and "@" not in parts.netloc
            and text.isascii()
            and text.isprintable()
            and " " not in text
        ):
            raise ValueError("must be https://HOST or http://HOST:PORT, maybe with a path")
        return text


class LogSettings(Section):
    """How events are logged, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level to log"
    )
    style: Literal["json", "console"] = Field(
        "json", description="`json` for machines, `console` for people"
    )


class Settings(BaseSettings):
    """All settings of the server."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
    )

    listen: str = Field("127.0.0.1:50051", description="`host:port` of the gRPC API")
    allow_unauthenticated: bool = Field(
        default=False,
        description="listen beyond loopback although anybody may then do anything",
    )
    data_dir: Path = Field(
        Path("exportd-data"), description="directory of everything that has no URL"
    )
    catalogue: Path | None = Field(
        None,
        description="`datasets.toml`; absent: sample data, generated into data_dir",
    )
    sinks: Path | None = Field(
        None,
        description="`sinks.toml`, the connections of sinks; absent: there are none",
    )
    sample_rows: PositiveInt = Field(
        1_000_000, description="token transfers in the sample data"
    )
    drain_timeout: PositiveSeconds = Field(
        20.0, description="seconds that work may go on after a signal to stop"
    )
    ledger: LedgerSettings = LedgerSettings()
    store: StoreSettings = StoreSettings()
    worker: WorkerSettings = WorkerSettings()
    limits: LimitSettings = LimitSettings()
    retention: RetentionSettings = RetentionSettings()
    audit: AuditSettings = AuditSettings()
    parts: PartSettings = PartSettings()
    download: DownloadSettings = DownloadSettings()
    http: HttpSettings = HttpSettings()
    delivery: DeliverySettings = DeliverySettings()
    identity: IdentitySettings = IdentitySettings()
    tls: TlsSettings = TlsSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the base's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over what is passed in: the file. Flags are merged before."""
        return (env_settings, init_settings)


class Flags(Section):
    """The settings that have a flag, checked as the others are."""

    listen: str | None = None
    allow_unauthenticated: bool | None = None
    data_dir: Path | None = None
    catalogue: Path | None = None
    sample_rows: PositiveInt | None = None
    workers: bool | None = None


def load_settings(
    file: Path | None,
    flags: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    *,
    serves: bool = True,
) -> Settings:
    """Read the settings; raises `ConfigurationError` naming the key and the mend. One
    that does not serve need not be able to listen."""
    for unknown in unknown_variables(os.environ if environ is None else environ):
        raise ConfigurationError(unknown)
    values = read_settings_file(file) if file is not None else {}
    try:
        settings = Settings(**values)
        given = Flags(**{k: v for k, v in flags.items() if v is not None})
    except ValidationError as error:
        raise ConfigurationError(explained(mistakes(error)[0], file)) from None
    except SettingsError as error:
        # It names the field, and not the value.
        raise ConfigurationError(
            f"environment: {error}; lists and tables stand there as JSON"
        ) from None
    settings = with_flags(settings, given)
    for key in address_keys(serves=serves):
        check_address(settings, key)
    for rule in rules(serves=serves):
        problem = rule.problem_in(settings)
        if problem:
            raise ConfigurationError(problem)
    return settings


def with_flags(settings: Settings, given: Flags) -> Settings:
    """The settings, those that a flag gives replaced."""
    update = {name: getattr(given, name) for name in given.model_fields_set}
    if "workers" in update:
        enabled = {"enabled": update.pop("workers")}
        update["worker"] = settings.worker.model_copy(update=enabled)
    return settings.model_copy(update=update)


def read_settings_file(file: Path) -> dict[str, Any]:
    """What is in a TOML file; raises `ConfigurationError`."""
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigurationError(
            f"{file}: cannot be read ({error.strerror}); name a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: is not valid TOML: {error}") from None


def keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every key there is, dotted."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def variable(key: str) -> str:
    """The environment variable of a dotted key."""
    return PREFIX + key.replace(".", "__").upper()


CLIENT_VARIABLES = frozenset({"EXPORTD_SERVER", "EXPORTD_TOKEN", "EXPORTD_WEBHOOK_SECRET"})
"""Variables of the client command, which may run in the same environment."""


def unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """One line for each variable that looks like a setting and is none."""
    known = {variable(key) for key in keys()} | CLIENT_VARIABLES
    for name in environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            yield f"environment: {name} is no setting{_hint(name.upper(), known)}"


def _hint(name: str, known: set[str]) -> str:
    sections = {key.partition(".")[0] for key in known if "." in key}
    close = difflib.get_close_matches(name, sorted(known | sections), n=1)
    return f"; did you mean {close[0]}?" if close else "; remove it"


def mistakes(error: ValidationError) -> list[ErrorDetails]:
    """Each for itself, without the value, which may be a secret."""
    return error.errors(include_url=False, include_input=False)


def explained(mistake: ErrorDetails, file: Path | None) -> str:
    """One line for the operator."""
    key, known, where = _dotted(mistake["loc"]), set(keys()), str(file or "settings")
    if mistake["type"] == "extra_forbidden":
        return f"{where}: {key} is no setting{_hint(key, known)}"
    # A list has one variable, and a table none.
    named = field_of(mistake)
    if named in known:
        where += f" (or {variable(named)})"
    return f"{where}: {key}: {mistake['msg']}"


def field_of(mistake: ErrorDetails) -> str:
    """The field, or table, that a mistake is in, dotted. Of a list the whole, and of what
    is missing what lacks it."""
    path = mistake["loc"][:-1] if mistake["type"] == "missing" else mistake["loc"]
    return _dotted(takewhile(lambda step: isinstance(step, str), path))


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))
