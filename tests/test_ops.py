"Sparsemax, 1.5-entmax, TopK and BatchTopK: properties over random shapes, derivatives, references, errors."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from sparsemax_sae.ops.entmax import entmax15, entmax15_reference
from sparsemax_sae.ops.sparsemax import sparsemax, sparsemax_reference, sparsemax_support, sparsemax_threshold
from sparsemax_sae.ops.topk import batch_topk, batch_topk_select, smallest_active, topk, topk_select

inf, nan = math.inf, math.nan
maps = pytest.mark.parametrize("f,reference", [(sparsemax, sparsemax_reference), (entmax15, entmax15_reference)], ids=["sparsemax", "entmax15"])
both = pytest.mark.parametrize("f", [sparsemax, entmax15])
prop = settings(deadline=None, derandomize=True, max_examples=100)

pytestmark = pytest.mark.usefixtures("one_thread")

@st.composite
def scores(draw, dtypes=(torch.float32, torch.float64), min_rows=1, offsets=(0., 1e3, -1e6, 1e6)):
    "A matrix of scores: any width and scale, sometimes far from zero, with ties, duplicated rows or one giant."
    n, width = draw(st.integers(min_rows, 5)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    s = rng.standard_normal((n, width))*10**draw(st.floats(-3, 3))
    kind = draw(st.sampled_from(["plain", "ties", "constant", "duplicates", "giant"]))
    if kind == "ties": s = np.round(s*2/np.abs(s).max(initial=1e-9))/2
    if kind == "constant": s[:] = draw(st.floats(-5, 5))
    if kind == "duplicates": s[:] = s[:1]
    if kind == "giant": s[:, rng.integers(width)] += 1e4
    limit = 6e4 if torch.float16 in dtypes else inf                 # what half precision can hold
    return torch.tensor(s + draw(st.sampled_from(offsets))).clamp(-limit, limit).to(draw(st.sampled_from(dtypes)))

def rand(*shape, seed=0, dtype=torch.float64, scale=1.): return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*scale).to(dtype)
def close(a, b, atol): torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)
def tol(s): return 1e-12 if s.dtype == torch.float64 else 2e-6

# ---- sparsemax and 1.5-entmax: values ----
@maps
@prop
@given(s=scores())
def test_agrees_with_the_reference(f, reference, s):
    p = f(s)
    assert p.dtype == s.dtype and p.shape == s.shape
    close(p, reference(s), tol(s))
    close(p.double().sum(-1), torch.ones(len(s)), 1e-5 if s.dtype == torch.float32 else 1e-10)

@both
@prop
@given(s=scores())
def test_keeps_the_order_and_the_ties(f, s):
    order = s.argsort(-1)
    sorted_s, sorted_p = s.gather(-1, order), f(s).gather(-1, order)
    assert (sorted_p.diff(dim=-1) >= 0).all() and (sorted_p >= 0).all() and (sorted_p <= 1 + 1e-6).all()
    assert (sorted_p.diff(dim=-1)[sorted_s.diff(dim=-1) == 0] == 0).all()

@both
@prop
@given(s=scores(offsets=(0.,)), c=st.floats(-100, 100), seed=st.integers(0, 99))
def test_shifts_and_permutations(f, s, c, seed):
    s = s.double()
    close(f(s + c), f(s), 1e-10)
    order = torch.randperm(s.shape[-1], generator=torch.Generator().manual_seed(seed))
    close(f(s[:, order]), f(s)[:, order], 1e-12)

@prop
@given(s=scores())
def test_sparsemax_is_a_projection(s):
    p = sparsemax(s)
    close(sparsemax(p), p, tol(s))

@prop
@given(s=scores(dtypes=(torch.float64,), offsets=(0., 7.)))
def test_karush_kuhn_tucker(s):
    p, tau = sparsemax(s), sparsemax_threshold(s, keepdim=True)
    mu = (tau - s).clamp(min=0)
    size = s.abs().max().clamp(min=1).item()
    close(p - s + tau - mu, torch.zeros_like(s), 1e-13*size)
    close(mu*p, torch.zeros_like(s), 1e-13*size)
    clear = (s - tau).abs() > 1e-12*size                            # away from the kink the support is what the threshold says
    assert torch.equal(sparsemax_support(s)[clear], (s > tau)[clear])

