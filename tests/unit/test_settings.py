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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f'[http]\nsigning_keys = ["{LONG[:-1]}"]\n', "at least 32 bytes"),
        ('[http]\npublic_url = "ftp://x"\n', "http.public_url"),
        ('[http]\npublic_url = "https://u:p@x"\n', "http.public_url"),
        ('[http]\npublic_url = "https://x/?q"\n', "http.public_url"),
        ('[http]\npublic_url = "https://x:99999"\n', "http.public_url"),
        ('[http]\nlisten = "nowhere"\n', "http.listen"),
        ('[http]\nlisten = "0.0.0.0:80"\n', "http.public_url"),
        ('[http]\nlisten = "[::]:80"\n', "http.public_url"),
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
