"""Every error has one row in the status table, and the contract names it."""

from __future__ import annotations

import re
from pathlib import Path

from exportd.v1 import error_pb2
from exportd_server import errors


def test_every_reason_has_a_row_in_the_status_table() -> None:
    assert set(errors.TABLE) == set(errors.ErrorReason)


def test_the_contract_names_the_same_reasons() -> None:
    contract = {
        name.removeprefix("ERROR_REASON_")
        for name in error_pb2.ErrorReason.DESCRIPTOR.values_by_name
    }
    assert contract - {"UNSPECIFIED"} == set(errors.ErrorReason)


def test_the_contract_says_which_code_goes_with_each_reason() -> None:
    proto = Path(__file__).parents[2] / "proto/exportd/v1/error.proto"
    found = re.findall(r"((?:  // .*\n)+)  ERROR_REASON_(\w+) = \d+;", proto.read_text())
    codes = {name: comment for comment, name in found if name != "UNSPECIFIED"}
    assert set(codes) == set(errors.ErrorReason)
    for reason, comment in codes.items():
        text = re.sub(r"  // Of a (job|delivery): ", "  // ", comment)
        code = re.match(r"  // ([A-Z_]+)\.", text)
        assert code is not None, reason
        assert code[1] == errors.TABLE[errors.ErrorReason(reason)].code.name, reason


def test_no_public_text_is_empty() -> None:
    assert all(answer.text for answer in errors.TABLE.values())
