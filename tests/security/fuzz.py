"""Sends a running server requests that nobody would write by hand, and judges the answers.

    python -m tests.security.fuzz --requests 100000 --seed 7

It speaks over TLS, with API keys and tokens of two tenants, and ends with 1 when an answer
was wrong or the server's memory grew with the number of requests.

Requests are made from the descriptors of the contract: right ones, right ones with a few
fields spoilt, wild ones, and bytes that are no message. The request of a number is made
by a generator of that seed and number, out of what earlier answers gave: job ids, page
tokens, URLs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import string
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from exportd.v1 import dataset_pb2, error_pb2, export_service_pb2, job_pb2
from exportd_server.errors import TABLE, ErrorReason
from tests.support.identity import AUDIENCE, ISSUER, Authority, Issuer, api_key, bearer
from tests.support.samples import write_samples
from tests.support.server import Process, server_process

SERVICE = export_service_pb2.DESCRIPTOR.services_by_name["ExportService"]
METHODS: tuple[MethodDescriptor, ...] = tuple(SERVICE.methods)
REASONS = {name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.keys()[1:]}
MOST_TRAILERS = 8 * 1024
"""Bytes of trailers that clients take (the usual limit of their metadata)."""
MOST_REQUEST = 2**20
"""Bytes of a request that the server takes, unless it is told otherwise."""
MOST_GROWTH = 5.0
"""MiB that the server may grow by in 10 000 requests once it is warm: some 500 bytes of
each. What it may remember for a while, such as jobs that have not expired and tokens that
were seen, is bounded by time, and the allocator settles slowly: 2.8 were measured over
100 000 requests, most of it in their first half."""
NOISE = 32.0
"""MiB that its memory changes by in any case, in short runs most of all: exports that
happen to run, and libraries that are used for the first time."""
PATIENCE = 120.0
"""Seconds in which every call without a deadline of its own must be answered."""
SAMPLE_ROWS = 2_000
TENANTS = ("acme", "globex")
MOST_SAMPLES = 200
"""Looks at the server's memory, spread over a run."""
_WEIGHTS = {"CreateExport": 3.0, "CancelJob": 0.4, "DeleteJob": 0.3}
"""How often a method is called against the others: jobs must live to be asked about."""
LIST_PARAMETERS = {"page_size": (0, 1, 2, 3, 50, 1000)}

# --- values

_TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\x01\x1f\x7f\x85",
    "\r\nset-cookie: a=b",
    "\u202eevil\u202c",
    "\u2066\u2069\u200b\ufeff",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "z\u0351\u036b\u0343\u032a\u0302" * 8,
    "e\u0301 \u00e9",
    "\U0001f9d1\u200d\U0001f680\U0010ffff",
    "\ufffd\ufffe\uffff",
    "' OR '1'='1' --",
    '"; DROP TABLE jobs; --',
    "${EXPORTD_SECRET}%s%n{0}{}",
    "../../../etc/passwd",
    "a/../b",
    "/etc/passwd",
    "\\\\host\\share",
    "%00%2e%2e%2f",
    "=cmd|'/C calc'!A0",
    "NaN",
    "-0",
    "1e400",
    "9" * 400,
    "0x10",
    "true",
    "null",
    "[[[[",
    "2026-02-30T25:61:61Z",
    "9999-12-31T23:59:59.999999999+23:59",
    "0001-01-01T00:00:00+14:00",
    "\u0661\u0662\u0663",
    "00000000-0000-0000-0000-000000000000",
    "{01890a5d-ac96-774b-bcce-b302099a8057}",
    "01890A5D-AC96-774B-BCCE-B302099A8057",
    "urn:uuid:01890a5d-ac96-774b-bcce-b302099a8057",
    "http://127.0.0.1/",
    "https://[::1]:1/",
    "https://user:pass@example.invalid/#x",
    "https://\u4f8b\u3048.invalid/",
    "whsec_",
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "*",
    "%",
    "_",
)
_LENGTHS = (1, 2, 16, 17, 63, 64, 65, 127, 255, 256, 257, 1000, 4096, 20_000)
_RARE_LENGTHS = (200_000, 1_500_000, 4_300_000)
_ALPHABETS = (
    string.ascii_lowercase,
    string.printable,
    "\u0000\u0001\u001f\u007f\u0080\u00a0\u2028\u2029\ufeff",
    "\u0300\u0301\u0323\u05d0\u0627\u202e",
    "\U0001f600\U00020000\U0010fffd",
    "'\"`;,\\%_",
)
_SIZES = (0, 1, 2, 3, 10, 11, 32, 33, 100, 101)
_RARE_SIZES = (1000, 1001, 5000)
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_DOUBLES = (0.0, -0.0, 1.5, 5e-324, 1.8e308, float("nan"), float("inf"), float("-inf"))
_ODD_METADATA = ("x-odd", "x.y_z-0", "traceparent", "tracestate", "cookie", "content-md5")
_DEEP = 120
"""Messages inside messages: beyond what parsers of protobuf take."""
_DEPTH = 6


