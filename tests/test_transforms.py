"""What torch does to a model works for an ITDA: autocast, compile, export, vmap, func.grad; so does a fork."""

import copy
import gc
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from itda_lens import ITDA, DictionaryBuilder, matching_pursuit
from itda_lens.pursuit import GramCache, GramRows, gram_matrix
from tests.conftest import HOOK

SETTINGS = [{}, {"nonnegative": True}, {"orthogonal": True}, {"orthogonal": True, "nonnegative": True}]


def made(**options: bool) -> tuple[Tensor, ITDA]:
    generator = torch.Generator().manual_seed(0)
    atoms = normalize(torch.randn(40, 16, generator=generator), dim=-1)
    itda = ITDA.from_atoms(atoms, 4, bias=0.1 * torch.randn(16, generator=generator), **options)
    return torch.randn(12, 16, generator=generator), itda


@pytest.fixture(params=SETTINGS, ids=str)
def case(request) -> tuple[Tensor, ITDA]:
    return made(**request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_under_autocast_are_those_without(case, dtype):
    x, itda = case
    x.requires_grad_()
    expected = itda.encode(x)
    to_x, to_atoms = torch.autograd.grad(itda(x).square().sum(), (x, itda.W_dec))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(itda.encode(x), expected)
        assert torch.equal(itda(x), itda.decode(expected))
        codes = matching_pursuit(x, itda.W_dec, 4, gram=GramRows(itda.W_dec))
        found = torch.autograd.grad(itda(x).square().sum(), (x, itda.W_dec))
    assert torch.equal(codes.values, matching_pursuit(x, itda.W_dec, 4, gram=GramRows(itda.W_dec)).values)
    torch.testing.assert_close(found, (to_x, to_atoms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_model_with_an_itda_runs_under_autocast(model, built, dtype, orthogonal):
    itda, tokens = built.with_pursuit(orthogonal=orthogonal), torch.arange(40)[None] + 5
    with torch.autocast("cpu", dtype=dtype):
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[itda])
    own = cache[f"{HOOK}.hook_sae_acts_post"]
    assert logits.dtype == dtype
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, itda.encode(cache[f"{HOOK}.hook_sae_input"]), rtol=1e-4, atol=1e-4)


def test_a_build_under_autocast_is_the_one_without():
    x = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(0))
    dictionaries = []
    for enabled in (False, True):
        builder = DictionaryBuilder(16, k=3, threshold=0.1, loss="cosine", center=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            builder.update(x)
            dictionaries.append(builder.to_itda().atoms)
    assert torch.equal(*dictionaries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gram_cache_notices_edits_in_any_precision(dtype, autocast):
    generator, cache = torch.Generator().manual_seed(0), GramCache()
    atoms = normalize(torch.randn(40, 16, generator=generator), dim=-1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for i in range(20):
            held = cache.get(atoms)
            assert cache.get(atoms) is held
            place = (int(torch.randint(40, (), generator=generator)), int(torch.randint(16, (), generator=generator)))
            if i % 2:
                atoms[place] += 4 * torch.finfo(dtype).eps  # more than rounding
            else:
                atoms.data[place] += max(1e-3, 4 * torch.finfo(dtype).eps)  # bumps no version
            now = cache.get(atoms)
            assert isinstance(now, Tensor)
            torch.testing.assert_close(now, gram_matrix(atoms), rtol=0, atol=0)
            assert now is not held


COMPILE = """
import torch
from itda_lens import ITDA

generator = torch.Generator().manual_seed(0)
atoms = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
x, itda = torch.randn(12, 16, generator=generator), ITDA.from_atoms(atoms, 4, orthogonal=True)
own = (itda.W_dec, itda.b_dec)
expected = torch.autograd.grad(itda(x).square().sum(), own)
for backend in ("eager", "aot_eager", "inductor"):
    torch._dynamo.reset()
    compiled = torch.compile(itda, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), itda(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), own), expected)
    with torch.no_grad():
        itda.W_dec[3] *= -1
        torch.testing.assert_close(compiled(x), itda(x))
        itda.W_dec[3] *= -1
    torch._dynamo.reset()
    hooked = itda.hook_sae_acts_pre.add_hook(lambda correlations, hook: None)
    torch.testing.assert_close(torch.compile(itda, backend=backend)(x), itda(x))
    itda.reset_hooks()
    print(backend)
"""


def test_it_compiles_whole_with_its_gradients():
    run = subprocess.run(  # what checks shapes in tests can't be traced
        [sys.executable, "-W", "ignore", "-c", COMPILE], capture_output=True, text=True
    )
    assert run.stdout.split() == ["eager", "aot_eager", "inductor"], run.stderr[-3000:]


def test_it_is_exported_saved_and_loaded(case):
    x, itda = case
    rows = {0: torch.export.Dim("rows", min=2, max=1000)}
    exported, file = torch.export.export(itda, (x,), dynamic_shapes=(rows,)), io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(torch.cat([x, 2 * x])), itda(torch.cat([x, 2 * x])))


def test_vmap_and_functional_gradients_are_the_ordinary_ones(case):
    x, itda = case
    torch.testing.assert_close(torch.vmap(itda)(x), itda(x))
    torch.testing.assert_close(torch.vmap(itda, in_dims=1)(x[:, None].expand(12, 3, 16)), itda(x).expand(3, 12, 16))
    points = x.clone().requires_grad_()
    itda(points).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda y: itda(y).square().sum())(x), points.grad)
    each = torch.vmap(torch.func.grad(lambda y: itda(y).square().sum()))(x)
    torch.testing.assert_close(each, points.grad)
    parameters = dict(itda.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(itda, p, (x,)).square().sum())(parameters)
    torch.testing.assert_close(found["W_dec"], itda.W_dec.grad)
    stacked = torch.stack([itda.W_dec.detach(), itda.W_dec.detach().flip(0)])
    both = torch.vmap(lambda atoms: torch.func.functional_call(itda, {"W_dec": atoms}, (x,)))(stacked)
    torch.testing.assert_close(both, itda(x).expand(2, 12, 16))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_second_derivatives_are_right(orthogonal):
    x, itda = made(orthogonal=orthogonal)
    point = x[:1].double()
    atoms = itda.W_dec.detach().double()

    def energy(y: Tensor, d: Tensor) -> Tensor:
        return matching_pursuit(y, normalize(d, dim=-1), 3, orthogonal=orthogonal).values.pow(3).sum()

    gradient = torch.func.grad(energy, argnums=1)
    step = 1e-6 * torch.randn(atoms.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, along = torch.func.vjp(lambda d: (gradient(point, d) * step).sum(), atoms)
    expected = gradient(point, atoms + step) - gradient(point, atoms - step)
    torch.testing.assert_close(2 * along(torch.ones((), dtype=torch.float64))[0], expected, rtol=1e-3, atol=1e-9)


def test_copies_have_a_cache_of_their_own_and_one_that_is_gone_is_not_missed():
    x, itda = made(orthogonal=True)
    expected = itda(x)
    other = copy.deepcopy(itda)
    assert other._gram.number != itda._gram.number
    assert pickle.loads(pickle.dumps(other._gram)).number not in (itda._gram.number, other._gram.number)
    exported = torch.export.export(other, (x,))
    del other
    gc.collect()
    torch.testing.assert_close(exported.module()(x), expected)


FORK = """
import os, sys, threading, time
import torch
from itda_lens import matching_pursuit
from itda_lens.pursuit import GramRows, gram_matrix

torch.set_num_threads(2)
x, atoms = torch.randn(2000, 64), torch.nn.functional.normalize(torch.randn(600, 64), dim=-1)
gram = GramRows(atoms) if sys.argv[1] == "rows" else gram_matrix(atoms)

def pursue(rows=2000):
    return matching_pursuit(x[:rows], atoms, 4, gram=gram, orthogonal=sys.argv[1] == "orthogonal")

pursue()
stop = threading.Event()
busy = [threading.Thread(target=lambda: [pursue(100) for _ in iter(stop.is_set, True)]) for _ in range(2)]
[thread.start() for thread in busy]
children = []
for _ in range(4):
    time.sleep(0.02)
    child = os.fork()
    if child == 0:
        pursue(200)
        os._exit(0)
    children.append(child)
ended = [os.waitpid(child, 0)[1] for child in children]
stop.set()
[thread.join() for thread in busy]
print("ended", ended)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system does not fork")
@pytest.mark.parametrize("path", ["plain", "orthogonal", "rows"])
def test_a_child_that_is_forked_while_threads_pursue_can_pursue(path):
    run = subprocess.run([sys.executable, "-c", FORK, path], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == f"ended {[0] * 4}", run.stderr[-2000:]