@prop
@given(s=scores(dtypes=(torch.float64,), offsets=(0.,)))
def test_entmax15_lies_between_softmax_and_sparsemax(s):
    assert (sparsemax_support(s) <= (entmax15(s) > 0)).all()

@both
@prop
@given(s=scores(dtypes=(torch.float16, torch.bfloat16), min_rows=0, offsets=(0.,)), dim=st.sampled_from([0, 1, -1]))
def test_half_precision_is_float32_rounded(f, s, dim):
    if not s.shape[dim]: return
    assert torch.equal(f(s, dim), f(s.float(), dim).to(s.dtype))

@both
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4])
def test_any_dimension(f, dim):
    s = rand(2, 3, 16, 5)
    assert torch.equal(f(s, dim), f(s.movedim(dim, -1).contiguous()).movedim(-1, dim))
    close(sparsemax_threshold(s, dim), (s - sparsemax(s, dim)).amax(dim), 1e-12)
    assert torch.equal(sparsemax_support(s, dim), sparsemax(s, dim) > 0)

@maps
@pytest.mark.parametrize("make", [lambda: rand(4, 49152, scale=.01), lambda: rand(4, 49152, scale=.15), lambda: rand(4, 49152), lambda: rand(4, 49152) + 1e6,
    lambda: rand(4, 49152, scale=1e6), lambda: torch.ones(2, 49152), lambda: torch.eye(2, 49152)*.5 + 1e-5, lambda: rand(4, 49151, scale=.15)],
    ids=["std0.01", "std0.15", "std1", "at1e6", "std1e6", "ties", "halfhalf", "odd"])
def test_wide_rows_in_float32(f, reference, make):
    s = make().float()
    close(f(s).double().sum(-1), torch.ones(len(s)), 1e-5)
    close(f(s), reference(s), 2e-6)

hard = dict(scales=lambda s, c: s*c, heavy=lambda s, c: s.exp()*c, tails=lambda s, c: -s.abs()**4*c, grid=lambda s, c: (s*8).round()/8, narrow=lambda s, c: 1 + s*1e-7,
            plateau=lambda s, c: torch.where(s > 2, .5, 1e-5 + s*1e-9), simplex=lambda s, c: (s*c.clamp(max=50)).softmax(-1), solved=lambda s, c: sparsemax_reference(s*c))

@maps
@pytest.mark.parametrize("kind", hard)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_rows(f, reference, kind, dtype):
    "Every row at its own scale, 1e-6 to 1e6: an error of float32 rounding only, in the entries and in their sum."
    for seed, width in enumerate((16, 100, 555, 4096, 8192)):
        s = hard[kind](rand(24, width, seed=seed), 10**torch.linspace(-6, 6, 24, dtype=torch.float64)[:, None]).to(dtype)
        p = f(s)
        close(p, reference(s), 5e-7 if dtype == torch.float32 else 1e-12)
        close(p.double().sum(-1), torch.ones(24), 1e-6 if dtype == torch.float32 else 1e-13)

@both
def test_small_cases(f):
    assert f(torch.tensor([3.])).tolist() == [1.] and f(torch.tensor([[-1e30]])).tolist() == [[1.]]
    close(f(torch.zeros(1, 7)), torch.full((1, 7), 1/7), 1e-7)
    for shape in ((0, 5), (2, 0, 3), (0, 1)): assert f(torch.ones(shape)).shape == shape
    assert sparsemax_threshold(torch.ones(0, 5)).shape == (0,) and sparsemax_support(torch.ones(0, 5)).dtype == torch.bool
    assert sparsemax(torch.tensor([1.2, .9, .3])).tolist() == pytest.approx([.65, .35, 0.])
    assert sparsemax_threshold(torch.tensor([1.2, .9, .3])).item() == pytest.approx(.55)

