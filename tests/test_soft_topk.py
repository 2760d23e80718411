"Soft top-k: sums, agreement with bisection, derivatives, limits, sparse rows, errors, over random shapes, scales and counts."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.autograd import grad, gradcheck
from sparsemax_sae.ops.soft_topk import soft_topk, soft_topk_of_rows, soft_topk_reach, soft_topk_reference, soft_topk_threshold

inf, nan = math.inf, math.nan
prop = settings(deadline=None, derandomize=True, max_examples=100)
alphas = st.floats(-4, 1).map(lambda e: 10**e)

pytestmark = pytest.mark.usefixtures("one_thread")

@st.composite
def problems(draw, dtypes=(torch.float32, torch.float64), widths=st.integers(1, 200), scales=st.floats(-3, 4)):
    "Rows (n, M) of any width and scale up to 1e4, plain, tied, constant or mostly zero, and one count per row, from nearly 0 to M exactly."
    n, width = draw(st.integers(1, 5)), draw(widths)
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    h = np.clip(rng.standard_normal((n, width)), -4, 4)*10**draw(scales)/4
    kind = draw(st.sampled_from(["plain", "ties", "constant", "zeros", "giant"]))
    if kind == "ties": h = np.round(h*2/np.abs(h).max(initial=1e-9))/2
    if kind == "constant": h[:] = draw(st.floats(-1e4, 1e4))
    if kind == "zeros": h = np.maximum(h - np.median(h), 0)
    if kind == "giant": h[:, rng.integers(width)] = 1e4
    corner = st.sampled_from([1e-6, .5, 1., width/2, width - 1e-6, float(width)])
    k = [draw(st.one_of(corner, st.floats(1e-6, width), st.integers(1, width).map(float))) for _ in range(n)]
    return torch.tensor(h).to(draw(st.sampled_from(dtypes))), torch.tensor(k, dtype=torch.float64)

def rand(*shape, seed=0, scale=1.): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*scale
def close(a, b, atol): torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)
def tol(h): return 1e-5 if h.dtype == torch.float32 else 1e-8

# ---- values ----
@prop
@given(problem=problems(), alpha=alphas)
def test_weights_are_between_0_and_1_and_sum_to_k(problem, alpha):
    h, k = problem
    p = soft_topk(h, k, alpha)
    assert p.dtype == h.dtype and p.shape == h.shape and (p >= 0).all() and (p <= 1).all()
    assert ((p.double().sum(-1) - k).abs() <= tol(h)*k.clamp(min=1)).all()
    exact = soft_topk(h.double(), k, alpha)
    assert (exact.sum(-1)/k - 1).abs().max() <= 1e-8                            # relative to k, however small it is
    close(p, exact, 1e-6)

@prop
@given(problem=problems(), alpha=alphas)
def test_agrees_with_bisection(problem, alpha):
    h, k = problem
    k = torch.where(k == h.shape[1], k - .25, k)
    resolved = 1e-9 + 1e-14*float(h.abs().max())/alpha                          # bisection of b itself cannot be better than the spacing of b
    close(soft_topk(h.double(), k, alpha), soft_topk_reference(h, k, alpha), resolved)
    b = soft_topk_threshold(h, k, alpha)
    assert b.dtype == torch.float64 and b.shape == k.shape
    t = (h.double() - b[:, None])/alpha
    close(torch.distributions.Laplace(0., 1.).cdf(t), soft_topk_reference(h, k, alpha), resolved)

@prop
@given(problem=problems(), alpha=alphas, seed=st.integers(0, 99))
def test_order_ties_and_permutations(problem, alpha, seed):
    h, k = problem
    p = soft_topk(h, k, alpha)
    order = h.argsort(-1)
    hs, ps = h.gather(-1, order), p.gather(-1, order)
    assert (ps.diff(dim=-1) >= 0).all() and (ps.diff(dim=-1)[hs.diff(dim=-1) == 0] == 0).all()
    perm = torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(soft_topk(h[:, perm], k, alpha), p[:, perm])

