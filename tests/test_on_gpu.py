"""The Triton kernels against the printed algorithm, in the interpreter or on a GPU; compiled for a GPU anywhere."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from itda_lens import SparseCodes
from itda_lens.pursuit import gram_matrix, matching_pursuit_reference, on_gpu, pursue, pursue_on_gpu

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")
SHAPES = [(4, 16, 40, 5), (3, 24, 300, 8), (5, 8, 3, 6), (2, 8, 64, 1)]
OPTIONS = [{}, {"nonnegative": True}, {"tolerance": 0.4}]
GPU = "cuda" if torch.cuda.is_available() else "cpu"


def problem(b: int, d: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, atoms = torch.randn(b, d, generator=generator), torch.randn(n, d, generator=generator)
    return x.to(GPU), normalize(atoms, dim=-1).to(GPU)


def assert_same(codes: SparseCodes, expected: SparseCodes) -> None:
    used = expected.values.abs() > 1e-5
    assert torch.equal(codes.indices[used], expected.indices[used])
    torch.testing.assert_close(codes.values, expected.values, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["on chip", "in tiles"])
def path(request, monkeypatch):
    if request.param == "in tiles":
        monkeypatch.setattr(on_gpu, "ON_CHIP", 0)
        monkeypatch.setattr(on_gpu, "TILE", 64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_are_the_printed_algorithm(path, shape, options):
    b, d, n, k = shape
    x, atoms = problem(b, d, n)
    codes = pursue_on_gpu(x @ atoms.T, gram_matrix(atoms), k, energy=x.square().sum(-1), **options)
    assert_same(codes, matching_pursuit_reference(x, atoms, k, **options))


def test_a_gram_matrix_may_have_room_and_broken_rows_stay_alone(path):
    x, atoms = problem(6, 16, 40)
    roomy = torch.full((40, 48), torch.nan, device=GPU)
    roomy[:, :40] = gram_matrix(atoms)
    expected = matching_pursuit_reference(x, atoms, 4)
    x[2, 3] = torch.nan
    codes = pursue_on_gpu(x @ atoms.T, roomy, 4)
    others = torch.tensor([0, 1, 3, 4, 5], device=GPU)
    assert_same(SparseCodes(*(t[others] for t in codes)), SparseCodes(*(t[others] for t in expected)))
    assert codes.decode(atoms)[2].isnan().all()
    assert pursue_on_gpu(torch.zeros(0, 40, device=GPU), roomy, 4).values.shape == (0, 4)


def cut_to_tf32(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_products_in_tf32_are_made_again_where_they_decide():
    x, atoms = problem(24, 32, 900)
    atoms[450:] = normalize(atoms[:450] + 1e-3 * atoms[450:], dim=-1)  # neighbours that TF32 can't tell apart
    rough, gram = cut_to_tf32(x) @ cut_to_tf32(atoms).T, gram_matrix(atoms)
    expected = matching_pursuit_reference(x, atoms, 6)
    assert not torch.equal(pursue_on_gpu(rough, gram, 6).indices, expected.indices), "a weak case"
    assert_same(pursue_on_gpu(rough, gram, 6, rough=(x, atoms)), expected)
    error = (rough - x @ atoms.T).abs().amax(-1) / x.norm(dim=-1)
    assert (error < on_gpu.TF32_SLACK).all()


@pytest.mark.skipif(GPU == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("n", [1000, 20_000])
def test_pursuit_on_a_gpu_is_exact_whatever_the_precision_of_products(n, precision):
    x, atoms = problem(500, 256, n)
    before = torch.get_float32_matmul_precision()
    expected = matching_pursuit_reference(x.double(), atoms.double(), 16)
    try:
        torch.set_float32_matmul_precision(precision)
        codes = pursue(x, atoms, gram_matrix(atoms), 16)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert (codes.indices == expected.indices).float().mean() > 0.999


COMPILE = """
import os, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from itda_lens.pursuit import triton_kernel

POINTERS = {"indices": "*i64", "left": "*fp64", "floor": "*fp64"} | dict.fromkeys(
    ("correlations", "gram", "values", "x", "atoms", "slack"), "*fp32")
for kernel, constants, warps in (
    (triton_kernel.pursue_on_chip, {"nonnegative": False, "rescore": False, "BLOCK": 16384, "PART": 1024}, 32),
    (triton_kernel.pursue_on_chip, {"nonnegative": True, "rescore": True, "BLOCK": 16384, "PART": 1024}, 32),
    (triton_kernel.pursue_in_tiles, {"nonnegative": False, "TILE": 4096}, 8),
):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert len(compiled.asm["cubin"]) > 0
print("compiled")
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(  # the interpreter is chosen for a whole process
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip().endswith("compiled"), run.stderr[-3000:]
