"""Settings that have a flag, and those that only a serving process needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from exportd_server.errors import ConfigurationError
from exportd_server.settings import load_settings


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
