"""The exportd server."""

import os

# Arrow chooses its allocator when it is loaded, so this comes before everything else. Its
# own one keeps a share of every peak; the C library's is told not to, in `platform.malloc`.
# `pyarrow.set_memory_pool` does not do: what Parquet's reader and writer take inside comes
# from Arrow's choice all the same.
# https://arrow.apache.org/docs/cpp/env_vars.html
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