@both
def test_infinities(f):
    p = f(torch.tensor([[0., -inf, 0., -inf], [-inf, inf, 3., inf], [-inf, -inf, -2., -inf], [inf, 1e38, -1e38, 0.]]))
    close(p, torch.tensor([[.5, 0., .5, 0.], [0., .5, 0., .5], [0., 0., 1., 0.], [1., 0., 0., 0.]]), 1e-6)
    wide = rand(2, 320); wide[:, 7::2] = -inf
    close(f(wide)[:, 8::2], f(torch.cat([wide[:, :7], wide[:, 8::2]], 1))[:, 7:], 1e-12)
    s = torch.tensor([.2, -inf, .1, .3], requires_grad=True)
    g, = torch.autograd.grad(f(s)[0], s)
    assert g.isfinite().all() and g[1] == 0 and g[0] > 0
    assert sparsemax_support(s).tolist() == [True, False, True, True]
    assert sparsemax_threshold(torch.tensor([1., inf])) == inf and sparsemax_threshold(torch.tensor([1., -inf])) == 0.

@both
def test_an_infinite_gradient_outside_the_support_is_ignored(f):
    s = torch.tensor([1., .9] + 14*[-5.], requires_grad=True)       # one group of 16
    f(s).backward(torch.tensor([1., 0.] + 14*[inf]))
    assert s.grad.isfinite().all() and (s.grad[2:] == 0).all() and s.grad[0] > 0

@pytest.mark.parametrize("f", [sparsemax, sparsemax_threshold, sparsemax_support, entmax15])
@pytest.mark.parametrize("bad,message", [
    (torch.tensor([[0., 1.], [nan, 0.]]), r"1 of 2 rows .* row 1 .* NaN"), (torch.full((3, 4), nan), r"3 of 3 rows .* NaN"), (torch.tensor([nan, inf]), "NaN"),
    (torch.tensor([[0.], [-inf]]), r"row 1 .* only -inf"), (torch.ones(3, 0), r"dimension -1 .*\(3, 0\) is empty"), (torch.ones(0, 0), "is empty"),
    (torch.ones(3, dtype=torch.int64), "torch.int64; a floating point")])
def test_errors_say_what_is_wrong(f, bad, message):
    with pytest.raises(ValueError, match=message): f(bad)

def test_no_dimension_no_distribution():
    with pytest.raises(IndexError): sparsemax(torch.ones(2, 3), 2)

# ---- derivatives ----
@both
@pytest.mark.parametrize("shape,dim,scale", [((2, 9), -1, 1.), ((5, 3), 0, 1.), ((2, 3, 4), 1, .3), ((1, 32), -1, .1), ((2, 32), -1, 3.), ((3, 1), -1, 1.), ((4,), 0, 5.)])
def test_gradcheck_and_gradgradcheck(f, shape, dim, scale):
    s = rand(*shape, seed=sum(shape), scale=scale).requires_grad_()
    assert gradcheck(lambda s: f(s, dim), s) and gradgradcheck(lambda s: f(s, dim), s)
    if f is sparsemax: assert gradcheck(lambda s: sparsemax_threshold(s, dim), s) and gradgradcheck(lambda s: sparsemax_threshold(s, dim), s)

@settings(prop, max_examples=30)
@given(s=scores(dtypes=(torch.float64,), offsets=(0.,)))
def test_vector_jacobian_products(s):
    s = s.requires_grad_(); g = rand(*s.shape, seed=7)
    p, q = sparsemax(s), entmax15(s)
    for y, w in ((p, (p > 0).double()), (q, q.sqrt())):
        expect = w*g - w*(w*g).sum(-1, keepdim=True)/w.sum(-1, keepdim=True)
        close(torch.autograd.grad(y, s, g)[0], expect.detach(), 1e-9)
    on = (p > 0).double()
    close(torch.autograd.grad(sparsemax_threshold(s).sum(), s)[0], on/on.sum(-1, keepdim=True), 1e-12)

@both
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_the_double_backward_never_meets_a_nan(f):
    s = rand(2, 32, scale=3.).requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        g, = torch.autograd.grad(f(s).square().sum(), s, create_graph=True)
        assert torch.autograd.grad(g[:, 0].sum(), s)[0].isfinite().all()

@both
def test_functional_transforms(f):
    s = rand(8, scale=.4)
    J = torch.func.jacrev(f)(s)
    close(J, torch.autograd.functional.jacobian(f, s), 1e-12)
    close(J, J.T, 1e-12); close(J.sum(0), torch.zeros(8), 1e-12)

