"""The hot loop for a GPU: the Triton kernels, on tensors."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.broken import marks_broken_rows
from itda_lens.pursuit.codes import SparseCodes

ON_CHIP = 16_384
"""Up to so many atoms a program keeps its correlations in registers: 64 KiB."""
TILE = 4096
PART = 1024
TF32_SLACK = 2.0**-9 * 1.1
"""A product in TF32 is off by at most this share of the factors' lengths: both are cut to ten bits after the point."""


@torch.no_grad()
@marks_broken_rows
def pursue_on_gpu(
    correlations: Float[Tensor, "b n"],
    gram: Float[Tensor, "n capacity"],
    k: int,
    *,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
    rough: tuple[Float[Tensor, "b d"], Float[Tensor, "n d"]] | None = None,
) -> SparseCodes:
    """What `pursue` computes with a stored Gram matrix in float32. May overwrite `correlations`.

    Args:
        rough: the activations and atoms whose products `correlations` are, where these were made in TF32: whatever
            their error might change is made again in float32. For `ON_CHIP` atoms at most.
    """
    from itda_lens.pursuit import triton_kernel

    b, n = correlations.shape
    values = correlations.new_zeros(b, k)
    indices = torch.zeros(b, k, dtype=torch.int64, device=correlations.device)
    if b == 0:
        return SparseCodes(values, indices)
    correlations = correlations.contiguous()
    left = correlations.new_zeros(b, dtype=torch.float64) if energy is None else energy.double()
    floor = tolerance**2 * left if tolerance > 0 else torch.full_like(left, torch.finfo(left.dtype).min)
    arrays = (correlations, gram, values, indices, left, floor)
    strides = (correlations.stride(0), gram.stride(0))
    if n <= ON_CHIP:
        block = max(16, 1 << (n - 1).bit_length())
        x, atoms = (correlations, correlations) if rough is None else (t.contiguous() for t in rough)
        slack = TF32_SLACK * x.norm(dim=-1)
        triton_kernel.pursue_on_chip[(b,)](
            *arrays, x, atoms, slack, n, k, x.shape[1], *strides, x.stride(0), atoms.stride(0),
            nonnegative=nonnegative, rescore=rough is not None, BLOCK=block, PART=PART,
            num_warps=max(1, min(32, block // 512)),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    else:
        triton_kernel.pursue_in_tiles[(b,)](
            *arrays, n, k, *strides, nonnegative=nonnegative, TILE=TILE,
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return SparseCodes(values, indices)
