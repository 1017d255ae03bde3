"""What a saved ITDA notes about itself, so that one that was edited, damaged or mixed up is not taken for it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import UInt8
from sae_lens import SAEConfig
from torch import Tensor

# SAELens's loader sets these itself, and it writes the versions anew where they are missing.
_NOT_NOTED = ("device", "dtype", "metadata")
_VERSIONS = ("sae_lens_version", "sae_lens_training_version")
# The weights show these, and are compared with them.
_SIZES = ("d_in", "d_sae")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Products of the same rows differ by this share of the rows' lengths at most; by more in half precision.
_TOLERANCE = 1e-6
_DIGEST_SIZE = 16
# Of a note besides the products of the rows: parsed, it takes many times its size.
_SIZE, _SIZE_PER_ROW = 4 << 20, 64


def note(cfg: SAEConfig, weights: Mapping[str, Tensor], provenance: Tensor | None) -> UInt8[Tensor, " size"]:
    """The note as bytes, which SAELens's casts leave whole.

    Of the weights it holds digests, one for each dtype in which they may be loaded, and the product of each row with a
    fixed vector, which tells the rows that differ from the others.

    Raises:
        ValueError: the metadata is too large to be read again.
    """
    content = {
        "settings": _settings(cfg),
        "metadata": cfg.metadata.to_dict(),
        "provenance": None if provenance is None else _digest([_bytes(provenance)]).hex(),
        "products": _products(weights).tolist(),
        "dtype": str(weights["W_dec"].dtype),
        "digests": {str(dtype): _weights_digest(weights, dtype) for dtype in _narrower(weights["W_dec"].dtype)},
    }
    sealed = _sealed(content)
    if len(sealed) > _most(weights):
        raise ValueError(f"the metadata is larger than the {_SIZE:,} bytes that an ITDA may have: keep it elsewhere")
    return sealed


def replacing(saved: UInt8[Tensor, " _"], replaced: SAEConfig) -> UInt8[Tensor, " _"]:
    """A note that also says what cfg.json may still hold beside these weights, if saving is interrupted."""
    return _sealed(_content(saved) | {"replaced": _configuration_digest(replaced)})


def read(saved: UInt8[Tensor, " size"], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a note says; raises a ValueError if it is not as it was written."""
    if len(saved) > _most(weights):
        raise ValueError(f"the note in the weights file has {len(saved):,} bytes, more than any that was written")
    return _content(saved)


