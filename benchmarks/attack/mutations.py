"""What may happen to the two files of a saved ITDA: each changes a folder in place, by chance."""

import json
import shutil
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def bit_of_the_weights(folder: Path, other: Path, chance: Random) -> None:
    _flip(folder / WEIGHTS, chance)


def bit_of_an_atom_or_the_bias(folder: Path, other: Path, chance: Random) -> None:
    name = chance.choice(["W_dec", "b_dec"])
    tensors = _tensors(folder)
    bits = tensors[name].view(torch.int32).flatten()
    bits[chance.randrange(len(bits))] ^= torch.tensor(1 << chance.randrange(32)).to(torch.int32)
    _write(folder, tensors)


def bit_of_the_configuration(folder: Path, other: Path, chance: Random) -> None:
    _flip(folder / CFG, chance)


def truncation(folder: Path, other: Path, chance: Random) -> None:
    path = folder / chance.choice([CFG, WEIGHTS])
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def lost_page(folder: Path, other: Path, chance: Random) -> None:
    path = folder / chance.choice([CFG, WEIGHTS])
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    end = min(len(content), start + chance.choice([1, 8, 64, 512]))
    content[start:end] = chance.choice([bytes(end - start), chance.randbytes(end - start)])
    path.write_bytes(content)


def file_of_another(folder: Path, other: Path, chance: Random) -> None:
    shutil.copy(other / chance.choice([CFG, WEIGHTS]), folder)


def tensors_of_another(folder: Path, other: Path, chance: Random) -> None:
    own, foreign = _tensors(folder), _tensors(other)
    names = chance.sample(sorted(own), chance.randint(1, len(own) - 1))
    _write(folder, own | {name: foreign[name] for name in names})


def rows_in_another_order(folder: Path, other: Path, chance: Random) -> None:
    own = _tensors(folder)
    a, b = chance.sample(range(len(own["W_dec"])), 2)
    own["W_dec"][[a, b]] = own["W_dec"][[b, a]]
    _write(folder, own)


def value_of_the_weights(folder: Path, other: Path, chance: Random) -> None:
    own = _tensors(folder)
    row = own["b_dec"] if chance.random() < 0.5 else own["W_dec"][chance.randrange(len(own["W_dec"]))]
    i = chance.randrange(len(row))
    changes = [-row[i], row[i] * (1 + 10 ** chance.uniform(-6, 0)), 0.0, 1e-40, 1e38, float("nan"), float("inf")]
    row[i] = chance.choice(changes)
    _write(folder, own)


def dtype_of_the_weights(folder: Path, other: Path, chance: Random) -> None:
    own = _tensors(folder)
    names = chance.choice([["W_dec"], ["b_dec"], ["W_dec", "b_dec"], list(own)])
    dtype = chance.choice([torch.bfloat16, torch.float16, torch.int8])
    _write(folder, own | {name: own[name].to(dtype) for name in names})


def tensor_left_out_or_added(folder: Path, other: Path, chance: Random) -> None:
    own = _tensors(folder)
    name = chance.choice([*own, "W_enc", "threshold", "scaling_factor"])
    if name in own:
        del own[name]
    else:
        own[name] = torch.full((12,), 2.0)
    _write(folder, own)


def shape_of_a_tensor(folder: Path, other: Path, chance: Random) -> None:
    own = _tensors(folder)
    name = chance.choice(list(own))
    t = own[name]
    _write(folder, own | {name: chance.choice([t[:-1], t[:0], t[None], t.flatten()[0], torch.cat([t, t])])})


def field_of_the_configuration(folder: Path, other: Path, chance: Random) -> None:
    cfg = json.loads((folder / CFG).read_text())
    part = cfg["metadata"] if chance.random() < 0.5 else cfg
    name = chance.choice(sorted(part.keys() - {"metadata"}))
    values = [
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        4,
        2.5,
        10**30,
        float("inf"),
        "",
        "none",
        "hook_z",
        "layer_norm",
        [],
        {},
    ]
    part[name] = chance.choice([*values, json.loads((other / CFG).read_text()).get(name)])
    (folder / CFG).write_text(json.dumps(cfg))


def field_left_out(folder: Path, other: Path, chance: Random) -> None:
    cfg = json.loads((folder / CFG).read_text())
    part = cfg["metadata"] if chance.random() < 0.5 else cfg
    for name in chance.sample(sorted(part), chance.randint(1, 3)):
        del part[name]
    (folder / CFG).write_text(json.dumps(cfg))


def bomb_of_zeros(folder: Path, other: Path, chance: Random) -> None:
    _bomb(folder, _zeros())


