"""Writes docs/api.md from the contract, the table of errors and the worked examples.

    python tools/api_reference.py [--check]

With `--check` it says whether the page is stale. What is missing fails both: an RPC without
an example, an example without an RPC, a reason that no comment gives to anybody, or one
that the contract and the server see differently.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    MethodOptions,
    ServiceDescriptorProto,
)

from exportd_server.errors import TABLE, ErrorReason

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
TARGET = ROOT / "docs/api.md"
EXAMPLES = ROOT / "docs/examples/api"
"""`<Rpc>.json` has `request` and `response`, which for a stream is a list."""
ERROR_EXAMPLE = EXAMPLES / "error.json"
"""Has `method`, `request` and `status`, a `google.rpc.Status`."""

_ADDRESS = "localhost:50051"
_WIDTH = 92
_REASON = "ERROR_REASON_"

OUTSIDE = {
    "google.protobuf.Timestamp": 'A moment, in UTC: `"2026-01-02T03:04:05.678Z"`',
    "google.protobuf.Duration": 'A length of time, in seconds: `"3600s"`, `"0.5s"`',
    "google.protobuf.Struct": "Any JSON object",
    "google.rpc.Status": "An error as calls answer it, too: see [Errors](#errors)",
}
"""Types of other packages, and how JSON writes them."""

HEAD = """\
# API

The contract `{package}`, RPC by RPC. It is made from [proto/](../proto/{folder}) by
`tools/api_reference.py`, and its examples from [examples/api](examples/api): the tests make
each of their calls and compare the answer.

{contents}
## Reading this page

The tables name a field as the contract does, `job_id`; JSON, and so `grpcurl`, writes
`jobId`, and in requests takes both. The type of a field says how often it is there:

| Type | |
|---|---|
| `int64` | Always has a value. One that is 0, empty or false is left out of JSON |
| optional `int64` | Can be absent, which is something else than 0 |
| repeated `int64` | A list, which can be empty |
| map of `string` to `int64` | A JSON object |
| [Job](#job) | A message can be absent |
| `int64`, one of `kind` | At most one of the fields of `kind` is there |

JSON writes `int64` as a string, because many readers of JSON would round it, `bytes` in
base64, and values of enums by their names. Types of other packages it writes like this:

| Type | |
|---|---|
{outside}
The examples talk to a server on the sample data (`make run`) that has an HTTP port and two
connections for sinks besides: `reports`, a directory, and `hooks`, for webhooks. Ids and
times differ from call to call, and counts with the size of the sample data. `…` stands for
one or more of the like, and `<word>` for a text that is another each time.

"""


class Fault(Exception):
    """The contract, the server and the examples do not go together."""


@dataclass(frozen=True)
class Row:
    """A field of a message, or a value of an enum."""

    number: int
    name: str
    comment: str
    type: str = ""
    """Of a field: the name of its type."""
    pattern: str = ""
    """Of a field: how it is written, with `{}` for the type."""


@dataclass(frozen=True)
class Type:
    """A message or an enum."""

    name: str
    file: str
    comment: str
    rows: tuple[Row, ...]
    is_enum: bool
    choices: Mapping[str, str] = field(default_factory=dict)
    """Comments of its oneofs."""


@dataclass(frozen=True)
class Method:
    """An RPC."""

    name: str
    service: str
    comment: str
    request: str
    response: str
    streams: bool
    safety: str


class Contract:
    """What the protos say."""

    def __init__(self, files: list[FileDescriptorProto]) -> None:
        self.package = files[0].package
        self.types: dict[str, Type] = {}
        self.services: dict[str, tuple[str, list[Method]]] = {}
        for file in files:
            comments = {
                tuple(place.path): place.leading_comments
                for place in file.source_code_info.location
            }
            for index, message in enumerate(file.message_type):
                self._add(self._message(file, message, comments, (4, index)))
            for index, enum in enumerate(file.enum_type):
                self._add(_enum(file, enum, comments, (5, index)))
            for index, service in enumerate(file.service):
                self.services[service.name] = (
                    comments[6, index],
                    list(self._methods(service, comments, (6, index))),
                )

    @classmethod
    def read(cls) -> Contract:
        """The contract below `proto/`."""
        protos = sorted(PROTO.glob("exportd/v1/*.proto"))
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory) / "descriptors"
            subprocess.run(
                [
                    *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"),
                    *("--include_source_info", f"--descriptor_set_out={target}"),
                    *map(str, protos),
                ],
                check=True,
            )
            return cls(list(FileDescriptorSet.FromString(target.read_bytes()).file))

    def methods(self) -> list[Method]:
        """Every RPC, in the order of the contract."""
        return [method for _, methods in self.services.values() for method in methods]

    def _add(self, found: Type) -> None:
        self.types[found.name] = found

    def _local(self, full_name: str) -> str:
        return full_name.removeprefix(".").removeprefix(f"{self.package}.")

    def _methods(
        self,
        service: ServiceDescriptorProto,
        comments: Mapping[tuple[int, ...], str],
        path: tuple[int, ...],
    ) -> Iterator[Method]:
        for index, method in enumerate(service.method):
            yield Method(
                method.name,
                f"{self.package}.{service.name}",
                comments[*path, 2, index],
                self._local(method.input_type),
                self._local(method.output_type),
                method.server_streaming,
                _safety(method),
            )

    def _message(
        self,
        file: FileDescriptorProto,
        message: DescriptorProto,
        comments: Mapping[tuple[int, ...], str],
        path: tuple[int, ...],
    ) -> Type:
        entries = {nested.name: nested for nested in message.nested_type}
        if message.enum_type or not all(e.options.map_entry for e in entries.values()):
            raise Fault(f"{message.name}: types inside types are not told apart here")
        rows = []
        for index, each in enumerate(message.field):
            type_name, pattern = self._type(each), "{}"
            if (entry := entries.get(type_name.rpartition(".")[2])) is not None:
                key, value = map(self._type, entry.field)
                type_name, pattern = value, f"map of `{key}` to {{}}"
            elif each.label == FieldDescriptorProto.LABEL_REPEATED:
                pattern = "repeated {}"
            elif each.proto3_optional:
                pattern = "optional {}"
            elif each.HasField("oneof_index"):
                pattern = f"{{}}, one of `{message.oneof_decl[each.oneof_index].name}`"
            comment = comments[*path, 2, index]
            rows.append(Row(each.number, each.name, comment, type_name, pattern))
        choices = {
            each.name: comments[*path, 8, index]
            for index, each in enumerate(message.oneof_decl)
            if (*path, 8, index) in comments
        }
        return Type(message.name, file.name, comments[path], tuple(rows), False, choices)

    def _type(self, each: FieldDescriptorProto) -> str:
        if each.type_name:
            return self._local(each.type_name)
        kind = FieldDescriptorProto.Type.Name(each.type)
        return kind.removeprefix("TYPE_").lower()

    @cached_property
    def owners(self) -> dict[str, str]:
        """The one RPC that each type belongs to: its request, its response, and what only
        types of the same RPC name. Types that several have in common are left out."""
        roots: dict[str, str] = {}
        for method in self.methods():
            roots |= {method.request: method.name, method.response: method.name}
        users: dict[str, set[str]] = {name: set() for name in self.types}
        for user in self.types.values():
            for row in user.rows:
                if row.type in users and row.type != user.name:
                    users[row.type].add(user.name)
        owners = dict(roots)
        while True:
            more = {
                name: next(iter(found))
                for name in self.types
                if name not in owners
                and users[name] <= owners.keys()
                and len(found := {owners[user] for user in users[name]}) == 1
            }
            if not more:
                return owners
            owners |= more


def _enum(
    file: FileDescriptorProto,
    enum: EnumDescriptorProto,
    comments: Mapping[tuple[int, ...], str],
    path: tuple[int, ...],
) -> Type:
    rows = tuple(
        Row(value.number, value.name, comments[*path, 2, index])
        for index, value in enumerate(enum.value)
    )
    return Type(enum.name, file.name, comments[path], rows, is_enum=True)


def _safety(method: MethodDescriptorProto) -> str:
    return {
        MethodOptions.IDEMPOTENCY_UNKNOWN: "",
        MethodOptions.NO_SIDE_EFFECTS: "Changes nothing, and can be repeated.",
        MethodOptions.IDEMPOTENT: "Can be repeated: a second call changes nothing more.",
    }[method.options.idempotency_level]


# --- errors


@dataclass(frozen=True)
class Reason:
    """An error reason: what the contract says, and who names it."""

    number: int
    name: str
    code: str
    meaning: str
    named_by: tuple[str, ...]


def reasons(contract: Contract) -> list[Reason]:
    """Every reason but the one that is never sent. Raises `Fault`."""
    rows = contract.types["ErrorReason"].rows
    names = {row.name.removeprefix(_REASON): row for row in rows if row.number}
    if names.keys() != set(ErrorReason):
        raise Fault(
            "ErrorReason and exportd_server.errors differ: "
            + ", ".join(sorted(names.keys() ^ set(ErrorReason)))
        )
    named: dict[str, list[str]] = {name: [] for name in names}
    for method in contract.methods():
        for name in _named(contract, method):
            named[name].append(f"[{method.name}](#{_anchor(method.name)})")
    found = []
    for name, row in names.items():
        told = re.fullmatch(r"(?:Of (a \w+): )?([A-Z_]+)\. (.+)", _line(row.comment))
        code = TABLE[ErrorReason(name)].code.name
        if told is None or told[2] != code:
            raise Fault(f"{row.name}: its comment must begin with its code, {code}")
        by = [told[1]] if told[1] else []
        by += named[name] or ([] if by else _any(contract, code))
        if not by:
            raise Fault(f"{row.name}: no RPC names it; add it to the comment of one")
        found.append(Reason(row.number, name, code, told[3], tuple(by)))
    return found


def _named(contract: Contract, method: Method) -> list[str]:
    """The reasons that the comment of an RPC names. A code without reasons is that of bad
    requests, and `as GetJob` are those of GetJob."""
    text = _line(method.comment).partition("Errors: ")[2]
    names = re.findall(r"`([A-Z_]+)`", text)
    if "INVALID_ARGUMENT" in text:
        names.append(ErrorReason.INVALID_REQUEST)
        fields = contract.types[method.request].rows
        if any(row.name == "page_token" for row in fields):
            names.append(ErrorReason.INVALID_PAGE_TOKEN)
    for other in contract.methods():
        if f"as {other.name}" in text:
            names += _named(contract, other)
    known = {str(reason) for reason in ErrorReason}
    return sorted(known.intersection(names))


def _any(contract: Contract, code: str) -> list[str]:
    """What every RPC of a service may answer stands in the service's comment."""
    return [
        f"any of [{name}](#{_anchor(name)})"
        for name, (comment, _) in contract.services.items()
        if re.search(rf"Any method may answer [^.]*\b{code}\b", _line(comment))
    ]


# --- the page


class Page:
    """Writes the page."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._reasons = reasons(contract)
        names = [method.name for method in contract.methods()]
        targets = [*contract.services, *names, *contract.types]
        if len({*map(_anchor, targets)}) != len(targets):
            raise Fault("two sections of the page would have the same name")
        self._targets = dict(zip(targets, map(_anchor, targets), strict=True))
        self._targets |= {reason.name: "errors" for reason in self._reasons}
        self._targets["ErrorReason"] = "errors"
        self._methods = set(names)

    def text(self) -> str:
        """The whole page. Raises `Fault`."""
        contract = self._contract
        parts = [
            HEAD.format(
                package=contract.package,
                folder=contract.package.replace(".", "/"),
                contents=self._contents(),
                outside="".join(f"| `{name}` | {how} |\n" for name, how in OUTSIDE.items()),
            )
        ]
        for service, (comment, methods) in contract.services.items():
            parts.append(f"## {service}\n\n{self._prose(comment)}")
            parts += map(self._method, methods)
        for title, types in self._shared().items():
            parts.append(f"## {title}\n\n")
            parts += [self._type(each, "###") for each in types]
        parts.append(self._errors())
        return "".join(parts).rstrip() + "\n"

    def _contents(self) -> str:
        lines = ["- [Reading this page](#reading-this-page)\n"]
        for service, (_, methods) in self._contract.services.items():
            lines.append(f"- {self._link(service)}\n")
            for method in methods:
                own = [self._link(each.name) for each in self._own(method)]
                beside = f": {', '.join(own)}" if own else ""
                lines.append(f"  - {self._link(method.name)}{beside}\n")
        for title, types in self._shared().items():
            links = ", ".join(self._link(each.name) for each in types)
            lines.append(f"- [{title}](#{_anchor(title)}): {links}\n")
        lines.append("- [Errors](#errors)\n")
        return "".join(lines)

    def _own(self, method: Method) -> list[Type]:
        """What belongs to an RPC besides its request and response, in the order in which
        a reader meets it."""
        contract = self._contract
        found: list[Type] = []
        ahead = [method.request, method.response]
        seen = set(ahead)
        while ahead:
            for row in contract.types[ahead.pop(0)].rows:
                if row.type not in seen and contract.owners.get(row.type) == method.name:
                    seen.add(row.type)
                    ahead.append(row.type)
                    found.append(contract.types[row.type])
        return found

    def _shared(self) -> dict[str, list[Type]]:
        """What several RPCs have in common, by the file it stands in."""
        found: dict[str, list[Type]] = {}
        for each in self._contract.types.values():
            if each.name not in self._contract.owners and each.name != "ErrorReason":
                title = f"Shared types: {Path(each.file).stem}"
                found.setdefault(title, []).append(each)
        return found

    def _method(self, method: Method) -> str:
        contract = self._contract
        streams = "a stream of " if method.streams else ""
        takes = (
            f"Takes {self._link(method.request)}, answers {streams}"
            f"{self._link(method.response)}. {method.safety}"
        )
        text = [f"### {method.name}\n\n{self._prose(method.comment)}"]
        text += [f"{takes.rstrip()}\n\n", _example(method)]
        text += [
            self._type(contract.types[name], "####")
            for name in (method.request, method.response)
        ]
        text += [self._type(each, "####") for each in self._own(method)]
        return "".join(text)

    def _type(self, each: Type, level: str) -> str:
        head = f"{level} {each.name}\n\n{self._prose(each.comment)}"
        for name, comment in each.choices.items():
            head += f"One of `{name}`: {self._linked(_line(comment))}\n\n"
        if not each.rows:
            return f"{head}It has no fields.\n\n"
        if each.is_enum:
            lines = ["| Number | Value | Meaning |", "|---|---|---|"]
            lines += [
                f"| {row.number} | `{row.name}` | {self._cell(row.comment)} |"
                for row in each.rows
            ]
        else:
            lines = ["| Number | Field | Type | Meaning |", "|---|---|---|---|"]
            lines += [
                f"| {row.number} | `{row.name}` | {self._kind(row)} | "
                f"{self._cell(row.comment)} |"
                for row in each.rows
            ]
        return head + "\n".join(lines) + "\n\n"

    def _kind(self, row: Row) -> str:
        if row.type in self._contract.types:
            return row.pattern.format(self._link(row.type))
        package, _, short = row.type.rpartition(".")
        if not package:
            return row.pattern.format(f"`{short}`")
        if row.type not in OUTSIDE:
            raise Fault(f"{row.name}: say in OUTSIDE how JSON writes {row.type}")
        return row.pattern.format(f"[{short}](#reading-this-page)")

    def _errors(self) -> str:
        kind = self._contract.types["ErrorReason"]
        unsent = kind.rows[0].name.removeprefix(_REASON)
        lines = [
            f"## Errors\n\n{self._prose(kind.comment)}",
            _error_example(self._contract),
            "| Number | Reason | Code | Named by | Meaning |\n|---|---|---|---|---|\n",
            f"| 0 | `{unsent}` | | | {self._cell(kind.rows[0].comment)} |\n",
        ]
        lines += [
            f"| {each.number} | `{each.name}` | `{each.code}` | {', '.join(each.named_by)} "
            f"| {self._cell(each.meaning)} |\n"
            for each in self._reasons
        ]
        return "".join(lines)

    def _link(self, name: str) -> str:
        return f"[{name}](#{self._targets[name]})"

    def _prose(self, comment: str) -> str:
        """A comment as paragraphs, its errors as one of their own."""
        text = re.sub(r"\s+Errors: ", "\n\n**Errors:** ", comment.strip())
        paragraphs = re.split(r"\n\s*\n", text)
        return "".join(f"{self._linked(_line(each))}\n\n" for each in paragraphs)

    def _cell(self, comment: str) -> str:
        return self._linked(_line(comment)).replace("|", "\\|")

    def _linked(self, text: str) -> str:
        """With links: from RPCs, and from types and reasons where they are code."""

        def link(match: re.Match[str]) -> str:
            code, word = match.groups()
            name = code.partition(".")[0] if code else word
            target = self._targets.get(name)
            if target is None or (word and word not in self._methods):
                return match[0]
            return f"[{match[0]}](#{target})"

        return re.sub(r"`([^`]+)`|\b([A-Z]\w+)\b", link, text)


def _line(comment: str) -> str:
    return " ".join(comment.split())


def _anchor(title: str) -> str:
    """Where a heading can be linked to."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


# --- examples


def _example(method: Method) -> str:
    file = EXAMPLES / f"{method.name}.json"
    if not file.is_file():
        raise Fault(f"{method.name} has no example: write {file.relative_to(ROOT)}")
    example = json.loads(file.read_text(encoding="utf-8"))
    response = example["response"]
    if isinstance(response, list) is not method.streams:
        raise Fault(f"{file.relative_to(ROOT)}: only the response of a stream is a list")
    messages = response if method.streams else [response]
    texts = [each if each == "…" else _folded(each) for each in messages]
    answer = "\n".join(texts)
    return f"{_call(method, example['request'])}```json\n{answer}\n```\n\n"


def _call(method: Method, request: Any, options: str = "-plaintext") -> str:
    data = _folded(request)
    if "'" in data:
        raise Fault(f"{method.name}: a shell ends its text at an apostrophe; use none")
    return (
        f"```console\n$ grpcurl {options} -d '{data}' \\\n"
        f"    {_ADDRESS} {method.service}/{method.name}\n```\n\n"
    )


def _error_example(contract: Contract) -> str:
    """A refused call, with the status as grpcurl prints it."""
    example = json.loads(ERROR_EXAMPLE.read_text(encoding="utf-8"))
    (method,) = (each for each in contract.methods() if each.name == example["method"])
    call = _call(method, example["request"], "-plaintext -format-error")
    status = json.dumps(example["status"], indent=2, ensure_ascii=False)
    return (
        "A bad request, and its answer as `grpcurl -format-error` prints it:\n\n"
        f"{call}```json\n{status}\n```\n\n"
    )


def _folded(value: Any, indent: int = 0, before: int = 0) -> str:
    """JSON, on one line wherever it fits behind an indent and what stands before it."""
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or indent + before + len(text) < _WIDTH:
        return text
    inner = indent + 2
    if isinstance(value, dict):
        keys = [f"{json.dumps(key, ensure_ascii=False)}: " for key in value]
        pieces = [
            key + _folded(each, inner, len(key))
            for key, each in zip(keys, value.values(), strict=True)
        ]
    else:
        pieces = [_folded(each, inner) for each in value]
    joined = f",\n{' ' * inner}".join(pieces)
    return f"{text[0]}\n{' ' * inner}{joined}\n{' ' * indent}{text[-1]}"


def page() -> str:
    """The whole page. Raises `Fault`."""
    contract = Contract.read()
    known = {f"{method.name}.json" for method in contract.methods()}
    for file in sorted(EXAMPLES.iterdir()):
        if file.name not in known and file != ERROR_EXAMPLE:
            raise Fault(f"{file.relative_to(ROOT)} is the example of no RPC")
    return Page(contract).text()


def main() -> int:
    """Write or check; returns the exit code."""
    try:
        fresh = page()
    except Fault as fault:
        print(fault)
        return 1
    if sys.argv[1:] != ["--check"]:
        TARGET.write_text(fresh, encoding="utf-8")
        return 0
    if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != fresh:
        print(f"{TARGET.relative_to(ROOT)} is not current: run make gen")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
