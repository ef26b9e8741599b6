"""The content store of the test Hub's second transport, Xet: what hf_xet uploads, and how it gets it back.

A file is a list of terms, each a range of chunks in an xorb. A client uploads xorbs (chunks one after the other, each
compressed by itself) and then shards, which say for each file what its terms are and what its sha256 is. Files are put
together here too, without the client's code, so that a commit can check their hashes and other clients can read them.

The formats are described at https://huggingface.co/docs/xet. A hash is named by its four 64-bit words.
"""

import struct
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30  # flags of a file in a shard


class Term(NamedTuple):
    """Chunks `start` to `end`, without the last, of an xorb, and their length."""

    xorb: str
    length: int
    start: int
    end: int


@dataclass
class Xorb:
    """Hold what was uploaded, the offsets at which its chunks begin and the last one ends, and their content."""

    data: bytes
    offsets: list[int]
    chunks: list[bytes]


@dataclass
class XetStore:
    """Xorbs and files by name; `files_of` gives the files with a sha256."""

    xorbs: dict[str, Xorb] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)
    files_of: dict[str, str] = field(default_factory=dict)

    def add_xorb(self, name: str, data: bytes) -> bool:
        """Takes an upload; returns whether it is new. A damaged one raises ValueError."""
        offsets, chunks, position = [0], [], 0
        while position < len(data) and not data.startswith(b"XETBLOB", position):
            version, length, scheme, size = data[position], *_header(data, position)
            chunk = _decompress(data[position + 8 : position + 8 + length], scheme)
            if version != 0 or len(chunk) != size:
                raise ValueError(f"chunk {len(chunks)} of xorb {name} has {len(chunk)} bytes, expected {size}")
            position += 8 + length
            offsets.append(position)
            chunks.append(chunk)
        is_new = name not in self.xorbs
        self.xorbs[name] = Xorb(data, offsets, chunks)
        return is_new

    def add_shard(self, data: bytes) -> None:
        """Takes the list of files of a shard; one whose xorbs are absent raises ValueError."""
        position = 48
        while data[position : position + 32] != b"\xff" * 32:
            name, flags, count = _name(data, position), *struct.unpack_from("<II", data, position + 32)
            position += 48
            terms = []
            for _ in range(count):
                _, length, start, end = struct.unpack_from("<IIII", data, position + 32)
                terms.append(Term(_name(data, position), length, start, end))
                position += 48
            if missing := [term.xorb for term in terms if term.xorb not in self.xorbs]:
                raise ValueError(f"the shard names the xorb {missing[0]}, which was not uploaded")
            position += 48 * count if flags & _VERIFIED else 0
            self.files[name] = terms
            if flags & _WITH_SHA256:
                self.files_of[_name(data, position)] = name
                position += 48

    def content(self, name: str) -> bytes:
        """The content of a file."""
        return b"".join(b"".join(self.xorbs[term.xorb].chunks[term.start : term.end]) for term in self.files[name])

    def reconstruction(self, name: str, first: int, last: int | None, url: str) -> dict[str, Any]:
        """How a client gets bytes `first` to `last` of a file; IndexError past the end."""
        terms = self.files[name]
        ends = list(accumulate(term.length for term in terms))
        if first >= (ends[-1] if ends else 0):
            raise IndexError(first)
        wanted = [(term, end) for term, end in zip(terms, ends, strict=True) if end > first]
        if last is not None:
            wanted = [(term, end) for term, end in wanted if end - term.length <= last]
        places = {}
        for term, _ in wanted:
            offsets = self.xorbs[term.xorb].offsets
            entry = {
                "range": {"start": term.start, "end": term.end},
                "url": f"{url}/{term.xorb}",
                "url_range": {"start": offsets[term.start], "end": offsets[term.end] - 1},
            }
            if entry not in places.setdefault(term.xorb, []):
                places[term.xorb].append(entry)
        return {
            "offset_into_first_range": first - (wanted[0][1] - wanted[0][0].length),
            "terms": [
                {"hash": t.xorb, "unpacked_length": t.length, "range": {"start": t.start, "end": t.end}}
                for t, _ in wanted
            ],
            "fetch_info": places,
        }


def _header(data: bytes, position: int) -> tuple[int, int, int]:
    """Compressed length, scheme and length of a chunk."""
    compressed = int.from_bytes(data[position + 1 : position + 4], "little")
    return compressed, data[position + 4], int.from_bytes(data[position + 5 : position + 8], "little")


def _name(data: bytes, position: int) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", data, position))


def _decompress(data: bytes, scheme: int) -> bytes:
    """0: as it is; 1: LZ4; 2: LZ4 of the bytes 0, 4, 8, ..., then 1, 5, 9, ..., and so on."""
    if scheme == 0:
        return data
    content = _lz4(data)
    if scheme == 1:
        return content
    result, position = bytearray(len(content)), 0
    for group in range(4):
        count = len(range(group, len(content), 4))
        result[group::4] = content[position : position + count]
        position += count
    return bytes(result)


def _lz4(frame: bytes) -> bytes:
    """The content of an LZ4 frame; checksums go unread."""
    if frame[:4] != b"\x04\x22\x4d\x18":
        raise ValueError("a chunk is no LZ4 frame")
    flags, position, output = frame[4], 7, bytearray()
    position += 8 * (flags >> 3 & 1) + 4 * (flags & 1)
    while size := int.from_bytes(frame[position : position + 4], "little"):
        position += 4
        length = size & 0x7FFFFFFF
        block = frame[position : position + length]
        position += length + 4 * (flags >> 4 & 1)
        if size >> 31:
            output += block
        else:
            _lz4_block(block, output)
    return bytes(output)


def _lz4_block(block: bytes, output: bytearray) -> None:
    """Appends the content of a block; its matches may begin in an earlier one."""
    position = 0

    def length(nibble: int) -> int:
        nonlocal position
        total, more = nibble, nibble == 15
        while more:
            more = block[position] == 255
            total += block[position]
            position += 1
        return total

    while position < len(block):
        token = block[position]
        position += 1
        literals = length(token >> 4)
        output += block[position : position + literals]
        position += literals
        if position >= len(block):  # the last sequence has no match
            break
        offset = int.from_bytes(block[position : position + 2], "little")
        position += 2
        matched = length(token & 15) + 4
        start = len(output) - offset
        if start < 0 or offset == 0:
            raise ValueError("an LZ4 match begins before the content")
        pattern = bytes(output[start:])
        output += (pattern * (matched // len(pattern) + 1))[:matched]
