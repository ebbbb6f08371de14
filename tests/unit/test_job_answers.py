"""What is told of jobs: which messages are kept, and that none is ever an old one."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from exportd.v1 import export_service_pb2 as pb
from exportd_server.api.answers import JobAnswers, Kept, job_message
from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.jobs.model import (
    ExportSpec,
    Job,
    JobState,
    Manifest,
    ManifestColumn,
    PartRecord,
    Progress,
)
from exportd_server.store.key import OutputKind

PART = PartRecord(0, 0, 7, 10, 100, 3, 0, 1, 2, 3, 4, bytes(32), OutputKind.OUTPUT)
COLUMN = ManifestColumn("id", "INTEGER", "int64", nullable=False)


def finished(number: int = 1, *, parts: int = 1) -> Job:
    return Job(
        job_id=str(UUID(int=number)),
        tenant="acme",
        state=JobState.SUCCEEDED,
        spec=ExportSpec("tokens", output=OutputFormat(Format.CSV)),
        request_id="",
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
        read_time=datetime(2026, 1, 2, tzinfo=UTC),
        progress=Progress(rows=10 * parts),
        manifest=Manifest((COLUMN,), tuple(replace(PART, shard=n) for n in range(parts))),
    )


def told(answers: JobAnswers, job: Job) -> pb.GetJobResponse:
    answer = answers.get_job(job)
    assert answer == pb.GetJobResponse(job=job_message(job))
    return answer


def test_a_job_that_is_as_it_was_is_told_by_the_same_answer() -> None:
    answers = JobAnswers()
    first = told(answers, finished())
    later = replace(finished(), read_time=datetime(2026, 1, 3, tzinfo=UTC))
    assert told(answers, later) is first


def test_whatever_changes_of_a_job_is_told() -> None:
    answers = JobAnswers()
    job = finished()
    told(answers, job)
    for changed in (
        replace(job, expired=True, manifest=None),
        replace(job, revision=job.revision + 1),
        replace(job, state=JobState.CANCELLED, manifest=None),
        replace(job, drop_time=datetime(2026, 1, 4, tzinfo=UTC)),
        replace(job, tenant="other", progress=Progress(rows=3)),
        job,
    ):
        told(answers, changed)


def test_nothing_is_kept_of_a_job_that_goes_on() -> None:
    answers = JobAnswers()
    told(answers, replace(finished(), state=JobState.RUNNING, manifest=None))
    assert not len(answers._got)


def test_a_request_is_written_once_for_all_that_is_told_of_its_job() -> None:
    answers = JobAnswers()
    job = replace(finished(), state=JobState.RUNNING, manifest=None, request_id="mine")
    first = answers.job(job)
    (written,) = (message for _, message in answers._requests._kept.values())
    again = answers.job(replace(job, revision=2))
    assert [message for _, message in answers._requests._kept.values()] == [written]
    assert answers._requests._kept[job.job_id][1] is written
    assert first == job_message(job)
    assert again.request == first.request
    # What is not the same is told as it is.
    for changed in (
        replace(job, request_id="another"),
        replace(job, spec=replace(job.spec, limit=3)),
    ):
        assert answers.job(changed) == job_message(changed)


def test_few_answers_are_kept_and_no_large_ones() -> None:
    answers = JobAnswers()
    told(answers, finished(parts=1000))
    assert not len(answers._got)
    often = told(answers, finished())
    for number in range(2, 2 * Kept.MOST):
        told(answers, finished(number))
        # One that is asked for again and again stays.
        assert told(answers, finished()) is often
    assert len(answers._got) == Kept.MOST