@prop
@given(problem=problems(dtypes=(torch.float64,)), alpha=alphas, share=st.floats(.1, 1))
def test_more_count_takes_from_nobody(problem, alpha, share):
    h, k = problem
    assert (soft_topk(h, k*share, alpha) <= soft_topk(h, k, alpha) + 1e-10).all()
    assert (soft_topk_threshold(h, k*share, alpha) >= soft_topk_threshold(h, k, alpha) - 1e-10*(1 + h.abs().max())).all()

@prop
@given(problem=problems(dtypes=(torch.float64,), scales=st.floats(-2, 2)), alpha=st.floats(-2, 1).map(lambda e: 10**e), c=st.floats(-1e3, 1e3))
def test_shift_scale_mirror(problem, alpha, c):
    h, k = problem
    p = soft_topk(h, k, alpha)
    close(soft_topk(h + c, k, alpha), p, 1e-9)
    close(soft_topk(h*4, k, alpha*4), p, 1e-12)
    inside = k < h.shape[1]
    if inside.any(): close(soft_topk(-h[inside], h.shape[1] - k[inside], alpha), 1 - p[inside], 1e-9)

@prop
@given(problem=problems(), alpha=alphas)
def test_the_count_of_every_entry_and_of_one_entry(problem, alpha):
    h, k = problem
    assert torch.equal(soft_topk(h, h.shape[1], alpha), torch.ones_like(h))
    assert (soft_topk_threshold(h, h.shape[1], alpha) == -inf).all()
    close(soft_topk(h[:, :1], (k/h.shape[1]), alpha)[:, 0], k/h.shape[1], 1e-6)

@pytest.mark.parametrize("alpha", [1e-300, 1e-30, 1e-12, 1e-4, 10., 1e6, 1e300])
@pytest.mark.parametrize("scale", [1e-3, 1., 1e4, 1e30, 1e300])
def test_extreme_widths(alpha, scale):
    h = rand(4, 60)*scale; h[:, 10:30] = h[:, :1]; h[3] = scale
    for k in (1e-6, 1., 7.3, 30., 60 - 1e-6):
        p = soft_topk(h, k, alpha)
        close(p.sum(-1), torch.full((4,), float(k)), 1e-9*max(1, k))
        assert ((p >= 0) & (p <= 1)).all()

def test_a_row_of_49152():
    h = rand(2, 49152).float()
    for alpha in (1e-4, .05, 1.):
        for k in (1e-6, 64., 20000.5): close(soft_topk(h, k, alpha).double().sum(-1), torch.full((2,), k), 1e-5*max(1, k))

# ---- limits ----
@prop
@given(seed=st.integers(0, 10**6), width=st.integers(2, 100), data=st.data())
def test_small_alpha_is_hard_top_k(seed, width, data):
    k = data.draw(st.integers(1, width - 1))
    h = torch.randperm(4*width, generator=torch.Generator().manual_seed(seed))[:width].float()
    hard = torch.zeros(width).scatter(0, h.topk(k).indices, 1.)
    assert torch.equal(soft_topk(h, k, 1e-3), hard)
    fraction = soft_topk(h, k - .75, 1e-4)
    close(fraction.sort(descending=True).values[:k + 1], torch.tensor([1.]*(k - 1) + [.25, 0.]), 1e-6)

@prop
@given(problem=problems(dtypes=(torch.float64,), scales=st.floats(-2, 0)))
def test_large_alpha_is_no_choice(problem):
    h, k = problem
    assert ((soft_topk(h, k, 1e9) - k[:, None]/h.shape[1]).abs() <= (h.amax() - h.amin())/2e9 + 1e-12).all()

# ---- derivatives ----
@pytest.mark.parametrize("alpha", [.05, .5, 5., 100.])
@pytest.mark.parametrize("shape,counts", [((4, 6), (4,)), ((2, 3, 5), (2, 3)), ((2, 3, 5), (3,)), ((7,), ()), ((3, 1), (3,))])
def test_gradcheck(alpha, shape, counts):
    h = rand(*shape, seed=1).requires_grad_()
    k = (torch.rand(counts, dtype=torch.float64, generator=torch.Generator().manual_seed(2))*(shape[-1] - .4) + .2).requires_grad_()
    f = lambda h, k: soft_topk(h, k, alpha)
    assert gradcheck(f, (h, k), atol=1e-6)
    w = torch.randint(1, 5, shape, generator=torch.Generator().manual_seed(3)).double()
    w[..., 1:] *= (w[..., 1:] > 1)                                               # some are padding
    assert gradcheck(lambda h, k: soft_topk(h, k, alpha, w), (h, k), atol=1e-6)

