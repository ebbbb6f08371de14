"""Keys of stored parts, parsed once: a key that exists cannot hold `..`, a separator or
a control character, and keys of different kinds cannot collide."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from uuid import UUID

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")
_NAME = re.compile(r"(\d{6})-(\d{6})\.(\d{1,19})\Z")


def is_tenant(text: str) -> bool:
    """Whether a tenant may be called so."""
    return _TENANT.match(text) is not None


class OutputKind(enum.StrEnum):
    """What a part holds."""

    OUTPUT = "output"
    ERROR = "error"
    MANIFEST = "manifest"
    """What the job's parts are, as a JSON object."""


@dataclass(frozen=True, slots=True)
class JobPrefix:
    """Everything of one job."""

    tenant: str
    job_id: str

    def __post_init__(self) -> None:
        if not is_tenant(self.tenant):
            raise ValueError(f"not a tenant: {self.tenant!r}")
        if str(UUID(self.job_id)) != self.job_id:
            raise ValueError(f"not a canonical UUID: {self.job_id!r}")

    def __str__(self) -> str:
        return f"{self.tenant}/{self.job_id}"


@dataclass(frozen=True, slots=True)
class OutputKey:
    """One part. The part index is the pair (`shard`, `sequence`), because a shard does
    not know how many parts the shards before it have. `token` is the fencing token of
    the lease under which it was written, so that two workers never write one key."""

    prefix: JobPrefix
    kind: OutputKind
    shard: int
    sequence: int
    token: int

    def __post_init__(self) -> None:
        if not (0 <= self.shard < 10**6 and 0 <= self.sequence < 10**6):
            raise ValueError("shard and sequence lie between 0 and 999999")
        if not 0 <= self.token < 2**63:
            raise ValueError("a token lies between 0 and 2**63 - 1")

    @property
    def name(self) -> str:
        """The last segment of the key."""
        return f"{self.shard:06d}-{self.sequence:06d}.{self.token}"

    def __str__(self) -> str:
        return f"{self.prefix}/{self.kind}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> OutputKey:
        """Read a key back from its text; raises `ValueError` for anything else."""
        try:
            tenant, job_id, kind, name = text.split("/")
        except ValueError:
            raise ValueError(f"not an output key: {text!r}") from None
        match = _NAME.match(name)
        if match is None:
            raise ValueError(f"not an output key: {text!r}")
        shard, sequence, token = map(int, match.groups())
        key = cls(JobPrefix(tenant, job_id), OutputKind(kind), shard, sequence, token)
        if str(key) != text:
            raise ValueError(f"not a canonical output key: {text!r}")
        return key
