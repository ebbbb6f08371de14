"""The key that the service makes for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from exportd_server.platform.secrets import KEY_BYTES, kept_key


def test_a_key_is_made_once_kept_and_nobody_elses(tmp_path: Path) -> None:
    key = kept_key(tmp_path, "some.key")
    assert len(key) == KEY_BYTES
    assert kept_key(tmp_path, "some.key") == key
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    other = tmp_path / "other"
    other.mkdir()
    assert kept_key(other, "some.key") != key


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_file_that_is_no_key_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="delete it"):
        kept_key(tmp_path, "some.key")
    assert file.read_bytes() == content


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    kept_key(tmp_path, "some.key")
    (tmp_path / "some.key").chmod(0o640)
    with pytest.raises(ValueError, match="read by others"):
        kept_key(tmp_path, "some.key")


def test_a_link_in_place_of_the_key_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"x" * KEY_BYTES)
    (tmp_path / "some.key").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        kept_key(tmp_path, "some.key")
