"""Generates the service config that every client ships: which methods gRPC itself tries
again (https://github.com/grpc/proposal/blob/master/A6-client-retries.md)."""

from __future__ import annotations

import json
from pathlib import Path

from google.protobuf import descriptor_pb2

from tools.stubs.base import ROOT, Generator
from tools.stubs.descriptors import descriptors

RETRY_POLICY = {
    # gRPC's own bound is 5. Waits of 1, 2, 4 and 5 s, each a fifth longer or shorter by
    # chance, ride out a server that is gone for 5 s; one that stays away is told of after
    # about 12.
    "maxAttempts": 5,
    "initialBackoff": "1s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    # A server that ends cancels the calls that came in just then and that it has not begun.
    # What the caller cancels itself is never tried again.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}


class ServiceConfig:
    """Retries for the methods whose `idempotency_level` says that they may be repeated.
    Streams are tried again as long as nothing has come of them."""

    name = "service-config"

    def __init__(self, committed: Path) -> None:
        self.committed = committed

    def missing(self) -> str | None:
        """Nothing, wherever the checks run."""
        return None

    def generate(self, target: Path) -> None:
        """Write the file."""
        config = {
            "methodConfig": [{"name": repeatable_methods(), "retryPolicy": RETRY_POLICY}]
        }
        target.write_text(json.dumps(config, indent=2) + "\n")


def repeatable_methods() -> list[dict[str, str]]:
    """The methods, as a service config names them."""
    unknown = descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN
    return [
        {"service": f"{file.package}.{service.name}", "method": method.name}
        for file in descriptors().file
        for service in file.service
        for method in service.method
        if method.options.idempotency_level != unknown
    ]


def places() -> list[Generator]:
    """One for each place that has a copy: a package can ship only what lies inside it."""
    return [ServiceConfig(ROOT / "clients" / place) for place in PLACES]


PLACES = (
    "service_config.json",
    "python/src/exportd/service_config.json",
    "go/exportd/service_config.json",
    "java/src/main/resources/exportd/client/service_config.json",
    "typescript/service_config.json",
)
