"""The processes of a fleet: started, hurt, started again, ended."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.server import ROOT
from tests.torture import child
from tests.torture.history import History

EXIT_CONFIGURATION = 2
_START_SECONDS = 60.0
_RESTART_PAUSE = 0.2
_END_SECONDS = 30.0


def free_port(chosen: random.Random) -> int:
    """A port that stays the member's own through its restarts: below those that the
    system gives to outgoing connections."""
    while True:
        port = chosen.randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Member:
    """One place in the fleet; the processes that fill it come and go."""

    name: str
    arguments: tuple[str, ...]
    clock: Path
    port: int | None = None
    works: bool = True
    number: int = 0
    pid: int = 0
    pidfd: int = -1
    frozen: bool = False
    doomed: str = ""
    """Why the process that runs now is going to end; empty: it must not."""
    up: asyncio.Event = field(default_factory=asyncio.Event)
    down: asyncio.Event = field(default_factory=asyncio.Event)
    code: int | None = None

    @property
    def identity(self) -> str:
        """Of the process that runs now."""
        return f"{self.name}.{self.number}"

    @property
    def address(self) -> str:
        """Where it serves."""
        return f"127.0.0.1:{self.port}"

    @property
    def target(self) -> bool:
        """Whether a fault may be aimed at it now."""
        return self.up.is_set() and not self.frozen and not self.doomed

    def send(self, number: int) -> None:
        """Send a signal to this process, and never to one that has its number later."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


class Fleet:
    """Starts its members, and starts each again as soon as it has ended."""

    def __init__(
        self,
        members: Sequence[Member],
        directory: Path,
        env: Mapping[str, str],
        history: History,
        *,
        cold: bool = False,
        mortal: bool = False,
    ) -> None:
        self.members = list(members)
        self._directory = directory
        self._env = dict(env)
        self._history = history
        self._cold = cold
        self._mortal = mortal
        """Whether members may kill themselves."""
        self._nursery: asyncio.subprocess.Process | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = asyncio.Event()
        self._stopping = False
        self.may_refuse = asyncio.Event()
        """Set while the database is away: a process that starts then may give up."""
        self.logs = directory / "logs"

    @property
    def apis(self) -> list[Member]:
        """Those that serve."""
        return [member for member in self.members if member.port is not None]

    @property
    def workers(self) -> list[Member]:
        """Those that work."""
        return [member for member in self.members if member.works]

    async def __aenter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._nursery = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.torture.nursery"),
            *(["--cold"] if self._cold else []),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            # A Ctrl-C is for the harness, which then ends them in order.
            start_new_session=True,
        )
        self._hearing = asyncio.create_task(self._hear())
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._ready.wait()
            for member in self.members:
                self._start(member)
            async with asyncio.timeout(_START_SECONDS):
                for member in self.members:
                    await member.up.wait()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    # --- faults

    def kill(self, member: Member) -> None:
        """End it as a crash would."""
        member.doomed = "kill"
        member.send(signal.SIGKILL)

    async def restart(self, member: Member) -> None:
        """End it as an operator would."""
        member.doomed = "term"
        member.send(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await member.down.wait()
                return
        self._history.violation(
            "a process does not end when told to", process=member.identity
        )
        self.kill(member)

    def freeze(self, member: Member) -> None:
        """Stop it in the middle of whatever it does."""
        member.frozen = True
        member.send(signal.SIGSTOP)

    def thaw(self, member: Member) -> None:
        """Let it go on."""
        member.send(signal.SIGCONT)
        member.frozen = False

    async def everyone_up(self) -> None:
        """Wait until all members are up."""
        async with asyncio.timeout(_START_SECONDS):
            for member in self.members:
                if member.frozen:
                    self.thaw(member)
            while not all(member.target for member in self.members):
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End all of them as an operator would, all at once; each must end well."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        running = [member for member in self.members if not member.down.is_set()]
        await asyncio.gather(*(self.restart(member) for member in running))

    # --- inside

    def _order(self, what: Mapping[str, Any]) -> None:
        assert self._nursery is not None
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(what).encode() + b"\n")

    def _start(self, member: Member) -> None:
        member.number += 1
        member.pid = 0
        member.code, member.doomed, member.frozen = None, "", False
        member.up.clear()
        member.down.clear()
        child.set_shift(member.clock, 0.0)
        self._order(
            {
                "id": member.identity,
                "arguments": member.arguments,
                "env": {**self._env, child.CLOCK: str(member.clock)},
                "out": str(self.logs / f"{member.identity}.out"),
                "err": str(self.logs / f"{member.identity}.log"),
            }
        )

    async def _hear(self) -> None:
        assert self._nursery is not None
        assert self._nursery.stdout is not None
        async for line in self._nursery.stdout:
            told = json.loads(line)
            if "ready" in told:
                self._ready.set()
                continue
            name = told["id"].rpartition(".")[0]
            (member,) = (member for member in self.members if member.name == name)
            if "pid" in told:
                member.pid = told["pid"]
                if member.pidfd >= 0:
                    os.close(member.pidfd)
                member.pidfd = os.pidfd_open(member.pid)
                self._history.note("started", process=member.identity, pid=member.pid)
                self._background(self._see_up(member, member.number))
            else:
                self._ended(member, told["code"])

    def _background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _see_up(self, member: Member, number: int) -> None:
        path = self.logs / f"{member.identity}.out"
        for _ in range(int(_START_SECONDS / 0.02)):
            if member.number != number or member.down.is_set():
                return
            if path.exists() and path.read_text().endswith("\n"):
                member.up.set()
                return
            # A process that is stopped while it starts takes longer.
            await asyncio.sleep(0.02)
        self._history.violation("a process does not come up", process=member.identity)

    def _ended(self, member: Member, code: int) -> None:
        self._history.note(
            "ended", process=member.identity, code=code, because=member.doomed
        )
        started = member.up.is_set()
        member.code = code
        member.up.clear()
        member.down.set()
        refused = code == EXIT_CONFIGURATION and not started and self.may_refuse.is_set()
        if refused:
            self._history.note("refused to start", process=member.identity)
        suicide = self._mortal and code == -signal.SIGKILL
        wanted = {"kill": (-signal.SIGKILL,), "term": (0,), "": ()}[member.doomed]
        # A process that has no handler yet ends by the signal itself.
        early = member.doomed == "term" and not started and code == -signal.SIGTERM
        if code not in wanted and not (refused or early or suicide):
            self._history.violation(
                "a process ended by itself"
                if not member.doomed
                else "a process ended badly",
                process=member.identity,
                code=code,
                log=self.logs / f"{member.identity}.log",
            )
        if not self._stopping:
            # One that cannot even start must not take the whole machine.
            pause = _RESTART_PAUSE if member.doomed or refused or suicide else 2.0
            self._background(self._again(member, pause))

    async def _again(self, member: Member, pause: float) -> None:
        await asyncio.sleep(pause)
        self._start(member)

    async def _end(self) -> None:
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        if self._nursery is not None:
            assert self._nursery.stdin is not None
            # It takes whoever is left with it.
            self._nursery.stdin.close()
            try:
                async with asyncio.timeout(_END_SECONDS):
                    await self._nursery.wait()
            except TimeoutError:
                self._nursery.kill()
                await self._nursery.wait()
        if self._hearing is not None:
            self._hearing.cancel()
            with suppress(asyncio.CancelledError):
                await self._hearing
        for member in self.members:
            if member.pidfd >= 0:
                os.close(member.pidfd)
                member.pidfd = -1
