"""What can be done from the console. Each form does what the RPC of the same name does."""

from __future__ import annotations

from collections.abc import Mapping

from exportd.v1 import export_service_pb2 as pb
from exportd_server.api.console.access import Visit
from exportd_server.api.console.site import REDRIVEN, Site, address
from exportd_server.api.requests import Reader
from exportd_server.api.sinks import read_redrive
from exportd_server.jobs.audit import AuditMethod, Entry, uuid_or_nothing
from exportd_server.jobs.changes import to_its_end
from exportd_server.jobs.manager import JobManager


class Changes:
    """Cancels jobs, sends deliveries again, enables queues."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    def add_to(self, site: Site) -> None:
        """Take the forms."""
        site.form("/cancel", AuditMethod.CANCEL_JOB, self._cancel)
        site.form("/redrive", AuditMethod.REDRIVE_DELIVERIES, self._redrive)
        site.form("/enable", AuditMethod.ENABLE_SINK_QUEUE, self._enable)

    async def _cancel(self, visit: Visit, form: Mapping[str, str], entry: Entry) -> str:
        reader = Reader()
        entry.job_id = uuid_or_nothing(form.get("job_id", ""))
        job_id = reader.uuid("job_id", form.get("job_id", ""), required=True)
        reader.check()
        _, outcome = await to_its_end(self._manager.cancel(visit.tenant, job_id))
        return address(f"/jobs/{job_id}", notice=outcome.value)

    async def _redrive(self, visit: Visit, form: Mapping[str, str], entry: Entry) -> str:
        names = ("delivery_id", "job_id", "queue")
        asked = {name: form.get(name, "") for name in names}
        entry.delivery_id = uuid_or_nothing(asked["delivery_id"])
        entry.job_id = uuid_or_nothing(asked["job_id"])
        entry.queue = asked["queue"]
        reader = Reader()
        query = read_redrive(reader, pb.RedriveDeliveriesRequest(**asked))
        reader.check()
        count = await to_its_end(self._manager.redrive(visit.tenant, query))
        return address(
            "/deliveries",
            state=form.get("state", ""),
            job=query.job_id,
            queue=query.queue,
            notice=REDRIVEN,
            count=str(count),
        )

    async def _enable(self, visit: Visit, form: Mapping[str, str], entry: Entry) -> str:
        entry.queue = form.get("queue", "")
        reader = Reader()
        queue = reader.text("queue", entry.queue)
        if not queue:
            reader.complain("queue", "is required")
        reader.check()
        await to_its_end(self._manager.enable_queue(visit.tenant, queue))
        return address("/queues", notice="enabled")
