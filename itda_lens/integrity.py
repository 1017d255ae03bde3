"""What a saved ITDA notes about itself, so that one that was edited, damaged or mixed up is not taken for it."""

import hashlib
import json
from collections.abc import Mapping

import torch
from jaxtyping import UInt8
from sae_lens import SAEConfig
from torch import Tensor

# Where cfg.json lacks one of these, SAELens goes on with a default, and the codes are others.
_SETTINGS = ("k", "orthogonal", "nonnegative", "apply_b_dec_to_input", "normalize_activations", "reshape_activations")
# Products of the same rows differ by this share of the rows' lengths at most; by more in half precision.
_TOLERANCE = 1e-6
_DIGEST_SIZE = 16


def note(cfg: SAEConfig, weights: Mapping[str, Tensor], provenance: Tensor | None) -> UInt8[Tensor, " size"]:
    """The note as bytes, which SAELens's casts leave whole.

    Of the weights it holds the product of each row with a fixed vector, since a digest would not survive a cast.
    """
    content = {
        "settings": {name: getattr(cfg, name) for name in _SETTINGS},
        "metadata": sorted(cfg.metadata.to_dict()),
        "provenance": None if provenance is None else _digest(_bytes(provenance)).hex(),
        "products": _products(weights).tolist(),
    }
    body = json.dumps(content).encode()
    return torch.frombuffer(bytearray(_digest(body) + body), dtype=torch.uint8)


def check(
    saved: UInt8[Tensor, " size"], cfg: SAEConfig, weights: Mapping[str, Tensor], provenance: Tensor | None
) -> None:
    """Raise a ValueError that says what is not as the note has it."""
    digest, body = _bytes(saved[:_DIGEST_SIZE]), _bytes(saved[_DIGEST_SIZE:])
    if digest != _digest(body):
        raise ValueError("the note in the weights file is not as it was written: the file was edited or damaged")
    content = json.loads(body)
    for name, value in content["settings"].items():
        if getattr(cfg, name) != value:
            raise ValueError(
                f"{name} is {getattr(cfg, name)!r}, but this ITDA was saved with {value!r}: cfg.json lacks it or was "
                "edited. Put it back, and make an ITDA of other settings in code (itda.with_k, ITDA.from_atoms)"
            )
    if lost := sorted(set(content["metadata"]) - set(cfg.metadata.to_dict())):
        raise ValueError(
            f"the metadata lacks {', '.join(lost)}: cfg.json was edited, or lacks metadata.sae_lens_version, without "
            "which SAELens drops the metadata. Put back what is missing"
        )
    if content["provenance"] != (None if provenance is None else _digest(_bytes(provenance)).hex()):
        raise ValueError(
            "the provenance is not the one that was saved with these atoms: the weights file was edited, and what it "
            "says of them can't be trusted"
        )
    found, expected = _products(weights), torch.tensor(content["products"], dtype=torch.float64)
    tolerance = max(_TOLERANCE, 4 * torch.finfo(weights["W_dec"].dtype).eps)
    lengths = torch.cat([rows.float().norm(dim=-1).cpu() for rows in (weights["W_dec"], weights["b_dec"][None])])
    if len(found) != len(expected):
        raise ValueError(f"there are {len(found) - 1} atoms, but {len(expected) - 1} were saved: the files were edited")
    wrong = ((found - expected).abs() <= tolerance * lengths).logical_not().nonzero().flatten().tolist()
    if wrong:
        first = f"atom {wrong[0]}" if wrong[0] < len(weights["W_dec"]) else "b_dec"
        raise ValueError(
            f"{first} is not what was saved ({len(wrong)} of {len(found)} rows differ): the weights file was edited or "
            "damaged. Fetch it again, or make an ITDA of other atoms with ITDA.from_atoms"
        )


@torch.no_grad()
def _products(weights: Mapping[str, Tensor]) -> Tensor:
    bias = weights["b_dec"]
    vector = torch.arange(1, len(bias) + 1, dtype=torch.float64).square().sin()
    parts = [*weights["W_dec"].split(4096), bias[None]]  # not all atoms in float64 at once
    return torch.cat([part.cpu().double() @ vector for part in parts])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_SIZE).digest()
