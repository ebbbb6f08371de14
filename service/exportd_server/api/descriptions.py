"""What reflection tells of the contract: all of it, comments and JSON names included.

The descriptors in generated Python code lack both, and the library that serves
reflection looks neither up. So the contract comes from `contract.binpb`, which is
compiled with its comments; what other packages bring gets its JSON names here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool


@dataclass(frozen=True)
class File:
    """A file, with what the library asks of a `FileDescriptor`."""

    proto: descriptor_pb2.FileDescriptorProto
    pool: Pool

    @property
    def name(self) -> str:
        """Its path."""
        return self.proto.name

    @property
    def dependencies(self) -> Sequence[File]:
        """The files it imports."""
        return [self.pool.FindFileByName(name) for name in self.proto.dependency]

    def CopyToProto(self, proto: descriptor_pb2.FileDescriptorProto) -> None:  # noqa: N802 - the library's name
        """Fill `proto` with it."""
        proto.CopyFrom(self.proto)


class Pool:
    """The contract as it was written, and everything else from the default pool."""

    def __init__(self, contract: Iterable[descriptor_pb2.FileDescriptorProto]) -> None:
        self._contract = {file.name: file for file in contract}
        self._symbols = {
            symbol: file.name
            for file in self._contract.values()
            for symbol in symbols(file)
        }
        self._default = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        """Extensions, of which the contract has none, are the default pool's."""
        return getattr(self._default, name)

    def FindFileByName(self, name: str) -> File:  # noqa: N802 - the library's name
        """A file by its path; raises `KeyError`."""
        if name in self._contract:
            return File(self._contract[name], self)
        return self._other(self._default.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> File:  # noqa: N802 - the library's name
        """The file that defines a message, field, enum, service or method; raises
        `KeyError`."""
        if symbol in self._symbols:
            return self.FindFileByName(self._symbols[symbol])
        return self._other(self._default.FindFileContainingSymbol(symbol))

    def _other(self, descriptor: Any) -> File:
        proto = descriptor_pb2.FileDescriptorProto()
        descriptor.CopyToProto(proto)
        for message in proto.message_type:
            _name_fields(message)
        return File(proto, self)


@cache
def contract() -> Pool:
    """The pool that reflection serves from."""
    data = resources.files(__package__).joinpath("contract.binpb").read_bytes()
    return Pool(descriptor_pb2.FileDescriptorSet.FromString(data).file)


def symbols(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    """The full names of what a file defines."""
    for message in file.message_type:
        yield from _symbols_of(message, file.package)
    for enum in file.enum_type:
        yield f"{file.package}.{enum.name}"
    for service in file.service:
        yield f"{file.package}.{service.name}"
        for method in service.method:
            yield f"{file.package}.{service.name}.{method.name}"


def _symbols_of(message: descriptor_pb2.DescriptorProto, scope: str) -> Iterator[str]:
    name = f"{scope}.{message.name}"
    yield name
    for field in message.field:
        yield f"{name}.{field.name}"
    for enum in message.enum_type:
        yield f"{name}.{enum.name}"
    for nested in message.nested_type:
        yield from _symbols_of(nested, name)


def _name_fields(message: descriptor_pb2.DescriptorProto) -> None:
    for field in message.field:
        if not field.json_name:
            field.json_name = json_name(field.name)
    for nested in message.nested_type:
        _name_fields(nested)


def json_name(name: str) -> str:
    """The name of a field in JSON (https://protobuf.dev/programming-guides/json/)."""
    first, *rest = name.split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in rest)