def interrupted(content: Mapping[str, Any], cfg: SAEConfig, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What cfg.json would hold, had the saving of these weights not been interrupted before it was replaced.

    None where that is not so: where the configuration is not exactly the one that was to be replaced.
    """
    if content.get("replaced") != _configuration_digest(cfg):
        return None
    settings = content["settings"]
    fits = tuple(weights["W_dec"].shape) == (settings["d_sae"], settings["d_in"])
    return settings | {"metadata": content["metadata"]} if fits else None


def check(content: Mapping[str, Any], cfg: SAEConfig, weights: Mapping[str, Tensor], provenance: Tensor | None) -> None:
    """Raise a ValueError that says what is not as the note has it."""
    settings, metadata = _settings(cfg), cfg.metadata.to_dict()
    for name, value in content["settings"].items():
        if name not in _SIZES and _differ(settings.get(name), value):
            raise ValueError(
                f"{name} is {settings.get(name)!r}, but this ITDA was saved with {value!r}: cfg.json lacks it, was "
                "edited or is another's. Put it back, and make an ITDA of other settings in code (itda.with_k, "
                "itda.with_pursuit, itda.with_atoms)"
            )
    if lost := sorted(set(content["metadata"]) - set(metadata)):
        raise ValueError(
            f"the metadata lacks {', '.join(lost)}: cfg.json was edited, or lacks metadata.sae_lens_version, without "
            "which SAELens drops the metadata. Put back what is missing"
        )
    if isinstance(content["metadata"], dict):  # older notes have the names alone
        for name, value in content["metadata"].items():
            if name not in _VERSIONS and _differ(metadata[name], value):
                raise ValueError(
                    f"metadata.{name} is {metadata[name]!r}, but this ITDA was saved with {value!r}: cfg.json was "
                    f"edited or is another's. Put it back; to change it, set itda.cfg.metadata.{name} in code and save"
                )
    if content["provenance"] != (None if provenance is None else _digest([_bytes(provenance)]).hex()):
        raise ValueError(
            "the provenance is not the one that was saved with these atoms: the weights file was edited, and what it "
            "says of them can't be trusted"
        )
    _check_weights(content, weights)


def _sealed(content: Mapping[str, Any]) -> UInt8[Tensor, " size"]:
    body = json.dumps(content).encode()
    return torch.frombuffer(bytearray(_digest([body]) + body), dtype=torch.uint8)


def _content(saved: UInt8[Tensor, " size"]) -> dict[str, Any]:
    digest, body = (part.numpy().tobytes() for part in (saved[:_DIGEST_SIZE], saved[_DIGEST_SIZE:]))
    if digest != _digest([body]):
        raise ValueError("the note in the weights file is not as it was written: the file was edited or damaged")
    return json.loads(body)


def _check_weights(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    if len(weights["W_dec"]) + 1 != len(content["products"]):
        raise ValueError(
            f"there are {len(weights['W_dec'])} atoms, but {len(content['products']) - 1} were saved: the files were "
            "edited"
        )
    if (expected := _expected_digest(content, weights["W_dec"].dtype)) is not None:
        dtype, digest = expected
        if digest == _weights_digest(weights, dtype):
            return
    wrong = _rows_that_differ(content, weights)
    if wrong or expected is not None:
        first = "some value" if not wrong else f"atom {wrong[0]}" if wrong[0] < len(weights["W_dec"]) else "b_dec"
        raise ValueError(
            f"{first} is not what was saved ({len(wrong)} of {len(content['products'])} rows differ): the weights file "
            "was edited or damaged. Fetch it again, or make an ITDA of other atoms with ITDA.from_atoms"
        )


def _expected_digest(content: Mapping[str, Any], loaded: torch.dtype) -> tuple[torch.dtype, str] | None:
    """The digest that weights of a dtype must have, and in which dtype; None where the note has none for it."""
    by_name = {str(dtype): dtype for dtype in _DTYPES}
    saved = by_name.get(content.get("dtype", ""))
    if saved is None:
        return None
    # Whatever holds all values of the dtype in which they were saved can be cast back to it.
    dtype = saved if torch.promote_types(saved, loaded) == loaded else loaded
    return (dtype, content["digests"][str(dtype)]) if str(dtype) in content["digests"] else None


def _rows_that_differ(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[int]:
    found, expected = _products(weights), torch.tensor(content["products"], dtype=torch.float64)
    tolerance = max(_TOLERANCE, 4 * torch.finfo(weights["W_dec"].dtype).eps)
    # In float64, since a flipped bit may make a value whose square is beyond float32.
    lengths = torch.cat([rows.double().norm(dim=-1).cpu() for rows in _chunks(weights)])
    return ((found - expected).abs() <= tolerance * lengths).logical_not().nonzero().flatten().tolist()


@torch.no_grad()
def _products(weights: Mapping[str, Tensor]) -> Tensor:
    vector = torch.arange(1, len(weights["b_dec"]) + 1, dtype=torch.float64).square().sin()
    return torch.cat([rows.cpu().double() @ vector for rows in _chunks(weights)])


def _chunks(weights: Mapping[str, Tensor]) -> list[Tensor]:
    return [*weights["W_dec"].split(4096), weights["b_dec"][None]]  # not all atoms in float64 at once


@torch.no_grad()
def _weights_digest(weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    return _digest(_bytes(rows.cpu().to(dtype)) for rows in _chunks(weights)).hex()


def _narrower(saved: torch.dtype) -> list[torch.dtype]:
    """The dtypes that don't hold all values of this one, and this one."""
    return [dtype for dtype in _DTYPES if dtype == saved or torch.promote_types(dtype, saved) != dtype]


def _settings(cfg: SAEConfig) -> dict[str, Any]:
    return {field.name: getattr(cfg, field.name) for field in fields(cfg) if field.name not in _NOT_NOTED}


def _configuration_digest(cfg: SAEConfig) -> str:
    metadata = {name: value for name, value in cfg.metadata.to_dict().items() if name not in _VERSIONS}
    return _digest([json.dumps([_settings(cfg), metadata], sort_keys=True).encode()]).hex()


def _differ(found: object, expected: object) -> bool:
    return json.dumps(found, sort_keys=True) != json.dumps(expected, sort_keys=True)


def _most(weights: Mapping[str, Tensor]) -> int:
    return _SIZE + _SIZE_PER_ROW * weights["W_dec"].shape[:1].numel()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(torch.uint8).numpy().data


def _digest(parts: Iterable[bytes | memoryview]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for part in parts:
        digest.update(part)
    return digest.digest()
