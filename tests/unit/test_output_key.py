"""A key of the output store is safe by construction."""

from __future__ import annotations

import re
import string
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exportd_server.store.key import JobPrefix, OutputKey, OutputKind

TENANT = string.ascii_lowercase + string.digits
tenants = st.builds(
    str.__add__,
    st.sampled_from(TENANT),
    st.text(TENANT + "_-", max_size=62),
)
prefixes = st.builds(JobPrefix, tenants, st.uuids().map(str))
output_keys = st.builds(
    OutputKey,
    prefixes,
    st.sampled_from(OutputKind),
    st.integers(0, 10**6 - 1),
    st.integers(0, 10**6 - 1),
    st.integers(0, 2**63 - 1),
)

JOB_ID = "0197c1f0-7a3e-7000-8000-000000000001"
GOOD = f"acme/{JOB_ID}/output/000001-000002.3"


@settings(deadline=None)
@given(output_keys)
def test_a_key_reads_back_from_its_text(key: OutputKey) -> None:
    assert OutputKey.parse(str(key)) == key


@settings(deadline=None)
@given(output_keys)
def test_a_key_is_four_plain_segments(key: OutputKey) -> None:
    """No `..`, no separator within a segment, no control character, no hidden name, and
    short enough for every file system and for S3."""
    text = str(key)
    segments = text.split("/")
    assert len(segments) == 4
    for segment in segments:
        assert re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", segment, re.ASCII)
        assert ".." not in segment
        assert len(segment) <= 255
    assert len(text.encode()) <= 1024


@settings(deadline=None)
@given(output_keys, output_keys)
def test_different_keys_have_different_texts(one: OutputKey, two: OutputKey) -> None:
    assert (one == two) == (str(one) == str(two))


@settings(deadline=None)
@given(output_keys)
def test_keys_of_different_kinds_never_collide(key: OutputKey) -> None:
    of_each_kind = {
        str(OutputKey(key.prefix, kind, key.shard, key.sequence, key.token))
        for kind in OutputKind
    }
    assert len(of_each_kind) == len(OutputKind)


@settings(deadline=None)
@given(output_keys, st.integers(0, 2**63 - 1))
def test_keys_of_different_tokens_never_collide(key: OutputKey, token: int) -> None:
    other = OutputKey(key.prefix, key.kind, key.shard, key.sequence, token)
    assert (str(other) == str(key)) == (token == key.token)


@settings(deadline=None)
@given(prefixes, prefixes)
def test_no_job_lies_within_another_one(one: JobPrefix, two: JobPrefix) -> None:
    if one != two:
        assert not f"{one}/".startswith(f"{two}/")


@settings(deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from([*GOOD, "..", "/", "\0", "\n", "٣"])).map("".join),
    )
)
@example(GOOD)
def test_whatever_parses_is_written_back_the_same(text: str) -> None:
    try:
        key = OutputKey.parse(text)
    except ValueError:
        return
    assert str(key) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        GOOD + "/",
        "/" + GOOD,
        GOOD + "\n",
        GOOD + "\0",
        GOOD + ".part",
        GOOD.replace("acme", ".."),
        GOOD.replace("acme", "."),
        GOOD.replace("acme", ""),
        GOOD.replace("acme", "Acme"),
        GOOD.replace("acme", "-acme"),
        GOOD.replace("acme", "ac me"),
        GOOD.replace("acme", "acmé"),
        GOOD.replace("acme", "acme\n"),
        GOOD.replace("acme", "a" * 64),
        GOOD.replace("output", "outputs"),
        GOOD.replace("output", "OUTPUT"),
        GOOD.replace("output", ".."),
        GOOD.replace(JOB_ID, ".."),
        GOOD.replace(JOB_ID, JOB_ID.upper()),
        GOOD.replace(JOB_ID, UUID(JOB_ID).hex),
        GOOD.replace(JOB_ID, f"{{{JOB_ID}}}"),
        GOOD.replace(JOB_ID, f"urn:uuid:{JOB_ID}"),
        GOOD.replace("000001", "1"),
        GOOD.replace("000001", "0000001"),
        GOOD.replace("000001", "00000٣"),
        GOOD.replace(".3", ".03"),
        GOOD.replace(".3", ".-3"),
        GOOD.replace(".3", ".٣"),
        GOOD.replace(".3", f".{2**63}"),
        GOOD.replace(".3", ""),
        GOOD.replace("output/", "output/."),
    ],
)
def test_anything_but_a_canonical_key_is_refused(text: str) -> None:
    assert str(OutputKey.parse(GOOD)) == GOOD
    with pytest.raises(ValueError):
        OutputKey.parse(text)


@pytest.mark.parametrize(
    ("shard", "sequence", "token"),
    [(-1, 0, 0), (10**6, 0, 0), (0, -1, 0), (0, 10**6, 0), (0, 0, -1), (0, 0, 2**63)],
)
def test_numbers_that_would_not_fit_the_name_are_refused(
    shard: int, sequence: int, token: int
) -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        OutputKey(JobPrefix("acme", JOB_ID), OutputKind.OUTPUT, shard, sequence, token)
