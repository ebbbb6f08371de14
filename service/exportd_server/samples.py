"""The sample catalogue: six datasets of made-up blockchain activity, as Parquet files.

Everything is a hash of a row's number and the seed, so the same size and seed give the
same bytes, and rows are made and written a row group at a time, whatever the size.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exportd_server.errors import ConfigurationError
from exportd_server.sources.duckdb import engine_version, write_parquet

CATALOGUE = "datasets.toml"
_MARKER = ".samples.json"
_VERSION = 3
_FILE_ROWS = 5_000_000
_START = 1_735_689_600  # 2025-01-01T00:00:00Z
_SPAN = 365 * 86_400
_NETWORKS = ("ethereum", "base", "arbitrum", "polygon")
_TOKENS = (
    ("USDC", "USD Coin"),
    ("WETH", "Wrapped Ether"),
    ("USDT", "Tether, USD"),
    ("DAI", 'Dai "Stablecoin"'),
    ("WBTC", "Wrapped BTC"),
    ("LINK", "ChainLink Token"),
    ("PEPE", "Pepe"),
    ("ARB", "Arbitrum"),
)
_COINS = (("BTC", 97_000), ("ETH", 3_400), ("SOL", 190), ("HYPE", 24), ("DOGE", 0.33))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Writes the SQL of one dataset: `i` is a row's number, of `count`."""

    count: int
    seed: int

    def hash(self, salt: int, of: str = "i") -> str:
        """64 random bits."""
        # The engine joins several hashes so that their low bits differ by a constant
        # only; hashed once more, columns of different salts are independent.
        return f"hash(hash({of}, {salt}, {self.seed}))"

    def below(self, salt: int, limit: int) -> str:
        """A random whole number from 0, below `limit`."""
        return f"({self.hash(salt)} % {limit})"

    def unit(self, salt: int) -> str:
        """A random float from 0, below 1."""
        return f"({self.below(salt, 2**53)}::DOUBLE / {2**53})"

    def pick(self, salt: int, values: tuple[str, ...]) -> str:
        """One of some texts."""
        texts = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
        return f"[{texts}][1 + {self.below(salt, len(values))}::BIGINT]"

    def moment(self, every: int = 1) -> str:
        """Moments that rise with the row's number, `every` rows sharing one."""
        step = f"(i // {every} * {every})::DOUBLE / {self.count} * {_SPAN}"
        return f"make_timestamptz(({_START} + floor({step}))::BIGINT * 1000000)"

    def block(self, every: int) -> str:
        """Block numbers that rise with the row's number."""
        return f"(21500000 + i // {every})::BIGINT"

    def transaction(self, every: int = 1) -> str:
        """A transaction's hash, 66 characters."""
        return f"'0x' || sha256('transaction {self.seed} ' || (i // {every}))"

    def address(self, salt: int, kind: str, pool: int) -> str:
        """One of `pool` addresses, 42 characters; the first ones are the busiest."""
        chosen = f"floor(pow({self.unit(salt)}, 3) * {pool})::BIGINT"
        return f"'0x' || left(sha256('{kind} {self.seed} ' || {chosen}), 40)"

    def amount(self, salt: int, digits: int = 6) -> str:
        """A positive amount with 18 digits after the point, small ones most often."""
        whole = (
            f"({self.hash(salt)} % pow(10, 1 + {self.below(salt + 1, digits)})::UBIGINT)"
        )
        fraction = f"lpad({self.below(salt + 2, 10**18)}::VARCHAR, 18, '0')"
        return f"CAST({whole} || '.' || {fraction} AS DECIMAL(38, 18))"

    def sometimes(self, salt: int, one_in: int, value: str) -> str:
        """The value, or NULL for one row in `one_in`."""
        return f"CASE WHEN {self.below(salt, one_in)} <> 0 THEN {value} END"

    def coin(self, salt: int) -> str:
        """A coin and its price, as a struct."""
        coins = ", ".join(
            f"{{'coin': '{coin}', 'price': {price}::DOUBLE}}" for coin, price in _COINS
        )
        return f"[{coins}][1 + {self.below(salt, len(_COINS))}::BIGINT]"


def _token_transfers(r: _Rows) -> dict[str, str]:
    token = r.below(9, len(_TOKENS))
    symbols = ", ".join(f"'{symbol}'" for symbol, _ in _TOKENS)
    names = ", ".join(f"'{name}'" for _, name in _TOKENS)
    return {
        "block_number": r.block(40),
        "block_time": r.moment(40),
        "transaction_hash": r.transaction(4),
        "log_index": "(i % 40)::INTEGER",
        "network": r.pick(1, _NETWORKS),
        "token_address": f"'0x' || left(sha256('token ' || {token}), 40)",
        "token_symbol": f"[{symbols}][1 + {token}::BIGINT]",
        "token_name": f"[{names}][1 + {token}::BIGINT]",
        "from_address": r.address(2, "account", 20_000),
        "to_address": r.address(3, "account", 20_000),
        "amount": r.amount(4),
        "amount_usd": r.sometimes(7, 8, f"round({r.unit(8)} * 25000, 2)"),
        "is_contract": f"{r.below(10, 3)} = 0",
        "memo": r.sometimes(
            11, 3, r.pick(12, ("", "payout", 'invoice "7"', "rent, May", "two\nlines"))
        ),
    }