@prop
@given(problem=problems(dtypes=(torch.float64,)), alpha=alphas, seed=st.integers(0, 99))
def test_gradients_by_the_formulas(problem, alpha, seed):
    h, k = problem
    g = rand(*h.shape, seed=seed)
    h.requires_grad_(); k.requires_grad_()
    gh, gk = grad(soft_topk(h, k, alpha), [h, k], g)
    assert gh.isfinite().all() and gk.isfinite().all()
    if (k == h.shape[1]).any(): return
    t = (h.detach() - soft_topk_threshold(h, k, alpha)[:, None])/alpha
    q, f = (-t.abs()).softmax(-1), (-t.abs()).exp()/(2*alpha)
    rounding = 1e-9 + 1e-13*float(h.detach().abs().max())/alpha                  # of b
    close(gk.detach(), (g*q).sum(-1), 10*rounding)
    close(gh*alpha, alpha*(f*g - q*(f*g).sum(-1, keepdim=True)), 10*rounding*h.shape[1]**.5)
    close(gh.sum(-1)*alpha, torch.zeros(len(h)), 1e-9*h.shape[1])                # shifting a row changes nothing

def test_marginal_concept():
    h = torch.tensor([3., 2., 1., 0.], dtype=torch.float64)
    q = lambda k, alpha: torch.autograd.functional.jacobian(lambda k: soft_topk(h, k, alpha), torch.tensor(k, dtype=torch.float64))
    close(q(2., 1e-4), torch.tensor([0., .5, .5, 0.]), 1e-9)                     # everything underflows but the ratio
    close(q(1.5, 1e-4), torch.tensor([0., 1., 0., 0.]), 1e-9)
    close(q(4., 1e-4), torch.tensor([0., 0., 0., 1.]), 1e-12)
    close(q(4., 2.), (-h/2).softmax(0), 1e-12)
    close(q(4 - 1e-9, 2.), (-h/2).softmax(0), 1e-6)

def test_types_of_k_and_which_gradients():
    h = rand(3, 8).float().requires_grad_()
    assert torch.equal(soft_topk(h, 2, .1), soft_topk(h, torch.tensor([2, 2, 2]), .1))
    k = torch.tensor(2., requires_grad=True)
    gh, gk = grad(soft_topk(h, k, .1).square().sum(), [h, k])
    assert gh.dtype == gk.dtype == torch.float32 and gk.shape == ()
    assert not soft_topk(h.detach(), 2, .1).requires_grad and not soft_topk_threshold(h, k, .1).requires_grad
    assert soft_topk(h.detach(), k, .1).requires_grad
    first, = grad(soft_topk(h, 2, .1).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): first.sum().backward()

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    h = rand(4, 300).to(dtype).requires_grad_()
    p = soft_topk(h, 10.5, .05)
    assert p.dtype == dtype and torch.equal(p, soft_topk(h.double(), 10.5, .05).to(dtype))
    g, = grad(p, h, torch.ones_like(p)*h.detach())
    assert g.dtype == dtype and g.isfinite().all()

# ---- multiplicities and sparse rows ----
@prop
@given(problem=problems(dtypes=(torch.float64,), widths=st.integers(1, 30), scales=st.floats(-3, 2)), alpha=alphas, seed=st.integers(0, 99))
def test_multiplicity_is_repetition(problem, alpha, seed):
    h, k = problem; h, k = h[:1], k[:1]
    w = torch.randint(0, 4, (h.shape[1],), generator=torch.Generator().manual_seed(seed)); w[0] = 3
    k = k*w.sum()/h.shape[1]
    p, repeated = soft_topk(h, k, alpha, w[None]), soft_topk(h[0].repeat_interleave(w)[None], k, alpha)
    close(p[0].repeat_interleave(w), repeated[0], 1e-8)

