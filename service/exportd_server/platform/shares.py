"""Places that tenants share fairly."""

from __future__ import annotations

import asyncio
from collections import Counter


class Shares:
    """`size` places, of which a tenant takes another one only while it holds fewer than
    are free.

    So one tenant alone takes half of them, the next one half of what is left, and one
    that holds none finds a place unless many others have come before: to take all of 64
    it needs seven tenants. For the event loop's thread only.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._held: Counter[str] = Counter()
        self._given = asyncio.Event()

    def full(self) -> frozenset[str]:
        """The tenants that hold a place and may not take another one now."""
        return frozenset(
            tenant for tenant, count in self._held.items() if count >= self._free
        )

    def take(self, tenant: str) -> None:
        """Count a place as the tenant's."""
        self._free -= 1
        self._held[tenant] += 1

    def give(self, tenant: str) -> None:
        """The place is free again."""
        self._free += 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        self._given.set()

    async def wait(self, tenant: str) -> None:
        """Take a place for the tenant once it may have one."""
        while self._held[tenant] >= self._free:
            self._given.clear()
            await self._given.wait()
        self.take(tenant)