def _native_balance_deltas(r: _Rows) -> dict[str, str]:
    sign = f"CASE WHEN {r.below(6, 2)} = 0 THEN -1 ELSE 1 END"
    return {
        "block_number": r.block(20),
        "block_time": r.moment(20),
        "network": r.pick(1, _NETWORKS),
        "account": r.address(2, "account", 20_000),
        "delta": f"CAST({r.amount(3, 3)} * ({sign}) AS DECIMAL(38, 18))",
        "reason": r.pick(7, ("transfer", "gas", "reward", "withdrawal")),
        "transaction_hash": r.sometimes(8, 10, r.transaction()),
    }


def _decoded_events(r: _Rows) -> dict[str, str]:
    def field(name: str, kind: str, value: str) -> str:
        return f"{{'name': '{name}', 'type': '{kind}', 'value': {value}}}"

    fields = ", ".join(
        (
            field("from", "address", r.address(2, "account", 20_000)),
            field("to", "address", r.address(3, "account", 20_000)),
            field("value", "uint256", r.hash(4) + "::VARCHAR"),
        )
    )
    return {
        "block_number": r.block(10),
        "block_time": r.moment(10),
        "transaction_hash": r.transaction(),
        "log_index": "(i % 200)::INTEGER",
        "network": r.pick(1, _NETWORKS),
        "contract_address": r.address(5, "contract", 500),
        "event_name": r.pick(6, ("Transfer", "Approval", "Swap", "Deposit")),
        "decoded_fields": f"list_slice([{fields}], 1, {r.below(7, 4)}::BIGINT)",
        "raw_data": r.sometimes(8, 5, f"unhex(md5('data {r.seed} ' || i))"),
        "decoded": f"{r.below(9, 20)} <> 0",
    }


def _hl_fills(r: _Rows) -> dict[str, str]:
    coin = r.coin(1)
    price = f"round(({coin}).price * (0.9 + 0.2 * {r.unit(2)}), 4)"
    size = f"round(pow({r.unit(3)}, 4) * 50 + 0.001, 3)"
    return {
        "fill_id": "(700000000 + i)::BIGINT",
        "time": r.moment(3),
        "account": r.address(4, "trader", 5_000),
        "coin": f"({coin}).coin",
        "side": r.pick(5, ("buy", "sell")),
        "price": price,
        "size": size,
        "fee": f"round({price} * {size} * 0.00035, 6)",
        "closed_pnl": r.sometimes(6, 2, f"round(({r.unit(7)} - 0.48) * 900, 6)"),
        "is_liquidation": f"{r.below(8, 200)} = 0",
        "order_id": f"({r.hash(9)} % {2**53})::BIGINT",
        "client_order_id": r.sometimes(10, 2, f"'0x' || md5('order {r.seed} ' || i)"),
    }


def _hl_funding(r: _Rows) -> dict[str, str]:
    return {
        "time": r.moment(50),
        "account": r.address(1, "trader", 5_000),
        "coin": f"({r.coin(2)}).coin",
        "funding_rate": f"round(({r.unit(3)} - 0.4) * 0.0002, 10)",
        "position_size": f"round(({r.unit(4)} - 0.5) * 200, 3)",
        "payment": f"CAST(round(({r.unit(5)} - 0.5) * 60, 6) AS DECIMAL(18, 6))",
    }


def _positions(r: _Rows) -> dict[str, str]:
    return {
        "snapshot_time": r.moment(100),
        "snapshot_date": f"CAST({r.moment(100)} AS DATE)",
        "network": r.pick(1, (*_NETWORKS, "hyperliquid")),
        "account": r.address(2, "account", 5_000),
        "asset": r.pick(3, tuple(symbol for symbol, _ in _TOKENS)),
        "quantity": r.amount(4, 5),
        "value_usd": r.sometimes(7, 12, f"round({r.unit(8)} * 100000, 2)"),
        "entry_price": r.sometimes(9, 4, f"round({r.unit(10)} * 4000, 4)"),
        "is_open": f"{r.below(11, 4)} <> 0",
        "tags": f"list_slice(['vault', 'hedge', 'cold'], 1, {r.below(12, 4)}::BIGINT)",
    }