@prop
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), width=st.integers(1, 40), alpha=alphas, data=st.data())
def test_rows_equal_the_dense_operator(seed, n, width, alpha, data):
    gen = torch.Generator().manual_seed(seed)
    density = data.draw(st.sampled_from([0., .1, .5, 1.]))
    dense = torch.where(torch.rand(n, width, generator=gen) < density, torch.rand(n, width, generator=gen) + .01, 0).double()
    k0 = torch.tensor([data.draw(st.one_of(st.floats(1e-6, width), st.just(float(width)))) for _ in range(n)], dtype=torch.float64)
    on = dense > 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), on.sum(-1).cumsum(0)])
    a, k = dense[on].requires_grad_(), k0.clone().requires_grad_()
    full, k_full = dense.clone().requires_grad_(), k0.clone().requires_grad_()
    p, want = soft_topk_of_rows(a, offsets, k, alpha, width), soft_topk(full, k_full, alpha)[on]
    close(p, want, 1e-9)
    g = torch.randn(len(a), dtype=torch.float64, generator=gen)
    (ga, gk), (gf, gkf) = grad(p, [a, k], g), grad(want, [full, k_full], g)
    close(ga*alpha, gf[on]*alpha, 1e-8); close(gk, gkf, 1e-8)
    again = grad(soft_topk_of_rows(a, offsets, k, alpha, width), [a, k], g)
    assert torch.equal(again[0], ga) and torch.equal(again[1], gk)

def test_padding_does_not_matter():
    h, w = rand(5, 20), torch.ones(5, 20); w[:, 12:] = 0
    want = soft_topk(h[:, :12], 4.5, .01)
    for filler in (-1e6, 0., 1e6):
        x = h.clone(); x[:, 12:] = filler
        x.requires_grad_(); k = torch.full((5,), 4.5, requires_grad=True)
        p = soft_topk(x, k, .01, w)
        close(p[:, :12].detach(), want, 1e-12)
        gx, gk = grad(p[:, :12].square().sum(), [x, k])
        assert (gx[:, 12:] == 0).all() and gx.isfinite().all() and gk.isfinite().all()
        for t in grad(soft_topk(x, torch.full((5,), 12., requires_grad=True), .01, w)[:, :12].sum(), x): assert t.isfinite().all()

@prop
@given(problem=problems(dtypes=(torch.float64,), widths=st.integers(3, 200), scales=st.floats(-3, 2)), alpha=st.floats(-4, -1).map(lambda e: 10**e), eps=st.floats(-14, -1).map(lambda e: 10**e))
def test_reach(problem, alpha, eps):
    h, k = problem
    k = k.clamp(max=h.shape[1] - 2)
    most = float(k.max()); j = math.floor(most) + 2
    v = h.topk(j).values[:, -1:]
    p = soft_topk(h, k, alpha)
    assert (p[h < v - soft_topk_reach(most, alpha, eps)] <= eps*(1 + 1e-6)).all()
    near = (h >= v - soft_topk_reach(most, alpha)).double()                      # for smaller counts too
    close(soft_topk(h, k, alpha, near)*near, p*near, 1e-10)

# ---- shapes and errors ----
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 0)])
def test_no_rows(shape):
    h, k = torch.ones(shape, requires_grad=True), torch.tensor(1., requires_grad=True)
    p = soft_topk(h, k, .1)
    assert p.shape == shape and soft_topk_threshold(h, k, .1).shape == shape[:-1]
    gh, gk = grad(p.sum(), [h, k])
    assert gh.shape == shape and gk == 0
    assert soft_topk(h, k, .1, torch.ones(shape)).shape == shape

def test_no_listed_entries():
    none = torch.zeros(0, requires_grad=True)
    assert soft_topk_of_rows(none, torch.zeros(1, dtype=torch.long), 1., .1, 5).shape == (0,)
    k = torch.tensor([1., 2.], requires_grad=True)
    p = soft_topk_of_rows(none, torch.zeros(3, dtype=torch.long), k, .1, 5)
    assert p.shape == (0,) and (grad(p.sum(), k)[0] == 0).all()

