"""Signatures are those of Standard Webhooks: its own verifiers say so."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from exportd_server.sinks.webhook.signature import Signer, read_key
from exportd_server.sinks.webhook.status import read_retry_after

KEYS = [f"whsec_{base64.b64encode(bytes([n]) * 24).decode()}" for n in range(3)]
BODY = '{"type":"export.completed","data":{"name":"Grüße, 世界 \\u0000"}}'
NODE = """
const { Webhook } = require("standardwebhooks");
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
const verified = ({ secret, body, headers }) => {
  try {
    return JSON.stringify(new Webhook(secret).verify(body, headers)) === body;
  } catch (error) {
    return error.name + ": " + error.message;
  }
};
console.log(JSON.stringify(cases.map(verified)));
"""


def signed(
    *keys: str, body: str = BODY, pieces: int = 1, moment: datetime | None = None
) -> dict[str, str]:
    signer = Signer([read_key(key) for key in keys], "0198-a", moment or datetime.now(UTC))
    data = body.encode()
    step = -(-len(data) // pieces) or 1
    for start in range(0, len(data), step):
        signer.update(data[start : start + step])
    return signer.headers()


@pytest.mark.parametrize("pieces", [1, 7])
def test_the_python_verifier_accepts_a_signature_made_piece_by_piece(pieces: int) -> None:
    headers = signed(KEYS[0], pieces=pieces)
    assert Webhook(KEYS[0]).verify(BODY, headers) == json.loads(BODY)


def test_during_a_rotation_both_keys_verify_and_a_third_does_not() -> None:
    headers = signed(KEYS[0], KEYS[1])
    for key in KEYS[:2]:
        assert Webhook(key).verify(BODY, headers) == json.loads(BODY)
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(KEYS[2]).verify(BODY, headers)
    first = signed(KEYS[0])["webhook-signature"]
    assert headers["webhook-signature"].split(" ")[0] == first


def test_another_body_id_or_timestamp_does_not_verify() -> None:
    headers = signed(KEYS[0])
    later = str(int(headers["webhook-timestamp"]) + 1)
    for body, changed in (
        (BODY + " ", headers),
        (BODY, headers | {"webhook-id": "0198-b"}),
        (BODY, headers | {"webhook-timestamp": later}),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(KEYS[0]).verify(body, changed)


def test_an_old_signature_is_not_accepted() -> None:
    headers = signed(KEYS[0], moment=datetime.now(UTC) - timedelta(minutes=6))
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(KEYS[0]).verify(BODY, headers)


def test_bytes_that_are_no_text_verify_by_the_recipe_of_the_documentation() -> None:
    body = bytes(range(256))
    signer = Signer([read_key(KEYS[0])], "id", datetime.fromtimestamp(1_700_000_000, UTC))
    signer.update(body)
    headers = signer.headers()
    content = b"id.1700000000." + body
    key = base64.b64decode(KEYS[0].removeprefix("whsec_"))
    expected = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"


@given(st.binary(min_size=24, max_size=64), st.text())
def test_any_key_and_text_verify(key: bytes, text: str) -> None:
    secret = f"whsec_{base64.b64encode(key).decode()}"
    body = json.dumps({"text": text})
    assert Webhook(secret).verify(body, signed(secret, body=body)) == {"text": text}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsec_",
        base64.b64encode(bytes(24)).decode(),
        f"whsec_{base64.b64encode(bytes(23)).decode()}",
        f"whsec_{base64.b64encode(bytes(65)).decode()}",
        f"whsec_{base64.b64encode(bytes(24)).decode()}\n",
        f"whsec_{base64.urlsafe_b64encode(bytes([255]) * 24).decode()}",
        f"whsec_{base64.b64encode(bytes(25)).decode().rstrip('=')}",
        f"WHSEC_{base64.b64encode(bytes(24)).decode()}",
        "whsec_ä" + "A" * 32,
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        read_key(text)
    told = str(refused.value)
    assert "whsec_ and the base64 of 24 to 64 random bytes" in told
    body = text.removeprefix("whsec_").strip()
    assert not body or body not in told


def test_an_id_with_a_dot_is_not_signed() -> None:
    with pytest.raises(ValueError):
        Signer([read_key(KEYS[0])], "a.b", datetime.now(UTC))


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where Node finds the verifier for JavaScript."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
    flags = ("--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts")
    installed = subprocess.run(
        [npm, "install", *flags, "--fetch-retries=0", "standardwebhooks@1"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if installed.returncode:
        pytest.skip("the npm registry did not give the package standardwebhooks")
    return folder


def test_the_javascript_verifier_accepts_both_keys_of_a_rotation_and_no_third(
    node_folder: Path,
) -> None:
    both = signed(KEYS[0], KEYS[1])
    cases = [
        {"secret": KEYS[0], "body": BODY, "headers": signed(KEYS[0])},
        *({"secret": key, "body": BODY, "headers": both} for key in KEYS),
        {"secret": KEYS[0], "body": BODY.replace("name", "game"), "headers": both},
    ]
    ran = subprocess.run(
        ["node", "-e", NODE],
        cwd=node_folder,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    *good, wrong_key, wrong_body = json.loads(ran.stdout)
    assert good == [True, True, True]
    assert "No matching signature" in wrong_key
    assert "No matching signature" in wrong_body


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("999999999999", 86_400),
        ("Fri, 02 Jan 2026 03:04:35 GMT", 30),
        ("Friday, 02-Jan-26 03:04:35 GMT", 30),
        ("Fri Jan  2 03:04:35 2026", 30),
        ("Fri, 02 Jan 2026 03:04:35 -0000", 30),
        ("Thu, 01 Jan 2026 00:00:00 GMT", 0),
        ("Fri, 02 Jan 2099 03:04:35 GMT", 86_400),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("٣", None),
        ("9" * 400, None),
        ("Fri, 99 Jan 2026 03:04:35 GMT", None),
    ],
)
def test_retry_after_is_read_in_all_its_forms_and_bounded(
    text: str, seconds: int | None
) -> None:
    expected = None if seconds is None else timedelta(seconds=seconds)
    assert read_retry_after(text, NOW) == expected


@given(st.text())
def test_no_retry_after_breaks_the_reading_of_an_answer(text: str) -> None:
    pause = read_retry_after(text, NOW)
    assert pause is None or timedelta(0) <= pause <= timedelta(days=1)