@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(f, dtype):
    s = rand(3, 64, dtype=torch.float32, scale=.3).requires_grad_(); W = rand(64, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        p, half = f(s), f(s @ W)
        assert p.dtype == torch.float32 and half.dtype == dtype
    assert torch.equal(p, f(s))
    (half.float()**2).sum().backward()
    assert s.grad.dtype == torch.float32 and s.grad.isfinite().all() and (s.grad != 0).any()

class Allocations(TorchDispatchMode):
    "The bytes of every tensor that an operation makes (views and in-place results are not made)."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        made = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
        self.sizes += [o.untyped_storage().nbytes() for o in made if o.untyped_storage().data_ptr() not in given]
        return out
    def __enter__(self): self.sizes = []; return super().__enter__()

@both
def test_the_only_large_tensor_is_the_result(f):
    s = rand(16, 16384, dtype=torch.float32, scale=3.)
    with Allocations() as made: f(s)
    assert sorted(made.sizes)[-1] == s.nbytes and sorted(made.sizes)[-2] <= s.nbytes/8

# ---- other implementations ----
@settings(prop, max_examples=30)
@given(s=scores(dtypes=(torch.float64,), offsets=(0.,)))
def test_the_entmax_package_agrees(s):
    entmax = pytest.importorskip("entmax")
    for ours, theirs, atol in ((sparsemax, entmax.sparsemax, 1e-9), (entmax15, entmax.entmax15, 1e-6)):
        a, b = s.clone().requires_grad_(), s.clone().requires_grad_(); g = rand(*s.shape, seed=1)
        close(ours(a), theirs(b), atol)
        if not s.unique().numel() < s.numel(): close(torch.autograd.grad(ours(a), a, g)[0], torch.autograd.grad(theirs(b), b, g)[0], 1e-4)

@pytest.mark.parametrize("seed", range(6))
def test_a_quadratic_programme_agrees(seed):
    from scipy.optimize import minimize
    s = rand(2 + 3*seed, seed=seed).numpy(); n = len(s)
    p = minimize(lambda p: .5*((p - s)**2).sum(), np.full(n, 1/n), jac=lambda p: p - s, method="SLSQP", bounds=[(0, 1)]*n,
                 constraints=dict(type="eq", fun=lambda p: p.sum() - 1, jac=np.ones_like), options=dict(ftol=1e-14, maxiter=500)).x
    close(sparsemax(torch.tensor(s)), torch.tensor(p), 1e-6)

# ---- TopK and BatchTopK ----
def dense_topk(s, k):
    "The k largest positive entries of each row by a stable sort."
    best = s.relu().sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(s).scatter(-1, best.indices[..., :k], best.values[..., :k])

def densify(scores, indices, offsets):
    "The dense matrix that a selection stands for; checks the CSR layout on the way."
    assert indices.dtype == offsets.dtype == torch.int64 and offsets[0] == 0 and offsets[-1] == len(indices) and len(offsets) == len(scores) + 1
    rows = torch.repeat_interleave(torch.arange(len(scores)), offsets.diff())
    flat = rows*scores.shape[1] + indices
    assert (flat.diff() > 0).all()                                  # row-major, ascending in a row, nothing twice
    out = torch.zeros_like(scores); out[rows, indices] = scores[rows, indices]
    return out

matrices = scores(dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64), min_rows=0, offsets=(0., 1.))

@settings(prop, max_examples=150)
@given(s=matrices, fraction=st.floats(0, 1))
def test_topk_by_a_stable_sort(s, fraction):
    k = max(1, round(fraction*s.shape[1]))
    expect, batch = dense_topk(s, k), dense_topk(s.reshape(1, -1), k*len(s)).reshape(s.shape)
    assert torch.equal(topk(s, k), expect) and torch.equal(densify(s, *topk_select(s, k)), expect)
    assert torch.equal(batch_topk(s, k), batch) and torch.equal(densify(s, *batch_topk_select(s, k)), batch)

def test_topk_ties_and_signs():
    s = torch.tensor([[1., 1., 1., 1.], [0., -1., 2., 0.], [-1., -2., -3., -inf]])
    assert topk_select(s, 2)[0].tolist() == [0, 1, 2] and topk_select(s, 2)[1].tolist() == [0, 2, 3, 3]
    assert batch_topk_select(s, 1)[0].tolist() == [0, 1, 2] and batch_topk_select(s, 1)[1].tolist() == [0, 2, 3, 3]
    assert batch_topk(s, 4).count_nonzero() == 5                    # a budget beyond the positives keeps them all
    tiny = torch.tensor([5e-324, 0., -5e-324], dtype=torch.float64)
    assert topk_select(tiny, 3)[0].tolist() == [0]

