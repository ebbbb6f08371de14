"""Load for a server, until it is ended: `python -m bench.load export|download ADDRESS
[JOB]`."""

from __future__ import annotations

import sys
from datetime import timedelta

import grpc

import exportd
from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc


def main() -> None:
    """Export, or download a job, again and again."""
    kind, address, *job_ids = sys.argv[1:]
    if kind == "export":
        with exportd.Client(address) as client:
            while True:
                job = client.export(
                    "token_transfers", format="csv", ttl=timedelta(minutes=1)
                )
                job.wait(timeout=600)
                job.delete()
    with grpc.insecure_channel(address) as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        while True:
            for _ in stub.StreamDownload(pb.StreamDownloadRequest(job_id=job_ids[0])):
                pass


if __name__ == "__main__":
    main()
