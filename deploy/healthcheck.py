"""Ends with exit code 0 if a server is up and takes calls, and 1 if not.

    python healthcheck.py [HOST:PORT] [--ca-cert FILE [--name NAME]]

It asks for gRPC health, which needs no credentials. With --ca-cert it does so over TLS;
--name is what the certificate is for, where that is not HOST.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 5.0


def main() -> int:
    """Ask; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?", default="127.0.0.1:50051")
    parser.add_argument("--ca-cert", type=Path)
    parser.add_argument("--name")
    options = parser.parse_args()
    if options.ca_cert is None:
        channel = grpc.insecure_channel(options.address)
    else:
        trusted = grpc.ssl_channel_credentials(options.ca_cert.read_bytes())
        name = [("grpc.ssl_target_name_override", options.name)] if options.name else []
        channel = grpc.secure_channel(options.address, trusted, name)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=SECONDS
            )
        except grpc.RpcError as error:
            print(f"{options.address}: {error.code().name}: {error.details()}")
            return 1
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{options.address}: {state}")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