@dataclass
class Known:
    """What the answers so far have told, and what the operator would: good values."""

    datasets: list[Any] = field(default_factory=list)
    values: dict[str, deque[Any]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=300))
    )
    tokens: dict[str, deque[str]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=50))
    )

    def learn(self, method: str, answer: Message) -> None:
        """Remember what can be asked about."""
        if isinstance(answer, job_pb2.Job) and answer.HasField("manifest"):
            self.values["finished"].append(answer.job_id)
        for found, value in answer.ListFields():
            name = found.name
            if found.message_type is not None and not _is_map(found):
                for each in value if found.is_repeated else [value]:
                    self.learn(method, each)
            elif name == "next_page_token":
                self.tokens[method].append(value)
            elif name in {"job_id", "delivery_id", "queue", "sink", "url", "generation"}:
                known = self.values[name]
                if value not in known:
                    known.append(value)


def _is_map(found: FieldDescriptor) -> bool:
    message = found.message_type
    return message is not None and message.GetOptions().map_entry


class Maker:
    """Makes one request."""

    def __init__(self, seed: int, number: int, known: Known) -> None:
        self.random = random.Random(f"{seed}-{number}")
        self._known = known
        self._method = ""

    def chance(self, share: float) -> bool:
        """True that often."""
        return self.random.random() < share

    def wire(self, method: MethodDescriptor) -> bytes:
        """The bytes of a request."""
        self._method = method.name
        kind = self.random.random()
        if kind < 0.03:
            return self.random.randbytes(self.random.choice((0, 1, 5, 40, 300, 5000)))
        if kind < 0.04:
            return self._deep()
        if kind < 0.2:
            message = self._wild(method.input_type, 0)
        else:
            message = self._tame(method.input_type)
            if kind < 0.5:
                for _ in range(self.random.randint(1, 3)):
                    self._spoil(message)
        data: bytes = message.SerializeToString()
        if self.chance(0.06):
            data = self._damaged(data)
        return data

    def _damaged(self, data: bytes) -> bytes:
        random_ = self.random
        match random_.randint(0, 3):
            case 0:
                return data[: random_.randint(0, len(data))]
            case 1:
                # A field that the contract does not have.
                return data + b"\xfa\x7f\x05hello"
            case 2:
                return data + data[: random_.randint(0, len(data))]
            case _:
                spoilt = bytearray(data)
                for _ in range(min(len(spoilt), random_.randint(1, 5))):
                    spoilt[random_.randrange(len(spoilt))] = random_.randrange(256)
                return bytes(spoilt)

    def _deep(self) -> bytes:
        """One message in the other, in fields that the contract does not have, or has."""
        tag = self.random.choice((0x0A, 0x1A, 0xB2))
        data = b""
        for _ in range(self.random.choice((_DEEP, 20 * _DEEP))):
            size, length = len(data), bytearray()
            while size >= 0x80:
                length.append(size & 0x7F | 0x80)
                size >>= 7
            length.append(size)
            data = bytes((tag,)) + (b"\x01" if tag & 0x80 else b"") + bytes(length) + data
        return data

    # --- what a caller might mean

    def _tame(self, kind: Descriptor) -> Message:
        if kind is job_pb2.CreateExportRequest.DESCRIPTOR:
            return self._export()
        message = message_factory.GetMessageClass(kind)()
        for found in kind.fields:
            if found.name in {"job_id", "name", "queue", "delivery_id"}:
                share = 0.9
            elif found.name == "page_token":
                share = 0.4
            else:
                share = 0.25
            if self.chance(share):
                self._put(message, found, self._plausible)
        return message

    def _export(self) -> job_pb2.CreateExportRequest:
        random_ = self.random
        dataset = random_.choice(self._known.datasets)
        request = job_pb2.CreateExportRequest(
            dataset=dataset.name,
            format=random_.randint(1, 4),  # type: ignore[arg-type]
            validate_only=self.chance(0.6),
        )
        if self.chance(0.3):
            request.request_id = self._request_id()
        if self.chance(0.4):
            names = [column.name for column in dataset.columns]
            request.columns.extend(random_.sample(names, random_.randint(1, len(names))))
        for _ in range(random_.choice((0, 0, 1, 2))):
            self._filter(request, dataset)
        self._numbers(request)
        if self.chance(0.3):
            request.labels[random_.choice("abc")] = self._text()[:200].replace("\0", "")
        if self.chance(0.2):
            request.on_row_error = job_pb2.ROW_ERROR_POLICY_SKIP_AND_REPORT
        self._options(request)
        if self.chance(0.25):
            self._sinks(request)
        return request

    def _numbers(self, request: job_pb2.CreateExportRequest) -> None:
        random_ = self.random
        if self.chance(0.2):
            request.limit = random_.choice((1, 10, 1000, 2**63 - 1))
        if self.chance(0.2):
            request.max_part_rows = random_.choice((100, 500, 10**9))
        if self.chance(0.2):
            request.ttl.seconds = random_.choice((1, 5, 60, 3600))
        if self.chance(0.2):
            request.priority = random_.randint(-100, 100)

    def _options(self, request: job_pb2.CreateExportRequest) -> None:
        random_ = self.random
        if request.format in {dataset_pb2.FORMAT_CSV, dataset_pb2.FORMAT_JSONL}:
            request.compression = random_.randint(0, 3)  # type: ignore[assignment]
        if request.format == dataset_pb2.FORMAT_CSV and self.chance(0.5):
            request.csv_options.delimiter = random_.choice((",", ";", "\t", "|"))
            request.csv_options.dialect = random_.randint(0, 2)  # type: ignore[assignment]
            request.csv_options.header = self.chance(0.5)
        if request.format == dataset_pb2.FORMAT_PARQUET and self.chance(0.5):
            request.parquet_options.compression = random_.randint(0, 4)  # type: ignore[assignment]
            request.parquet_options.row_group_rows = random_.choice((0, 1, 1000))
        if request.format == dataset_pb2.FORMAT_ARROW and self.chance(0.5):
            request.arrow_options.compression = random_.randint(0, 3)  # type: ignore[assignment]

    def _filter(self, request: job_pb2.CreateExportRequest, dataset: Any) -> None:
        columns = [column for column in dataset.columns if column.operators]
        if not columns:
            return
        column = self.random.choice(columns)
        operator = self.random.choice(list(column.operators))
        condition = request.filters.add(column=column.name, operator=operator)
        several = operator in {
            dataset_pb2.FILTER_OPERATOR_IN,
            dataset_pb2.FILTER_OPERATOR_NOT_IN,
        }
        none = operator in {
            dataset_pb2.FILTER_OPERATOR_IS_NULL,
            dataset_pb2.FILTER_OPERATOR_IS_NOT_NULL,
        }
        for _ in range(0 if none else self.random.choice((1, 2, 40)) if several else 1):
            value = condition.values.add()
            match column.kind:
                case dataset_pb2.COLUMN_KIND_BOOLEAN:
                    value.bool_value = self.chance(0.5)
                case dataset_pb2.COLUMN_KIND_INTEGER:
                    value.int_value = self._integer(-(2**63), 2**63 - 1)
                case dataset_pb2.COLUMN_KIND_FLOAT:
                    value.double_value = self.random.choice(_DOUBLES)
                case dataset_pb2.COLUMN_KIND_DECIMAL:
                    value.string_value = self.random.choice(("12.5", "-0", "9" * 38, "1e5"))
                case dataset_pb2.COLUMN_KIND_BINARY:
                    value.bytes_value = self.random.randbytes(self.random.randint(0, 40))
                case dataset_pb2.COLUMN_KIND_TIMESTAMP:
                    value.timestamp_value.seconds = self.random.randint(-(10**10), 10**10)
                case _:
                    value.string_value = self._text()

    def _sinks(self, request: job_pb2.CreateExportRequest) -> None:
        for number in range(self.random.choice((1, 1, 2, 3))):
            sink = request.sinks.add(name=f"sink{number}")
            match self.random.randint(0, 5):
                case 0:
                    sink.webhook.url = "https://127.0.0.1:1/hook"
                    sink.webhook.secret = "whsec_" + "QUJD" * 10
                    sink.webhook.headers["x-mark"] = "a mark"
                case 1:
                    sink.database.connection = "table"
                    sink.database.table = self.random.choice(("orders", "exports", 'a"b'))
                    sink.database.create_table = True
                case _:
                    sink.local_file.connection = "files"
                    sink.local_file.path = self.random.choice(("", "a", "a/b", "c.d/e-f"))
        request.drop_after_delivery = self.chance(0.2)

    def _request_id(self) -> str:
        known = self._known.values["request_id"]
        if known and self.chance(0.5):
            return str(self.random.choice(known))
        made = str(uuid.UUID(bytes=self.random.randbytes(16)))
        known.append(made)
        return made

    def _plausible(self, found: FieldDescriptor) -> Any:
        random_, known = self.random, self._known
        if found.enum_type is not None:
            return random_.choice([value.number for value in found.enum_type.values[1:]])
        if found.name == "page_token":
            tokens = known.tokens[self._method]
            token = random_.choice(tokens) if tokens else ""
            return self._mutated(token) if self.chance(0.3) else token
        if found.name in {"name", "dataset"} and known.datasets:
            return random_.choice(known.datasets).name
        if found.name in LIST_PARAMETERS:
            return random_.choice(LIST_PARAMETERS[found.name])
        finished = known.values["finished"]
        if found.name == "job_id" and finished and self.chance(0.6):
            return random_.choice(finished)
        kept = known.values.get(found.name)
        if kept and self.chance(0.9):
            return random_.choice(kept)
        if found.cpp_type in _BITS:
            return random_.choice((0, 0, 1, 2, 100, 65_536))
        if found.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self.chance(0.5)
        return self._value(found, _DEPTH)

    def _mutated(self, text: str) -> str:
        spoilt = list(text or "e30")
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randrange(len(spoilt))
            spoilt[at] = self.random.choice(string.printable)
        return "".join(spoilt)[: self.random.choice((len(spoilt), len(spoilt) // 2))]

    # --- what nobody means

    def _spoil(self, message: Message) -> None:
        """Give one field, at any depth, a value of any kind."""
        kind: Any = message.DESCRIPTOR
        if not kind.fields:
            return
        found = self.random.choice(kind.fields)
        inner = found.message_type is not None and not found.is_repeated
        if inner and message.HasField(found.name) and self.chance(0.6):
            self._spoil(getattr(message, found.name))
        elif found.message_type is not None and found.is_repeated and not _is_map(found):
            held = getattr(message, found.name)
            if held and self.chance(0.8):
                self._spoil(self.random.choice(held))
            else:
                self._put(message, found, lambda each: self._value(each, 1))
        else:
            if self.chance(0.5):
                message.ClearField(found.name)
            self._put(message, found, lambda each: self._value(each, 1))

    def _wild(self, kind: Descriptor, depth: int) -> Message:
        message = message_factory.GetMessageClass(kind)()
        share = self.random.choice((0.1, 0.4, 0.9))
        for found in kind.fields:
            if self.chance(share if depth < _DEPTH else 0.05):
                self._put(message, found, lambda each: self._value(each, depth + 1))
        return message

    def _put(
        self, message: Any, found: FieldDescriptor, value: Callable[[FieldDescriptor], Any]
    ) -> None:
        if _is_map(found):
            # A map is a list of messages of a key and a value.
            assert found.message_type is not None
            entry = found.message_type.fields_by_name
            held = getattr(message, found.name)
            for _ in range(self._size()):
                key = value(entry["key"])
                if entry["value"].message_type is not None:
                    held[key].CopyFrom(value(entry["value"]))
                else:
                    held[key] = value(entry["value"])
        elif found.is_repeated:
            getattr(message, found.name).extend(
                value(found) for _ in range(self._size(big=found.message_type is None))
            )
        elif found.message_type is not None:
            made = value(found)
            getattr(message, found.name).CopyFrom(made)
        else:
            setattr(message, found.name, value(found))

    def _size(self, *, big: bool = False) -> int:
        if big and self.chance(0.02):
            return self.random.choice(_RARE_SIZES)
        return self.random.choice(_SIZES if self.chance(0.15) else _SIZES[:4])

    def _value(self, found: FieldDescriptor, depth: int) -> Any:
        random_ = self.random
        if found.message_type is not None:
            return self._wild(found.message_type, depth)
        if found.enum_type is not None:
            return random_.choice(
                [*(value.number for value in found.enum_type.values), -1, 99, 2**31 - 1]
            )
        match found.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if found.type == found.TYPE_BYTES:
                return random_.randbytes(random_.choice(_LENGTHS))
            case FieldDescriptor.CPPTYPE_STRING:
                return self._text()
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.chance(0.5)
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return random_.choice(_DOUBLES)
            case _:
                return self._integer(*_BITS[found.cpp_type])

    def _integer(self, least: int, most: int) -> int:
        edges = (least, least + 1, -1, 0, 1, 2, 999_999_999, 10**9, most - 1, most)
        value = self.random.choice((*edges, self.random.randint(least, most)))
        return min(max(value, least), most)

    def _text(self) -> str:
        random_ = self.random
        if self.chance(0.6):
            return random_.choice(_TEXTS)
        length = random_.choice(_RARE_LENGTHS if self.chance(0.001) else _LENGTHS)
        if length > 1000:
            return random_.choice(random_.choice(_ALPHABETS)) * length
        return "".join(random_.choices(random_.choice(_ALPHABETS), k=length))

    # --- around the request

    def metadata(self, credentials: Sequence[str]) -> tuple[tuple[str, str | bytes], ...]:
        """Headers: credentials that are mostly right, and what else people send."""
        random_ = self.random
        said: list[tuple[str, str | bytes]] = []
        kind = random_.random()
        if kind < 0.95:
            # Most calls are of the first tenant, or there would be little to find.
            most = 2 if self.chance(0.93) else len(credentials)
            said.extend(bearer(credentials[random_.randrange(min(most, len(credentials)))]))
        elif kind < 0.97:
            said.append(("authorization", self._header()))
        elif kind < 0.98:
            said.extend(bearer(self._spoilt(random_.choice(credentials))))
        said.extend(
            (random_.choice(_ODD_METADATA), self._header())
            for _ in range(random_.choice((0, 0, 0, 1, 3)))
        )
        if self.chance(0.1):
            said.append(("x-odd-bin", random_.randbytes(random_.choice((0, 1, 100, 2000)))))
        if self.chance(0.002):
            said.append(("x-large", "x" * random_.choice((9000, 17_000, 60_000))))
        return tuple(said)

    def _spoilt(self, credential: str) -> str:
        """A key or a token with some letters changed, or cut off."""
        letters = list(credential)
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randrange(len(letters))
            letters[at] = self.random.choice(string.ascii_letters + string.digits + "._-=")
        return "".join(letters)[: self.random.choice((len(letters), len(letters) // 2))]

    def _header(self) -> str:
        printable = string.ascii_letters + string.digits + " !#$%&'()*+,-./:;<=>?@[]^_`{|}~"
        length = self.random.choice((1, 8, 100, 1000))
        return "".join(self.random.choices(printable, k=length)).strip() or "x"

    def deadline(self, method: MethodDescriptor, wire: bytes) -> float | None:
        """Seconds for a caller who is in a hurry, or who follows; None: as long as it
        takes."""
        follows = False
        if method.name == "StreamDownload":
            request = export_service_pb2.StreamDownloadRequest()
            with contextlib.suppress(Exception):
                # Unreadable: then it is refused at once.
                request.ParseFromString(wire)
            follows = request.follow
        if method.name == "WatchJob" or follows:
            return self.random.choice((0.0, 0.002, 0.02, 0.1, 0.5))
        if self.chance(0.08):
            return self.random.choice((0.0, 0.0005, 0.002, 0.005, 0.02))
        return None

    def http(self, urls: Sequence[str]) -> bytes:
        """A request to the HTTP port, or what claims to be one."""
        random_ = self.random
        if self.chance(0.1):
            return random_.randbytes(random_.choice((1, 20, 500, 9000)))
        target = urlsplit(random_.choice(urls)).path if urls else "/v1/download/x"
        if self.chance(0.4):
            target = self._mutated(target).replace(" ", "").replace("\n", "") or "/"
        elif self.chance(0.1):
            target += random_.choice(
                ("?a=b", "/..", "//", "%00", "/%2e%2e/x", "#f", "\xe9")
            )
        method = random_.choice(
            ("GET",) * 8 + ("HEAD", "HEAD", "POST", "PUT", "get", "G\0")
        )
        lines = [f"{method} {target} HTTP/1.{random_.choice('11110')}", "Host: localhost"]
        lines.extend(
            f"{random_.choice(_HTTP_NAMES)}: {random_.choice(_HTTP_VALUES)}"
            for _ in range(random_.choice((0, 1, 1, 2, 70)))
        )
        if self.chance(0.05):
            lines.append("Content-Length: 5\r\n\r\nhello")
        if self.chance(0.03):
            lines.append("X-Long: " + "y" * random_.choice((4000, 5000, 100_000)))
        text = "\r\n".join([*lines, "Connection: close", "", ""])
        return text.encode("utf-8", "replace")


_HTTP_NAMES = ("Range", "Range", "If-Range", "If-Match", "If-None-Match", "Accept", "X")
_HTTP_VALUES = (
    "bytes=0-0",
    "bytes=5-",
    "bytes=-5",
    "bytes=-0",
    "bytes=5-2",
    "bytes=0-999999999999999999",
    "bytes=0-9999999999999999999999",
    "bytes=999999999999999999-",
    "bytes=0-1,3-4",
    "bytes=",
    "bytes=-",
    "bytes=\u0661-\u0662",
    "items=0-1",
    "*",
    '"x"',
    'W/"x", "y"',
    ",,,",
    "\x00",
    "",
)

# --- judging


@dataclass
class Outcome:
    """How a call ended. `hurried`: the caller set a short deadline or cancelled."""

    method: str
    wire: bytes
    error: grpc.aio.AioRpcError | None
    hurried: bool = False
    large: bool = False
    """More than the limits of the transport allow."""


def judge(outcome: Outcome) -> list[str]:
    """What is wrong with an answer."""
    error = outcome.error
    if error is None:
        return []
    code = error.code()
    wrong = []
    if code in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}:
        wrong.append(f"{code.name}: {error.details()}")
    weight = sum(len(key) + len(value) + 32 for key, value in _trailers(error))
    if weight > MOST_TRAILERS:
        wrong.append(f"{weight} bytes of trailers")
    if outcome.hurried and code in {
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }:
        return wrong
    if outcome.large and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return wrong
    return wrong + _judge_details(error)


def _judge_details(error: grpc.aio.AioRpcError) -> list[str]:
    code = error.code()
    try:
        status = rpc_status.from_call(error)
    except ValueError as odd:
        return [f"status and trailers differ: {odd}"]
    if status is None:
        return [f"no details: {code.name} {error.details()}"]
    info = error_details_pb2.ErrorInfo()
    if not any(packed.Unpack(info) for packed in status.details):
        return [f"no ErrorInfo: {error.details()}"]
    if info.domain != "exportd" or info.reason not in REASONS:
        return [f"{info.domain} {info.reason} is not of the contract"]
    wrong = []
    if TABLE[ErrorReason(info.reason)].code != code.value[0]:
        wrong.append(f"{info.reason} with {code.name}")
    if not (error.details() or "").startswith(f"[{info.reason}] "):
        wrong.append(f"message {error.details()!r}")
    return wrong


def _trailers(error: grpc.aio.AioRpcError) -> Iterator[tuple[str, str | bytes]]:
    yield "grpc-message", (error.details() or "")
    yield from error.trailing_metadata() or ()


def judge_log(text: str) -> tuple[list[str], Counter[str]]:
    """What is wrong with a log, and its events of each level."""
    wrong: list[str] = []
    events: Counter[str] = Counter()
    for line in text.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            wrong.append(f"no JSON in the log: {line[:300]}")
            continue
        level, event = said.get("level", "none"), said.get("event", "none")
        if level != "debug":
            events[f"{level}: {event}"[:120]] += 1
        if event == "unforeseen error" or level in {"error", "critical"}:
            wrong.append(f"in the log: {line[:3000]}")
    return wrong, events


def judge_http(sent: bytes, answer: bytes) -> list[str]:
    """What is wrong with an answer of the HTTP port; none at all is right for what is no
    request."""
    if not answer:
        return []
    head, _, body = answer.partition(b"\r\n\r\n")
    first = head.split(b"\r\n")[0].split(b" ")
    if len(first) < 2 or not first[0].startswith(b"HTTP/1."):
        return [f"no status line: {answer[:80]!r}"]
    status = int(first[1])
    if status >= 500:
        return [f"HTTP {status}: {body[:200]!r}"]
    if status >= 400 and body:
        said = json.loads(body)
        if set(said) != {"reason", "message"}:
            return [f"HTTP {status}: {body[:200]!r}"]
    return []


# --- running


@dataclass
class Report:
    """What came out of a run."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def _grown(self) -> tuple[float, float]:
        """Requests, and MiB of resident memory, between the middles of the second and of
        the last quarter of the run. Medians, as single samples are of one moment."""
        quarter = max(1, len(self.memory) // 4)
        early, late = (
            [statistics.median(column) for column in zip(*samples, strict=True)]
            for samples in (self.memory[quarter : 2 * quarter], self.memory[-quarter:])
        )
        return late[0] - early[0], late[1] - early[1]

    @property
    def growth(self) -> float:
        """MiB of resident memory for 10 000 requests, once a quarter of them is done."""
        requests, mebibytes = self._grown()
        return 10_000 * mebibytes / requests

    def leaks(self) -> list[str]:
        """What is wrong with the memory."""
        if len(self.memory) < MOST_SAMPLES // 2:
            return [f"only {len(self.memory)} samples of memory; the server ended early"]
        _, mebibytes = self._grown()
        if self.growth <= MOST_GROWTH or mebibytes <= NOISE:
            return []
        wrong = (
            f"memory grew by {mebibytes:.0f} MiB, {self.growth:.2f} for 10 000 requests; "
            f"{MOST_GROWTH:g} are allowed"
        )
        return [wrong]

    def codes(self, method: str) -> dict[str, int]:
        """How often a method ended with each code."""
        return {
            code: n for (name, code), n in sorted(self.counts.items()) if name == method
        }

    def text(self) -> str:
        """For people."""
        lines = [f"{sum(self.counts.values())} requests in {self.seconds:.0f} s"]
        for method in sorted({name for name, _ in self.counts}):
            told = ", ".join(f"{code} {n}" for code, n in self.codes(method).items())
            lines.append(f"  {method}: {told}")
        begin, end = self.memory[0][1], self.memory[-1][1]
        most = max(each for _, each in self.memory)
        lines.append(
            f"memory {begin:.0f} MiB at first, at most {most:.0f}, {end:.0f} in the end; "
            f"{self.growth:+.2f} MiB per 10 000 requests"
        )
        tenths = self.memory[:: max(1, len(self.memory) // 10)]
        lines.append("memory on the way: " + ", ".join(f"{m:.0f}" for _, m in tenths))
        lines += [f"log: {n} x {event}" for event, n in self.events.most_common(30)]
        lines += [f"WRONG {problem}" for problem in self.problems[:50]]
        lines.append(f"{len(self.problems)} problems")
        return "\n".join(lines)


@dataclass
class Target:
    """A server that can be fuzzed."""

    process: Process
    credentials: Sequence[str]
    """A key and a token of one tenant, and then those of the other."""
    trusted: grpc.ChannelCredentials
    http: tuple[str, int]
    metrics: str

    def memory(self) -> float:
        """Resident memory of the process, in MiB."""
        status = Path(f"/proc/{self.process.process.pid}/status").read_text()
        (line,) = (row for row in status.splitlines() if row.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def target(folder: Path, *, ledger: str = "") -> AsyncIterator[Target]:
    """A server process with all that can be asked of it: TLS, samples, sinks, keys and
    tokens of two tenants, an HTTP port, metrics. Its log has every line there is."""
    data = folder / "data"
    catalogue = write_samples(folder / "samples", SAMPLE_ROWS)
    (folder / "delivered").mkdir(parents=True)
    sinks = folder / "sinks.toml"
    sinks.write_text(
        '[connections.files]\ntenants = "*"\nshared = true\ntype = "local_file"\n'
        f'root = "{folder}/delivered"\n'
        '[connections.table]\ntenants = "*"\nshared = true\ntype = "database"\n'
        f'url = "sqlite:///{folder}/table.db"\n'
        '[connections.hook]\ntenants = "*"\nshared = true\ntype = "webhook"\n'
        "max_attempts = 2\n"
    )
    data.mkdir(parents=True)
    authority, issuer = Authority(folder / "tls"), Issuer()
    pair = authority.pair("server", ips=["127.0.0.1"])
    issuer.add("k")
    keys_of_tokens = folder / "jwks.json"
    keys_of_tokens.write_bytes(issuer.jwks())
    env = {
        "EXPORTD_CATALOGUE": str(catalogue),
        "EXPORTD_SINKS": str(sinks),
        "EXPORTD_HTTP__LISTEN": "127.0.0.1:0",
        "EXPORTD_METRICS__LISTEN": (metrics := f"127.0.0.1:{free_port()}"),
        "EXPORTD_LOG__LEVEL": "debug",
        "EXPORTD_IDENTITY__API_KEYS": "true",
        "EXPORTD_IDENTITY__JWT__ISSUER": ISSUER,
        "EXPORTD_IDENTITY__JWT__AUDIENCE": AUDIENCE,
        "EXPORTD_IDENTITY__JWT__JWKS_FILE": str(keys_of_tokens),
        "EXPORTD_TLS__CERT_FILE": str(pair.cert_file),
        "EXPORTD_TLS__KEY_FILE": str(pair.key_file),
        "EXPORTD_RETENTION__TTL": "30",
        "EXPORTD_RETENTION__REAP_INTERVAL": "2",
    }
    if ledger:
        env["EXPORTD_LEDGER__URL"] = ledger
        env["EXPORTD_STORE__URL"] = f"file://{folder}/outputs"
        env["EXPORTD_HTTP__SIGNING_KEYS"] = "k" * 44
        env["EXPORTD_DELIVERY__SECRET_KEYS"] = "s" * 44
        keys = [await _postgres_key(ledger, name) for name in TENANTS]
    else:
        keys = [(await api_key(data, name))[0] for name in TENANTS]
    tokens = [issuer.token(tenant=name, scope="admin", lifetime=86_400) for name in TENANTS]
    credentials = [each for pair in zip(keys, tokens, strict=True) for each in pair]
    with server_process(data, env=env) as process:
        (said,) = (
            json.loads(line)
            for line in process.log.read_text().splitlines()
            if '"serving"' in line
        )
        host, _, port = said["http"].rpartition(":")
        at = (urlsplit(host + ":0").hostname or "127.0.0.1", int(port.strip("/")))
        trusted = authority.trusted()
        yield Target(process, credentials, trusted, at, f"http://{metrics}/metrics")


async def _postgres_key(ledger: str, tenant: str) -> str:
    made = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "exportd_server", "keys", "create"),
        *("--tenant", tenant, "--scope", "admin"),
        env={"EXPORTD_LEDGER__URL": ledger, "EXPORTD_STORE__URL": "file:///tmp"},
        stdout=asyncio.subprocess.PIPE,
    )
    return (await made.communicate())[0].decode().strip()


class Run:
    """Fuzzes one server."""

    def __init__(self, server: Target, seed: int, requests: int, callers: int = 16) -> None:
        self._server = server
        self._seed = seed
        self._requests = requests
        self._callers = callers
        self._next = 0
        self.known = Known()
        self.report = Report()

    async def run(self) -> Report:
        """Send all requests; returns what came of it."""
        started = time.monotonic()
        options = (
            ("grpc.max_receive_message_length", 64 * 2**20),
            # Each has a connection of its own.
            ("grpc.use_local_subchannel_pool", 1),
        )
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    grpc.aio.secure_channel(
                        self._server.process.address, self._server.trusted, options=options
                    )
                )
                for _ in range(4)
            ]
            await self._look_around(channels[0])
            async with asyncio.TaskGroup() as group:
                for number in range(self._callers):
                    group.create_task(self._caller(channels[number % 4]))
        self.report.seconds = time.monotonic() - started
        self._sample()
        await self._inspect()
        return self.report

    async def _look_around(self, channel: grpc.aio.Channel) -> None:
        method = SERVICE.methods_by_name["ListDatasets"]
        call = self._unary(channel, method)
        answer = await call(b"", metadata=bearer(self._server.credentials[0]), timeout=30)
        self.known.datasets = [each for each in answer.datasets if each.exportable]
        self.known.values["sink"].extend(("sink0", "sink1", "local_file"))
        self.known.values["connection"].extend(("files", "table", "hook"))

    async def _caller(self, channel: grpc.aio.Channel) -> None:
        every = max(1, self._requests // MOST_SAMPLES)
        while self._next < self._requests and self._server.process.process.poll() is None:
            number, self._next = self._next, self._next + 1
            if number % every == 0:
                self._sample(number)
            maker = Maker(self._seed, number, self.known)
            kind = maker.random.random()
            if kind < 0.04:
                await self._http(number, maker)
            elif kind < 0.041:
                await self._noise(maker)
            else:
                await self._call(channel, number, maker)

    def _sample(self, number: int | None = None) -> None:
        if self._server.process.process.poll() is None:
            at = self._requests if number is None else number
            self.report.memory.append((at, self._server.memory()))

    def _wrong(self, number: int, what: Iterable[str], about: str) -> None:
        for each in what:
            self.report.problems.append(f"request {number}: {each} [{about[:600]}]")

    @staticmethod
    def _unary(channel: grpc.aio.Channel, method: MethodDescriptor) -> Any:
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        return make(
            f"/{SERVICE.full_name}/{method.name}",
            request_serializer=None,
            response_deserializer=message_factory.GetMessageClass(
                method.output_type
            ).FromString,
        )

    async def _call(self, channel: grpc.aio.Channel, number: int, maker: Maker) -> None:
        weights = [_WEIGHTS.get(each.name, 1.0) for each in METHODS]
        (method,) = maker.random.choices(METHODS, weights)
        wire = maker.wire(method)
        metadata = maker.metadata(self._server.credentials)
        deadline = maker.deadline(method, wire)
        large = (
            len(wire) > MOST_REQUEST
            or sum(len(key) + len(value) + 32 for key, value in metadata) > MOST_TRAILERS
        )
        patience = PATIENCE if deadline is None else deadline
        call = self._unary(channel, method)(wire, metadata=metadata, timeout=patience)
        outcome = Outcome(method.name, wire, None, deadline is not None, large)
        code = "OK"
        try:
            if method.server_streaming:
                outcome.hurried |= await self._read(call, method, maker)
            else:
                self.known.learn(method.name, await call)
        except grpc.aio.AioRpcError as error:
            outcome.error, code = error, error.code().name
        except asyncio.CancelledError:
            code = "CANCELLED"
            if not call.cancelled():
                raise
        self.report.counts[method.name, code] += 1
        self._wrong(number, judge(outcome), f"{method.name} {wire.hex()}")

    async def _read(self, call: Any, method: MethodDescriptor, maker: Maker) -> bool:
        """Read a stream; true when it was cancelled on the way."""
        leave = maker.random.choice((0, 1, 2)) if maker.chance(0.15) else None
        count = 0
        if leave == 0:
            await asyncio.sleep(maker.random.random() / 100)
            call.cancel()
            return True
        async for answer in call:
            if count == 0:
                self.known.learn(method.name, answer)
            count += 1
            if count == leave:
                call.cancel()
                return True
        return False

    async def _http(self, number: int, maker: Maker) -> None:
        sent = maker.http(list(self.known.values["url"]))
        answer = b""
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection(*self._server.http)
            writer.write(sent)
            whole = sent.endswith(b"\r\n\r\n")
            try:
                async with asyncio.timeout(PATIENCE if whole else 0.3):
                    answer = await reader.read(-1)
            except TimeoutError:
                # The rest of what never was a whole request may still be waited for.
                if whole:
                    self._wrong(number, ["no answer"], f"HTTP {sent[:500]!r}")
            finally:
                writer.close()
        code = answer[9:12].decode("latin-1") or "closed"
        self.report.counts["HTTP", code] += 1
        self._wrong(number, judge_http(sent, answer), f"HTTP {sent[:500]!r}")

    async def _noise(self, maker: Maker) -> None:
        """What is no gRPC at all, to its port."""
        start = maker.random.choice((b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
        with contextlib.suppress(ConnectionError):
            _, writer = await asyncio.open_connection(
                "127.0.0.1", self._server.process.port
            )
            writer.write(
                start + maker.random.randbytes(maker.random.choice((9, 200, 9000)))
            )
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.close()
        self.report.counts["noise", "sent"] += 1

    async def _inspect(self) -> None:
        """Look at the server after all that."""
        process = self._server.process
        if process.process.poll() is not None:
            self.report.problems.append(f"the server ended: {process.process.returncode}")
        else:
            url = self._server.metrics
            text = await asyncio.to_thread(
                lambda: urllib.request.urlopen(url, timeout=10).read().decode()  # noqa: S310 - of this machine
            )
            if "exportd_sink_queue_depth" not in text:
                self.report.problems.append("no metrics of sinks")
            code = await asyncio.to_thread(process.terminate)
            if code:
                self.report.problems.append(f"the server ended with {code} when told to")
        self.report.problems += self.report.leaks()
        wrong, self.report.events = judge_log(process.log.read_text(errors="replace"))
        self.report.problems += wrong


async def fuzz(
    folder: Path, requests: int, seed: int, *, ledger: str = "", callers: int = 16
) -> Report:
    """Start a server in the folder, fuzz it and end it."""
    async with target(folder, ledger=ledger) as server:
        return await Run(server, seed, requests, callers).run()


def main() -> int:
    """The command; 1 when something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.security.fuzz")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--ledger", default="", help="postgresql:// URL, migrated")
    parser.add_argument("--keep", type=Path, help="directory to work in, kept")
    said = parser.parse_args()
    sys.stdout.write(f"seed {said.seed}\n")
    with contextlib.ExitStack() as stack:
        folder = said.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = asyncio.run(
            fuzz(folder, said.requests, said.seed, ledger=said.ledger, callers=said.callers)
        )
    sys.stdout.write(report.text() + "\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