def test_topk_on_wide_rows_and_leading_dimensions():
    s = rand(2, 3, 49152, dtype=torch.float32)
    assert torch.equal(topk(s, 32), dense_topk(s, 32)) and (topk(s, 32) > 0).sum(-1).unique().tolist() == [32]
    assert torch.equal(batch_topk(s, 32), dense_topk(s.reshape(1, -1), 6*32).reshape(s.shape))
    assert len(topk_select(s, 32)[1]) == len(batch_topk_select(s, 32)[1]) == 7
    assert torch.equal(topk(s.transpose(0, 1), 32), topk(s, 32).transpose(0, 1))
    assert topk_select(s[0, 0], 3)[1].tolist() == [0, 3]

@pytest.mark.parametrize("f", [topk, batch_topk])
def test_topk_gradients(f):
    s = rand(3, 32, seed=5).requires_grad_()
    assert gradcheck(lambda s: f(s, 4), s) and gradgradcheck(lambda s: f(s, 4), s)
    z = f(s, 4)
    assert torch.equal(torch.autograd.grad(z.sum(), s)[0], (z > 0).double())

@pytest.mark.parametrize("f", [topk, batch_topk, topk_select, batch_topk_select])
@pytest.mark.parametrize("k,message", [(0, "k = 0 .*1 <= k <= 8"), (-1, "k = -1"), (9, "k = 9 is out of range"), (2.0, "k = 2.0 is not a whole number"),
    ("3", "k = '3'"), (None, "k = None"), (True, "k = True"), (nan, "k = nan")])
def test_topk_refuses_a_bad_k(f, k, message):
    with pytest.raises(ValueError, match=message): f(torch.ones(2, 8), k)

@pytest.mark.parametrize("f", [topk, batch_topk, topk_select, batch_topk_select])
def test_topk_edges(f):
    with pytest.raises(ValueError, match="NaN"): f(torch.tensor([[1., nan]]), 1)
    with pytest.raises(ValueError, match="k = 1"): f(torch.ones(3, 0), 1)
    out = f(torch.ones(0, 8), np.int64(3))
    assert out.shape == (0, 8) if isinstance(out, torch.Tensor) else (len(out[0]), out[1].tolist()) == (0, [0])
    infinite = f(torch.tensor([[inf, 1., -inf]]), 2)
    assert (infinite if isinstance(infinite, torch.Tensor) else infinite[0]).tolist() in ([[inf, 1., 0.]], [0, 1])

def test_smallest_active():
    z = batch_topk(rand(64, 128, dtype=torch.float32), 8).requires_grad_()
    theta = smallest_active(z)
    assert theta == z[z > 0].min() and not theta.requires_grad and theta.shape == ()
    assert ((z >= theta) == (z > 0)).all()
    for nothing in (torch.zeros(3), torch.tensor([-1., nan]), torch.empty(0, 4)): assert smallest_active(nothing).item() == 0.

# ---- on a GPU ----
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width,scale", [(49152, .15), (4096, .01), (300, 1.), (97, 3.)])
def test_cuda_agrees_with_the_cpu(width, scale):
    s, g = rand(64, width, dtype=torch.float32, scale=scale), rand(64, width, seed=1, dtype=torch.float32)
    for f in (sparsemax, entmax15):
        a, b = s.clone().requires_grad_(), s.cuda().requires_grad_()
        pa, pb = f(a), f(b)
        close(pa, pb.cpu(), 2e-6); close(pb.double().sum(-1).cpu(), torch.ones(64), 1e-5)
        close(torch.autograd.grad(pa, a, g)[0], torch.autograd.grad(pb, b, g.cuda())[0].cpu(), 1e-3)
        with pytest.raises(ValueError, match="NaN"): f(torch.tensor([[nan, 1.]], device="cuda"))
    for f in (topk, batch_topk): assert torch.equal(f(s, 32).cpu(), f(s.cuda(), 32).cpu())
    half = s.cuda().half()                                          # many ties: the selection is the same on both devices
    for f in (topk_select, batch_topk_select): assert all(torch.equal(x, y.cpu()) for x, y in zip(f(half.cpu(), 32), f(half, 32)))
