"""Hurts a fleet in every way there is, and proves that it lost nothing."""

from __future__ import annotations

import os

# The harness starts processes while it talks gRPC; none of them goes on with that.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
