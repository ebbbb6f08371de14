"""URLs with passwords are read strictly, and what is wrong with one repeats none of it."""

from __future__ import annotations

from urllib.parse import quote

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import conninfo

from exportd_server.platform.urls import BadUrl, Url, parse_postgres_url, parse_url
from exportd_server.settings import load_settings

SECRETS = ("fir5tpiece", "sec0ndpiece")


@pytest.mark.parametrize(
    "mark", ["@", ":@", "@:", "/", "?", "#", "@[", "%", " ", "\n", "é"]
)
@pytest.mark.parametrize("host", ["h", "h:5432", "127.0.0.1", "[::1]:1", "a:1,b:2"])
def test_a_password_that_is_not_encoded_is_refused_and_not_told(
    mark: str, host: str
) -> None:
    password = mark.join(SECRETS)
    with pytest.raises(BadUrl) as refused:
        parse_postgres_url(f"postgresql://us3r:{password}@{host}/datab4se")
    told = str(refused.value)
    assert "percent-encode" in told
    assert not [piece for piece in (*SECRETS, "us3r", "datab4se") if piece in told]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://h/d", "postgresql://"),
        ("host=h password=x", "postgresql://"),
        ("POSTGRESQL://h/d", "postgresql://"),
        ("postgresql://h:port/d", "port"),
        ("postgresql://h:0/d", "port"),
        ("postgresql://h:65536/d", "port"),
        ("postgresql://h:5432:5/d", "port"),
        ("postgresql://h:٣/d", "ASCII"),
        ("postgresql://[::1/d", "taken apart|host"),
        ("postgresql://[::1]x:1/d", "port|host"),
        ("postgresql://-h/d", "host"),
        ("postgresql://h/d?host=-x", "host"),
        ("postgresql://h/d?port=x", "port"),
        ("postgresql://a,b:1,c/d?port=1,2", "number of ports"),
        ("postgresql://h/d?secret", "NAME=VALUE"),
        ("postgresql://h/d?a=1&a=2", "NAME=VALUE"),
        ("postgresql://h/d/e", "/"),
        ("postgresql://h/d?dbname=postgresql%3A%2F%2Fu%3Ap%40h", "database"),
        ("postgresql://h/d%00", "%"),
        ("postgresql://u:p%80@h/d", "UTF-8"),
    ],
)
def test_a_url_that_is_odd_is_refused(url: str, told: str) -> None:
    with pytest.raises(BadUrl, match=told):
        parse_postgres_url(url)


def test_a_url_is_read() -> None:
    url = parse_postgres_url(
        "postgres://u%40:p%2F%3A%40x@db.example:6543/d?sslmode=require"
    )
    assert (url.user, url.password, url.path) == ("u@", "p/:@x", "d")
    assert url.hosts == (("db.example", 6543),)
    assert url.options == {"sslmode": "require"}
    assert url.shown(5432) == "postgres://db.example:6543/d"
    assert "p/:@x" not in repr(url)
    assert "p%2F" not in repr(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql:///d", "postgresql://localhost:5432/d"),
        ("postgresql://%2Fvar%2Frun/d", "postgresql:///var/run:5432/d"),
        ("postgresql://a:1,b/d", "postgresql://a:1,b:5432/d"),
        ("postgresql://[fe80::1]:7/d", "postgresql://[fe80::1]:7/d"),
        ("postgresql://u:x@/d?host=h&port=9", "postgresql://h:9/d"),
        ("postgresql://a,b/d?port=9", "postgresql://a:9,b:9/d"),
    ],
)
def test_what_is_shown_is_where_it_leads(url: str, shown: str) -> None:
    assert parse_postgres_url(url).shown(5432) == shown


_SPECIAL = st.text("ab1@:/?#%[]&=,.+- ", max_size=12)


@given(_SPECIAL, _SPECIAL, st.sampled_from(["h", "h:1", "[::1]:5", "a:1,b:2"]), _SPECIAL)
def test_the_drivers_library_reads_the_same_where_a_url_is_accepted(
    user: str, password: str, host: str, rest: str
) -> None:
    text = f"postgresql://{user}:{password}@{host}/{rest}"
    try:
        read = parse_postgres_url(text)
        library = conninfo.conninfo_to_dict(text)
    except (BadUrl, psycopg.ProgrammingError):
        return
    hosts = [host.strip("[]") for host, _ in read.hosts]
    ports = [str(port or "") for _, port in read.hosts]
    assert str(library.get("host") or "").split(",") == hosts
    assert str(library.get("port") or "").split(",") == ports
    told = library.get("user", ""), library.get("password", "")
    assert told == (read.user, read.password)
    assert library.get("dbname", "") == read.path


@given(st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text))
def test_whatever_is_percent_encoded_is_accepted(password: str) -> None:
    url = parse_postgres_url(f"postgresql://u:{quote(password, safe='')}@h/d")
    assert url.password == password


def read(password: str, **rest: str) -> Url:
    return parse_postgres_url(
        f"postgresql://{rest.get('user', 'u')}:{quote(password, safe='')}@h/d"
    )


@pytest.mark.parametrize(
    "said",
    [
        'could not translate host name "SECRET@h"',
        'invalid integer value "ab@SECRET" for connection option "port"',
        "something about ab%40SECRET",
    ],
)
def test_what_a_driver_says_is_left_out_when_it_repeats_the_password(said: str) -> None:
    told = read("ab@SECRET").said(said)
    assert "SECRET" not in told
    assert "percent-encode" in told


def test_what_a_driver_says_is_passed_on_otherwise() -> None:
    said = 'connection to server at "h", port 1 failed: Connection refused\nIs it up?'
    assert read("ab@SECRET").said(said) == said.splitlines()[0]
    # A password that is the user's name is told as that.
    same = 'password authentication failed for user "postgres"'
    assert read("postgres", user="postgres").said(same) == same
    option = parse_postgres_url("postgresql://h/d?password=hunter2")
    assert "hunter2" not in option.said("no hunter2")


@pytest.mark.parametrize(
    "url",
    [
        "https://u:ab@cd:s3cret@h/keys",
        "https://u:12/s3cret@h/keys",
        "https://u:12#s3cret@h/keys",
        "https://h:s3cret/keys",
        "https://u:[s3cret@h/keys",
        "https://u:℀s3cret@h/keys",
        "https:///s3cret",
        "ftp://u:s3cret@h/",
    ],
)
def test_another_url_is_read_as_strictly(url: str) -> None:
    with pytest.raises(BadUrl) as refused:
        parse_url(url, {"https"})
    assert "s3cret" not in str(refused.value)


def test_settings_show_no_url_that_may_have_a_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EXPORTD_LEDGER__URL", "postgresql://u:s3cret@h/d")
    monkeypatch.setenv("EXPORTD_IDENTITY__JWT__ISSUER", "i")
    monkeypatch.setenv("EXPORTD_IDENTITY__JWT__AUDIENCE", "a")
    monkeypatch.setenv("EXPORTD_IDENTITY__JWT__JWKS_URL", "https://u:s3cret@h/?k=s3cret")
    settings = load_settings(None, {})
    assert settings.ledger.url.get_secret_value() == "postgresql://u:s3cret@h/d"
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert "s3cret" not in shown
