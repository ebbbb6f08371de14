"""The hand-over between reading and encoding is bounded in bytes and stops cleanly."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest

from exportd_server.pipeline.budget import Handover, HandoverClosed
from tests.support.waits import ENOUGH


def batch(rows: int) -> pa.RecordBatch:
    return pa.record_batch({"n": pa.array(range(rows), pa.int64())})


def test_batches_come_out_in_the_order_they_went_in() -> None:
    handover: Handover[pa.RecordBatch] = Handover(10**9)
    for rows in (1, 2, 3):
        handover.put(batch(rows))
    handover.finish()
    assert [b.num_rows for b in handover] == [1, 2, 3]


def test_the_producer_waits_while_the_budget_is_in_flight() -> None:
    handover: Handover[pa.RecordBatch] = Handover(batch(100).nbytes * 2)
    third_is_in = threading.Event()

    def produce() -> None:
        for _ in range(3):
            handover.put(batch(100))
        third_is_in.set()
        handover.finish()

    producer = threading.Thread(target=produce)
    producer.start()
    batches = iter(handover)
    next(batches)
    # The first batch is still in use, so two fill the budget.
    assert not third_is_in.wait(0.05)
    next(batches)
    assert third_is_in.wait(ENOUGH)
    assert len(list(batches)) == 1
    producer.join()


def test_a_batch_larger_than_the_budget_still_passes() -> None:
    handover: Handover[pa.RecordBatch] = Handover(1)

    def produce() -> None:
        handover.put(batch(9))
        handover.put(batch(9))
        handover.finish()

    producer = threading.Thread(target=produce)
    producer.start()
    assert sum(b.num_rows for b in handover) == 18
    producer.join()


def test_an_error_of_the_producer_reaches_the_consumer_after_the_batches() -> None:
    handover: Handover[pa.RecordBatch] = Handover(10**9)
    handover.put(batch(1))
    handover.finish(RuntimeError("gone"))
    batches = iter(handover)
    assert next(batches).num_rows == 1
    with pytest.raises(RuntimeError, match="gone"):
        next(batches)


def test_closing_frees_a_producer_that_waits_for_room() -> None:
    handover: Handover[pa.RecordBatch] = Handover(1)
    handover.put(batch(1))
    outcome: list[type] = []

    def produce() -> None:
        try:
            handover.put(batch(1))
        except HandoverClosed:
            outcome.append(HandoverClosed)

    producer = threading.Thread(target=produce)
    producer.start()
    handover.close()
    producer.join(ENOUGH)
    assert outcome == [HandoverClosed]
    with pytest.raises(HandoverClosed):
        next(iter(handover))
