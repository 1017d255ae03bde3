"""Provenance as bytes of a file, which may come from anyone: reading them takes no more than their size allows.

They are safetensors, compressed. The prompts are JSON in its header, `[shared, rest, start]` of each (see `Link`); a
general parser would make many times their size of it, so what is as large as the file is read here.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from itda_lens.provenance.prompts import Link, Prompts, links
from itda_lens.provenance.sequences import Sequences, ends
from itda_lens.provenance.vocabulary import Vocabulary

# What the bytes of a file may become. Those of real builds become 3.5 to 4.2 times as many, 4 MB of zeros 4 GB.
_GROWTH = 6
_ROOM = 16 << 20
# The header without its prompts: five tensors, digests, and the tokens that were added to a tokenizer.
_HEADER = 4 << 20
_CHUNK = 1 << 16
_BACKSLASH, _QUOTE = b"\0", b"\1"


class Parts(NamedTuple):
    """What a `Provenance` is made of."""

    row: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    sequences: Mapping[int, Int64[Tensor, " _"]]
    prompts: Prompts
    tokenizer_digest: str | None
    vocabulary: Vocabulary | None


def order_of(row: Int64[Tensor, " n"], position: Int64[Tensor, " n"]) -> list[int]:
    """The order in which prompts are kept: a prompt mostly begins as the one before it in its row does."""
    return np.lexsort((position.numpy(), row.numpy())).tolist()


def pack(parts: Parts) -> UInt8[Tensor, " size"]:
    """A compressed form in bytes 0 to 255, which survive any cast of a weights file."""
    length = ends(parts.row, parts.position)
    rows = sorted(length) if parts.sequences else []
    tensors = {
        "row": parts.row,
        "position": parts.position,
        "sequence_row": torch.tensor(rows, dtype=torch.int64),
        "sequence_end": torch.tensor([length[r] for r in rows], dtype=torch.int64),
        "sequence": torch.cat([parts.sequences[r][: length[r]] for r in rows]) if rows else parts.row.new_empty(0),
    }
    order = order_of(parts.row, parts.position) if parts.prompts else []
    header = {
        "prompts": json.dumps(list(links(parts.prompts[i] for i in order))),
        "tokenizer_digest": parts.tokenizer_digest or "",
    }
    if parts.vocabulary is not None:
        _, base, size, added = parts.vocabulary
        header["vocabulary"] = json.dumps([base, size, list(added.items())])
    # Clones, since one tensor may be given for two of these, which safetensors refuses.
    raw = safetensors.torch.save({name: tensor.clone() for name, tensor in tensors.items()}, header)
    packed = zlib.compress(raw, 6)
    if len(raw) > _limit(len(packed)):  # a stream of one token, say: what is written is read again, too
        packed = zlib.compress(raw, 0)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, " size"], atoms: int | None = None) -> Parts:
    """The inverse of `pack`, in time and memory that the number of bytes bounds.

    Raises:
        ValueError: bytes that `pack` did not write, that become too many, or another number of atoms than is given.
    """
    try:
        raw = _inflated(packed.contiguous().numpy().data)
        size = int.from_bytes(raw[:8], "little")
        if size % 8 or size > len(raw) - 8:
            raise ValueError(f"its header can't have {size} bytes")
        header, written = _split(bytes(memoryview(raw)[8 : 8 + size]))
        del raw[: 8 + size]
        tensors = {name: _tensor(raw, name, header) for name in ("row", "position", "sequence")}
        row, position = tensors["row"], tensors["position"]
        rows, lengths = _tensor(raw, "sequence_row", header), _tensor(raw, "sequence_end", header)
        sequences = Sequences(rows, lengths, tensors["sequence"]) if len(rows) else {}
        metadata = header["__metadata__"]
        digest, vocabulary = str(metadata["tokenizer_digest"]) or None, None
        if digest is not None and "vocabulary" in metadata:
            base, below, added = json.loads(metadata["vocabulary"])
            vocabulary = Vocabulary(digest, str(base), int(below), {int(i): str(token) for i, token in added})
    except (zlib.error, LookupError, TypeError, AttributeError, RuntimeError, ValueError) as e:
        raise _unreadable(e) from e
    # What follows takes far more for each atom than the file does, so their number is checked before.
    if not len(sequences) <= len(row) == len(position):
        raise _unreadable(ValueError(f"{len(row)} rows, {len(position)} positions and {len(sequences)} sequences"))
    if atoms is not None and len(row) != atoms:
        raise ValueError(f"the provenance names {len(row)} atoms, but the dictionary has {atoms}")
    try:
        order = order_of(row, position) if written != b"[]" else []
        return Parts(row, position, sequences, Prompts(_links(written, len(order)), order), digest, vocabulary)
    except ValueError as e:
        raise _unreadable(e) from e


def _unreadable(e: Exception) -> ValueError:
    return ValueError(f"the provenance in this file can't be read ({e}): it was truncated or edited")


def _limit(size: int) -> int:
    return _ROOM + _GROWTH * size


def _inflated(packed: memoryview) -> bytearray:
    stream, raw, limit = zlib.decompressobj(), bytearray(), _limit(len(packed))
    for start in range(0, len(packed), _CHUNK):
        given = packed[start : start + _CHUNK]
        while given and not stream.eof:
            raw += stream.decompress(given, _CHUNK)
            given = stream.unconsumed_tail
            if len(raw) > limit:
                raise ValueError(f"its {len(packed):,} bytes become more than {limit:,}, the most that is taken")
    if not stream.eof or stream.unused_data:
        raise ValueError("it ends too early" if not stream.eof else "something follows its end")
    return raw


def _split(header: bytes) -> tuple[dict[str, dict], bytes]:
    """The header without its prompts, and these as JSON of their own."""
    before, found, rest = _marked(header).partition(b'"prompts":"')
    written, _, after = rest.partition(b'"')
    small = before + found + b'"' + after
    if not found or len(small) > _HEADER:
        raise ValueError(f"its header lacks prompts, or has more than {_HEADER:,} bytes besides them")
    return json.loads(_escaped(small)), written.replace(_QUOTE, b'"').replace(_BACKSLASH, b"\\")


def _marked(text: bytes) -> bytes:
    """JSON in which quotes stand at the ends of strings alone."""
    return text.replace(rb"\\", _BACKSLASH).replace(rb"\"", _QUOTE)


def _escaped(text: bytes) -> bytes:
    return text.replace(_QUOTE, rb"\"").replace(_BACKSLASH, rb"\\")


def _tensor(raw: bytearray, name: str, header: Mapping[str, dict]) -> Int64[Tensor, " _"]:
    dtype, (count,), (start, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
    fits = all(isinstance(n, int) for n in (count, start, end)) and 0 <= start <= end <= len(raw) and start % 8 == 0
    if dtype != "I64" or not fits or end - start != 8 * count:
        raise ValueError(f"its header describes {name} as what it is not")
    return torch.frombuffer(raw, dtype=torch.int64, count=count, offset=start) if count else torch.empty(0).long()


def _links(written: bytes, n: int) -> Iterator[Link]:
    marked = _marked(written)
    if marked.count(b'"') != 2 * n:
        raise ValueError(f"it has no prompts for {n} atoms, but others")
    parts = marked[1:-1].split(b'"')  # `[shared, `, rest, `, start], [shared, `, ...
    numbers = b"".join(parts[::2])
    if len(numbers) > 64 * (n + 1):
        raise ValueError("its prompts hold more than text and numbers")
    pairs = re.findall(rb"\[(\d{1,9}), , (\d{1,9})\]", numbers)
    for (shared, start), rest in zip(pairs, parts[1::2], strict=True):
        yield Link(int(shared), json.loads(b'"' + _escaped(rest) + b'"'), int(start))
