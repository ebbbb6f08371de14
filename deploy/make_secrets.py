"""Makes the secrets of compose.yaml, in a directory that only its owner may enter.

    python deploy/make_secrets.py [DIRECTORY]

The files themselves may be read by everybody, because the containers' users are others
than the owner. A directory that is there already is left alone.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from pathlib import Path


def make(directory: Path) -> None:
    """Make the directory and the files in it. Raises `OSError`, `FileExistsError` among
    them."""
    password, s3_secret = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    directory.mkdir(mode=0o700)
    accounts = {
        "identities": [
            {
                "name": "exportd",
                "credentials": [{"accessKey": "exportd", "secretKey": s3_secret}],
                "actions": ["Admin", "Read", "Write", "List"],
            }
        ]
    }
    files = {
        "postgres_password": password,
        "s3_accounts.json": json.dumps(accounts, indent=2),
        "exportd.toml": f"""\
[ledger]
url = "postgresql://exportd:{password}@postgres:5432/exportd"

[store.s3]
access_key_id = "exportd"
secret_access_key = "{s3_secret}"

[http]
signing_keys = ["{secrets.token_urlsafe(32)}"]

[delivery]
secret_keys = ["{secrets.token_urlsafe(32)}"]
""",
    }
    for name, text in files.items():
        path = directory / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)


def main() -> int:
    """Make them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("secrets")
    parser.add_argument("directory", nargs="?", type=Path, default=default)
    directory = parser.parse_args().directory
    try:
        make(directory)
    except FileExistsError:
        print(f"{directory} is there already and stays as it is")
        return 1
    print(f"{directory}: made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
