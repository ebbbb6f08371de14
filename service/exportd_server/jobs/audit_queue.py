"""Audit records on their way to the ledger."""

from __future__ import annotations

from collections import OrderedDict, deque

from exportd_server.jobs.audit import AuditRecord


class FairQueue:
    """Up to `capacity` records that wait, each for its owner. When it is full, whoever has
    the most waiting loses the newest of them: among N owners each has room for a share of
    1/N, whatever the others do."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lines: OrderedDict[str, deque[AuditRecord]] = OrderedDict()
        """None of them is empty. The first is the next one's turn."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, owner: str, record: AuditRecord) -> bool:
        """Have a record wait; False when one is lost for it, or it is lost itself."""
        self._lines.setdefault(owner, deque()).append(record)
        self._size += 1
        if self._size <= self._capacity:
            return True
        longest = max(self._lines, key=lambda name: (len(self._lines[name]), name == owner))
        line = self._lines[longest]
        line.pop()
        self._size -= 1
        if not line:
            del self._lines[longest]
        return False

    def take(self, most: int) -> list[AuditRecord]:
        """Up to so many records, one of each owner in turn and the oldest first."""
        taken: list[AuditRecord] = []
        while self._lines and len(taken) < most:
            owner, line = self._lines.popitem(last=False)
            taken.append(line.popleft())
            if line:
                self._lines[owner] = line
        self._size -= len(taken)
        return taken
