"""Settings that have a flag, and those that only a serving process needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import pytest
from pydantic import BaseModel

from exportd_server.addresses import rules
from exportd_server.errors import ConfigurationError
from exportd_server.settings import (
    CertificateSettings,
    HttpSettings,
    IdentitySettings,
    MetricsSettings,
    Settings,
    TlsSettings,
    keys,
    load_settings,
)


@pytest.mark.parametrize(("flag", "enabled"), [(None, False), (True, True)])
def test_the_flag_for_workers_wins_over_the_file_and_leaves_the_rest(
    tmp_path: Path, flag: bool | None, enabled: bool
) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[worker]\nenabled = false\nconcurrency = 7\nshard_rows = 5\n")
    worker = load_settings(file, {"workers": flag}, {}).worker
    assert (worker.enabled, worker.concurrency, worker.shard_rows) == (enabled, 7, 5)


def test_only_one_that_serves_needs_an_address_it_may_listen_on(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('listen = "0.0.0.0:50051"\n')
    with pytest.raises(ConfigurationError, match="listen"):
        load_settings(file, {}, {})
    load_settings(file, {}, {}, serves=False)


LONG = "0123456789abcdef" * 2
ANYBODY = "allow_unauthenticated = true\n"
KNOWN = "[identity]\napi_keys = true\n"
CLEAR = "[tls]\nallow_plaintext = true\n"
OUTSIDE = '[http]\nlisten = "0.0.0.0:80"\n'
SECURE = 'public_url = "https://exports.example"\n'
OPEN = 'public_url = "http://exports.example"\n'
METRICS = '[metrics]\nlisten = "0.0.0.0:9464"\n'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (OUTSIDE + SECURE, "^http.listen: 0.0.0.0 .* set allow_unauthenticated"),
        (OUTSIDE + SECURE + CLEAR, "^http.listen: .* set allow_unauthenticated"),
        (ANYBODY + OUTSIDE + SECURE, ""),
        (KNOWN + OUTSIDE + SECURE, ""),
        (KNOWN + OUTSIDE, "^http.public_url: is needed"),
        (
            KNOWN + '[http]\nlisten = "10.1.2.3:80"\n',
            "^http.listen: .* tls.allow_plaintext",
        ),
        (KNOWN + '[http]\nlisten = "10.1.2.3:80"\n' + CLEAR, ""),
        (KNOWN + OUTSIDE + OPEN, "^http.public_url: .* tls.allow_plaintext"),
        (KNOWN + OUTSIDE + OPEN + CLEAR, ""),
        (ANYBODY + OUTSIDE + OPEN, "^http.public_url: .* tls.allow_plaintext"),
        ('[http]\nlisten = "127.0.0.1:80"\n' + OPEN, "^http.public_url: .* could be read"),
        ('[http]\nlisten = "127.0.0.1:80"\npublic_url = "http://localhost:80"\n', ""),
        ('[http]\nlisten = "127.0.0.1:80"\n', ""),
        ('[http]\nlisten = "localhost:80"\n' + SECURE, ""),
        (METRICS, "^metrics.listen: 0.0.0.0 .* set metrics.allow_remote"),
        (KNOWN + METRICS, "^metrics.listen: "),
        (METRICS + "allow_remote = true\n", ""),
        ('[metrics]\nlisten = "127.0.0.1:9464"\n', ""),
        ('[metrics]\nlisten = "[::1]:9464"\n', ""),
        ('[metrics]\nlisten = "nowhere"\n', "^metrics.listen: 'nowhere' is not host:port"),
    ],
)
def test_no_port_is_open_to_others_that_was_not_meant_to_be(
    tmp_path: Path, content: str, told: str
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    if not told:
        load_settings(file, {}, {})
        return
    with pytest.raises(ConfigurationError, match=told):
        load_settings(file, {}, {})


@pytest.mark.parametrize(
    ("content", "told"),
    [(METRICS, "metrics.listen"), ("[http]\n" + OPEN, "http.public_url")],
)
def test_a_worker_is_held_to_the_rules_of_what_it_has(
    tmp_path: Path, content: str, told: str
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=told):
        load_settings(file, {}, {}, serves=False)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f'[http]\nsigning_keys = ["{LONG[:-1]}"]\n', "at least 32 bytes"),
        ('[http]\npublic_url = "ftp://x"\n', "http.public_url"),
        ('[http]\npublic_url = "https://u:p@x"\n', "http.public_url"),
        ('[http]\npublic_url = "https://x/?q"\n', "http.public_url"),
        ('[http]\npublic_url = "https://x:99999"\n', "http.public_url"),
        ('[http]\nlisten = "nowhere"\n', "http.listen"),
        (f'{ANYBODY}[http]\nlisten = "0.0.0.0:80"\n', "http.public_url"),
        (f'{ANYBODY}[http]\nlisten = "[::]:80"\n', "http.public_url"),
        ("[download]\nurl_lifetime = 100\nmax_url_lifetime = 99\n", "max_url_lifetime"),
        ("[download]\nmax_url_lifetime = 604801\n", "download.max_url_lifetime"),
    ],
)
def test_a_wrong_setting_of_download_urls_is_told(
    tmp_path: Path, content: str, told: str
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=told) as refused:
        load_settings(file, {}, {})
    assert LONG[:-1] not in str(refused.value)


class Recorded:
    """A table of settings that notes which fields are read."""

    def __init__(self, table: BaseModel, prefix: str, read: set[str]) -> None:
        self._table, self._prefix, self._read = table, prefix, read

    def __getattr__(self, name: str) -> Any:
        asked = getattr(type(self._table), name, None)
        if isinstance(asked, property):
            assert asked.fget is not None
            return asked.fget(self)
        value = getattr(self._table, name)
        if isinstance(value, BaseModel):
            return Recorded(value, f"{self._prefix}{name}.", self._read)
        self._read.add(f"{self._prefix}{name}")
        return value


def test_a_rule_reads_only_the_fields_that_it_names() -> None:
    """Otherwise it would be held against one that is wrong, and hold its default."""
    console = HttpSettings(listen="10.1.2.3:80", console=True)
    known = IdentitySettings(mtls=(CertificateSettings(cn="a", tenant="a", scopes=READ),))
    open_ = Settings(
        listen="0.0.0.0:0",
        http=console,
        metrics=MetricsSettings(listen="0.0.0.0:0"),
    )
    for settings in (
        open_,
        open_.model_copy(update={"identity": known}),
        open_.model_copy(update={"identity": known, "allow_unauthenticated": True}),
        open_.model_copy(update={"tls": TlsSettings(allow_plaintext=True)}),
    ):
        for rule in rules(serves=True):
            read: set[str] = set()
            rule.problem_in(cast("Settings", Recorded(settings, "", read)))
            assert read <= {rule.key, *rule.others}, rule
    named = {key for rule in rules(serves=True) for key in (rule.key, *rule.others)}
    assert named <= set(keys())


READ: tuple[Literal["exports.read"]] = ("exports.read",)


@pytest.mark.parametrize(
    "address",
    [
        *("[::1:80", "::1]:80", "::1:80", "[x]:80", "[]:80", "[127.0.0.1]:80"),
        *("x", "x:", ":80", "x:65536", "x/y:80", "x y:80"),
    ],
)
def test_an_address_that_is_none_is_told(tmp_path: Path, address: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'[http]\nconsole = true\nlisten = "{address}"\n')
    with pytest.raises(ConfigurationError, match=r"^http.listen: .* is not host:port"):
        load_settings(file, {}, {})


@pytest.mark.parametrize(
    "text", [f"{LONG} {LONG[::-1]}", f'["{LONG}", "{LONG[::-1]}"]', f"{LONG}\n{LONG[::-1]}"]
)
def test_signing_keys_may_be_one_variable(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("EXPORTD_HTTP__SIGNING_KEYS", text)
    settings = load_settings(None, {})
    keys = [key.get_secret_value() for key in settings.http.signing_keys]
    assert keys == [LONG, LONG[::-1]]
    assert LONG not in repr(settings)
