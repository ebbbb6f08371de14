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