def test_leading_dimensions_and_strides():
    h = rand(6, 4, 5)
    k = torch.rand(6, 4, dtype=torch.float64) + 1
    p = soft_topk(h, k, .1)
    close(p.flatten(0, 1), torch.stack([soft_topk(r, c, .1) for r, c in zip(h.flatten(0, 1), k.flatten())]), 1e-12)
    assert torch.equal(soft_topk(h.transpose(0, 1), k.T, .1), p.transpose(0, 1))
    close(soft_topk(h[:, :1].expand(6, 4, 5), 2, .1)[:, 3], soft_topk(h[:, 0], 2, .1), 1e-12)
    assert torch.equal(soft_topk(h, k, torch.tensor(.1, dtype=torch.float64)), p)

@pytest.mark.parametrize("k,message", [(0, "out of range: 0 < k <= 4"), (-1, "out of range"), (4.001, "out of range"), (nan, "k = nan"), (inf, "out of range"),
                                       (torch.tensor([1., 5.]), "row 1"), (torch.ones(3), "does not fit"), (torch.ones(2, 1), "does not fit")])
def test_counts_out_of_range(k, message):
    for f in (soft_topk, soft_topk_threshold):
        with pytest.raises(ValueError, match=message): f(torch.ones(2, 4), k, .1)

@pytest.mark.parametrize("alpha", [0, -1., nan, inf])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"): soft_topk(torch.ones(2, 4), 1, alpha)
    with pytest.raises(ValueError, match="alpha"): soft_topk_reach(3, alpha)

def test_bad_entries():
    for bad in (nan, inf, -inf):
        with pytest.raises(ValueError, match="NaN or infinity"): soft_topk(torch.tensor([[0., 1.], [bad, 0.]]), 1, .1)
    for shape in ((2, 0), ()):
        with pytest.raises(ValueError, match="at least one entry"): soft_topk(torch.ones(shape), 1, .1)
    with pytest.raises(ValueError, match="floating point"): soft_topk(torch.ones(2, 2, dtype=torch.long), 1, .1)
    for bad in (-1., nan, inf):
        with pytest.raises(ValueError, match="multiplicities"): soft_topk(torch.ones(2), 1, .1, torch.tensor([1., bad]))
    with pytest.raises(ValueError, match="0 < k <= 3"): soft_topk(torch.ones(2), 3.5, .1, torch.tensor([1., 2.]))
    for k, eps in ((0, .1), (1, 0.), (1, .6), (nan, .1)):
        with pytest.raises(ValueError, match="must be positive"): soft_topk_reach(k, .1, eps)

def test_bad_rows():
    a = torch.ones(4)
    for offsets in ([0, 3], [1, 4], [0, 3, 2, 4], []):
        with pytest.raises(ValueError, match="offsets must rise"): soft_topk_of_rows(a, torch.tensor(offsets, dtype=torch.long), 1., .1, 9)
    with pytest.raises(ValueError, match="n_cols=3"): soft_topk_of_rows(a, torch.tensor([0, 4]), 1., .1, 3)
    with pytest.raises(ValueError, match="0 < k <= 5"): soft_topk_of_rows(a, torch.tensor([0, 4]), 6., .1, 5)

# ---- on a GPU ----
@pytest.mark.cuda
@pytest.mark.parametrize("alpha", [1e-4, .05, 5.])
def test_gpu_agrees_with_cpu(alpha):
    h, k, g = rand(64, 3000).float(), torch.rand(64, generator=torch.Generator().manual_seed(1))*100 + .1, rand(64, 3000, seed=2).float()
    def run(device):
        x, c = h.to(device).requires_grad_(), k.to(device).requires_grad_()
        p = soft_topk(x, c, alpha)
        return [t.cpu() for t in (p.detach(), *grad(p, [x, c], g.to(device)))]
    (p, gh, gk), (q, gh2, gk2) = run("cpu"), run("cuda")
    close(p, q, 1e-6); close(gh*alpha, gh2*alpha, 1e-5); close(gk, gk2, 1e-4)
    again = run("cuda")
    assert torch.equal(again[0], q) and torch.equal(again[1], gh2) and torch.equal(again[2], gk2)