def bomb_of_prompts_that_share(folder: Path, other: Path, chance: Random) -> None:
    n, length = 40_000, 160_000
    base = "".join(chance.choices("abcdefghijklm ", k=length))
    entries = [[0, base, 0], *([length - i, chance.choice("xyz"), 1] for i in range(n - 1))]
    _bomb(folder, _provenance(n, json.dumps(entries)), atoms=n)


def bomb_of_many_prompts(folder: Path, other: Path, chance: Random) -> None:
    n = 300_000
    _bomb(folder, _provenance(n, json.dumps([[0, chance.choice("abcdefgh"), 0] for _ in range(n)])), atoms=n)


def bomb_of_more_prompts_than_atoms(folder: Path, other: Path, chance: Random) -> None:
    _bomb(folder, _provenance(12, json.dumps([[0, "", 0]] * 1_000_000)))


def bomb_of_brackets(folder: Path, other: Path, chance: Random) -> None:
    n = 5_000_000
    _bomb(folder, _provenance(12, chance.choice(["[" * n, "[]" + ",[]" * n, "[" + "1," * n + "1]", '"' * n])))


def bomb_of_characters(folder: Path, other: Path, chance: Random) -> None:
    _bomb(folder, _provenance(12, json.dumps([[0, "😀" + "a" * 15_000_000, 0]] + [[1, "", 0]] * 11)))


def bomb_of_sequences(folder: Path, other: Path, chance: Random) -> None:
    n, ones = 500_000, torch.ones(500_000, dtype=torch.int64)
    more = {"row": torch.arange(n), "position": ones - 1, "sequence_row": torch.arange(n), "sequence_end": ones}
    _bomb(folder, _provenance(n, "[]", **more, sequence=torch.arange(n)), atoms=n)


def bomb_of_lengths(folder: Path, other: Path, chance: Random) -> None:
    length = chance.choice([2**62, 2**40, -1, 10**9])
    more = {"sequence_row": torch.arange(2), "sequence_end": torch.tensor([length, 2 - length])}
    _bomb(folder, _provenance(12, "[]", **more, sequence=torch.arange(2)))


def bomb_of_the_header(folder: Path, other: Path, chance: Random) -> None:
    raw = chance.choice([2**63 - 1, 2**40, 10**9]).to_bytes(8, "little") + b"{" * 1000
    _bomb(folder, zlib.compress(raw))


def bomb_of_a_note(folder: Path, other: Path, chance: Random) -> None:
    own = _tensors(folder)
    body = b"[]" + b",[]" * 5_000_000
    _write(folder, own | {"note": torch.frombuffer(bytearray(16) + body, dtype=torch.uint8)})


Mutation = Callable[[Path, Path, Random], None]
BOMBS: list[Mutation] = [found for name, found in globals().items() if name.startswith("bomb")]
MUTATIONS: list[Mutation] = [
    bit_of_the_weights,
    bit_of_an_atom_or_the_bias,
    bit_of_the_configuration,
    truncation,
    lost_page,
    file_of_another,
    tensors_of_another,
    rows_in_another_order,
    value_of_the_weights,
    dtype_of_the_weights,
    tensor_left_out_or_added,
    shape_of_a_tensor,
    field_of_the_configuration,
    field_left_out,
]


@cache
def _zeros() -> bytes:
    """1 MB that become 1 GB."""
    stream = zlib.compressobj(1)
    return b"".join([*(stream.compress(bytes(1 << 20)) for _ in range(1000)), stream.flush()])


def _flip(path: Path, chance: Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _tensors(folder: Path) -> dict[str, Tensor]:
    # Bytes, since tensors of a mapped file would change with it.
    return safetensors.torch.load((folder / WEIGHTS).read_bytes())


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / WEIGHTS).write_bytes(safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}))


def _provenance(n: int, prompts: str, **more: Tensor) -> bytes:
    empty = torch.zeros(0, dtype=torch.int64)
    parts = {"row": torch.zeros(n, dtype=torch.int64), "position": torch.arange(n)}
    parts |= dict.fromkeys(("sequence_row", "sequence_end", "sequence"), empty) | more
    return zlib.compress(safetensors.torch.save(parts, {"prompts": prompts, "tokenizer_digest": ""}), 6)


def _bomb(folder: Path, packed: bytes, atoms: int | None = None) -> None:
    """A provenance from somebody who wrote no note."""
    cfg: dict[str, Any] = json.loads((folder / CFG).read_text())
    own = _tensors(folder)
    if atoms is not None:
        own["W_dec"] = own["W_dec"][:1].repeat(atoms, 1)
        (folder / CFG).write_text(json.dumps(cfg | {"d_sae": atoms}))
    del own["note"]
    _write(folder, own | {"provenance": torch.frombuffer(bytearray(packed), dtype=torch.uint8)})