@dataclass(frozen=True, slots=True)
class _Sample:
    """A dataset: how its rows are made, how many to 100 transfers, and its roles."""

    make: Callable[[_Rows], dict[str, str]]
    share: int
    description: str
    target: str
    network: str
    time: str


_SAMPLES = {
    "token_transfers": _Sample(
        _token_transfers,
        100,
        "Transfers of tokens between accounts, by block.",
        "from_address",
        "network",
        "block_time",
    ),
    "native_balance_deltas": _Sample(
        _native_balance_deltas,
        50,
        "Changes of accounts' native balances.",
        "account",
        "network",
        "block_time",
    ),
    "decoded_events": _Sample(
        _decoded_events,
        25,
        "Events of contracts, with their decoded fields.",
        "contract_address",
        "network",
        "block_time",
    ),
    "hl_fills": _Sample(
        _hl_fills, 50, "Fills of orders on the exchange.", "account", "", "time"
    ),
    "hl_funding": _Sample(
        _hl_funding, 10, "Funding payments of open positions.", "account", "", "time"
    ),
    "positions": _Sample(
        _positions,
        5,
        "Snapshots of accounts' positions.",
        "account",
        "network",
        "snapshot_time",
    ),
}


def refuse_other_files(directory: Path) -> None:
    """Raise `ConfigurationError` when the directory holds what `generate` did not write."""
    marker = directory / _MARKER
    if directory.exists() and not marker.is_file() and any(directory.iterdir()):
        raise ConfigurationError(
            f"{directory}: holds other files; name an empty or a new directory"
        )


def generate(directory: Path, token_transfers: int = 1_000_000, seed: int = 1) -> None:
    """Write the six datasets and their catalogue, `datasets.toml`, to a directory.

    `token_transfers` is the rows of that dataset; the others are in proportion, at least
    one row each. A directory that has them already in this size and seed is left alone,
    one with another size or seed is replaced, at once and whole. Raises
    `ConfigurationError` when the directory holds anything else.
    """
    if token_transfers < 1:
        raise ConfigurationError("the sample data needs at least 1 row")
    if are_there(directory, token_transfers, seed):
        return
    refuse_other_files(directory)
    identity, marker = _identity(token_transfers, seed), directory / _MARKER
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        # mkdtemp makes it private, which the data is not.
        fresh.chmod(0o755)
        _write(fresh, token_transfers, seed)
        (fresh / _MARKER).write_text(json.dumps(identity), encoding="utf-8")
        try:
            _replace(fresh, directory)
        except OSError:
            # Another process may have put the same there meanwhile.
            if not _reads(marker, identity):
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def are_there(directory: Path, token_transfers: int, seed: int = 1) -> bool:
    """Whether `generate` has nothing to do."""
    return _reads(directory / _MARKER, _identity(token_transfers, seed))


def _identity(token_transfers: int, seed: int) -> dict[str, object]:
    return {
        "version": _VERSION,
        "rows": token_transfers,
        "seed": seed,
        "engine": engine_version(),
    }


def _reads(marker: Path, identity: dict[str, object]) -> bool:
    try:
        return bool(json.loads(marker.read_text(encoding="utf-8")) == identity)
    except (OSError, ValueError):
        return False


def _write(directory: Path, token_transfers: int, seed: int) -> None:
    # A modification time that goes with the content: files made anew are the same.
    moment = _START + zlib.crc32(f"{_VERSION} {token_transfers} {seed}".encode()) % _SPAN
    for name, sample in _SAMPLES.items():
        rows = _Rows(max(1, token_transfers * sample.share // 100), seed)
        values = ", ".join(f'{sql} AS "{name}"' for name, sql in sample.make(rows).items())
        folder = directory / name
        folder.mkdir()
        for number, first in enumerate(range(0, rows.count, _FILE_ROWS)):
            end = min(first + _FILE_ROWS, rows.count)
            target = folder / f"part-{number:05}.parquet"
            generated = f"range({first}, {end}) AS r(i)"
            write_parquet(values, generated, target)
            os.utime(target, (moment, moment))
    (directory / CATALOGUE).write_text(_catalogue(), encoding="utf-8")


def _catalogue() -> str:
    lines = ["# Made by exportd together with the data beside it.\n"]
    for name, sample in _SAMPLES.items():
        lines += [
            f"\n[datasets.{name}]\n",
            f'description = "{sample.description}"\n',
            f'parquet = "{name}/*.parquet"\n',
            f'target_column = "{sample.target}"\n',
            f'network_column = "{sample.network}"\n' if sample.network else "",
            f'time_column = "{sample.time}"\n',
        ]
    return "".join(lines)


def _replace(fresh: Path, directory: Path) -> None:
    """Put a directory in the place of another, which never looks half written."""
    if directory.exists() and any(directory.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        directory.rename(old)
        fresh.rename(directory)
        shutil.rmtree(old)
    else:
        fresh.rename(directory)
