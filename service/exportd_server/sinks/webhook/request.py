"""What a caller and an operator say of a webhook, and what both come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    field_validator,
    model_validator,
)

from exportd_server.platform.egress import refusal
from exportd_server.sinks.base import PLACE, BadSinkRequest
from exportd_server.sinks.webhook.headers import BadHeader, read_headers
from exportd_server.sinks.webhook.signature import MOST_KEYS, read_key
from exportd_server.sinks.webhook.url import BadUrl, Url, parse_url

# Whatever is wrong with a value, the value may be a secret: errors do not repeat it.
_CONFIG = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
_Seconds = Annotated[float, Field(gt=0, le=3600)]


class WebhookRequest(BaseModel):
    """What a caller says. See `WebhookSink` in the contract."""

    model_config = _CONFIG

    url: str | SecretStr = Field("", repr=False)
    mode: Literal["NOTIFY", "PUSH_PARTS"] = "NOTIFY"
    headers: dict[str, SecretStr] = {}
    secret: SecretStr | None = None

    @field_validator("url")
    @classmethod
    def _query_is_secret(cls, url: str | SecretStr) -> str | SecretStr:
        # Many receivers have their key there.
        return SecretStr(url) if isinstance(url, str) and "?" in url else url

    @property
    def address(self) -> str:
        """The URL in clear."""
        return self.url if isinstance(self.url, str) else self.url.get_secret_value()


class WebhookConnection(BaseModel):
    """What the operator configures."""

    model_config = _CONFIG

    url: Annotated[str, PLACE] = Field(
        "",
        repr=False,
        description="where to send; a request may name this or what lies below its path, "
        "and nothing else. Empty: each request names its own",
    )
    signing_keys: tuple[SecretStr, ...] = Field(
        (),
        max_length=MOST_KEYS,
        description="keys that sign where a request has none of its own: all of them, the "
        "first one first",
    )
    headers: dict[str, SecretStr] = Field(
        {}, description="headers to send besides; only with `url`"
    )
    allow_http: bool = Field(
        default=False, description="let requests name http:// URLs, which encrypt nothing"
    )
    allow_private: tuple[IPvAnyNetwork, ...] = Field(
        (), description="networks to connect to although they are not public"
    )
    ca_file: Path | None = Field(
        None, description="PEM file of the authorities to trust instead of the public ones"
    )
    connect_timeout: _Seconds = Field(
        10.0, description="seconds for the lookup of the name and the connection"
    )
    read_timeout: _Seconds = Field(
        30.0,
        description="seconds a receiver may take to answer once it has the request, and "
        "may take nothing of the request before",
    )

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        if self.url:
            try:
                _judge(parse_url(self.url), self)
            except BadUrl as error:
                raise ValueError(f"url {error}") from None
        elif self.headers:
            # They would go wherever a caller points.
            raise ValueError("headers need url: they may be secret")
        try:
            read_headers(self.headers)
        except BadHeader as error:
            raise ValueError(str(error)) from None
        for place, key in enumerate(self.signing_keys):
            try:
                read_key(key.get_secret_value())
            except ValueError as error:
                raise ValueError(f"signing_keys[{place}] {error}") from None
        return self


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send, with which headers besides, signed by which keys."""

    url: Url = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    keys: tuple[bytes, ...] = field(repr=False)


def read_target(request: WebhookRequest, connection: WebhookConnection | None) -> Target:
    """What a request comes to with its connection. Raises `BadSinkRequest`."""
    config = connection or WebhookConnection()
    return Target(_url(request, config), _headers(request, config), _keys(request, config))


def _url(request: WebhookRequest, connection: WebhookConnection) -> Url:
    if not request.address and not connection.url:
        raise BadSinkRequest("url", "is missing; the connection has none either")
    try:
        url = parse_url(request.address or connection.url)
        _judge(url, connection)
    except BadUrl as error:
        raise BadSinkRequest("url", str(error)) from None
    if connection.url and not parse_url(connection.url).covers(url):
        raise BadSinkRequest(
            "url",
            "is not the connection's, nor below it; leave it empty, or use another "
            "connection",
        )
    return url


def _judge(url: Url, connection: WebhookConnection) -> None:
    if url.scheme == "http" and not connection.allow_http:
        raise BadUrl("is not encrypted; use https://")
    if url.address is not None:
        what = refusal(url.address, connection.allow_private)
        if what is not None:
            raise BadUrl(
                f"has an address that is {what}; use a public one, or a connection that "
                "allows it"
            )


def _headers(request: WebhookRequest, connection: WebhookConnection) -> dict[str, str]:
    fixed = read_headers(connection.headers)
    try:
        own = read_headers(request.headers)
    except BadHeader as error:
        raise BadSinkRequest(error.field, error.description) from None
    for name in request.headers:
        if name.lower() in fixed:
            raise BadSinkRequest(
                f"headers[{name!r}]", "is set by the connection; leave it out"
            )
    return own | fixed


def _keys(request: WebhookRequest, connection: WebhookConnection) -> tuple[bytes, ...]:
    secret = request.secret.get_secret_value() if request.secret else ""
    if secret:
        try:
            return (read_key(secret),)
        except ValueError as error:
            raise BadSinkRequest("secret", str(error)) from None
    if not connection.signing_keys:
        raise BadSinkRequest(
            "secret",
            "is missing, and the connection has no key to sign with; write whsec_ and the "
            "base64 of 24 to 64 random bytes",
        )
    return tuple(read_key(key.get_secret_value()) for key in connection.signing_keys)
