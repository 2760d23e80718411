"""Mutual Choice, Feature Choice and the densities behind them: budgets kept to the last unit, one function on two paths, nothing forgotten by a resumed run."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from sparsemax_sae import SAE, make_sae
from sparsemax_sae.activations.source import TensorSource
from sparsemax_sae.ops.codes import Codes
from sparsemax_sae.saes.base import Scores
from sparsemax_sae.saes.feature_choice import FeatureChoice, largest_of_columns
from sparsemax_sae.saes.zipf import RunningDensity, budgets, fit_zipf, zipf
from sparsemax_sae.training.config import make_config
from sparsemax_sae.training.trainer import Run, make_optimizer, train, train_step
from test_training import Interrupted, activations, assert_same_run

prop = settings(deadline=None, derandomize=True, max_examples=60)
CHOICES = ("mutual_choice", "feature_choice")

pytestmark = pytest.mark.usefixtures("one_thread")

def rand(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- shares and budgets ----
some_shares = st.one_of(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=60).filter(any).map(lambda v: torch.tensor(v, dtype=torch.float64)),
    st.builds(zipf, st.integers(1, 300), st.floats(0, 8), st.floats(0, 500)),
    st.builds(lambda n, v: torch.full((n,), v), st.integers(1, 100), st.sampled_from([1., 1/3, 1e-20])))

@prop
@given(shares=some_shares, cap=st.integers(0, 3000), part=st.floats(0, 1.3))
def test_budgets_are_whole_bounded_and_exact(shares, cap, part):
    M = len(shares); total = int(part*M*cap)
    m = budgets(shares, total, cap)
    assert m.dtype == torch.int64 and m.sum() == min(total, M*cap) and m.max() <= cap
    assert m.min() >= (total >= M and cap > 0)
    assert torch.equal(m, budgets(shares, total, cap)) and torch.equal(m, budgets(7*shares, total, cap))   # of their proportions only
    order = shares.argsort(descending=True, stable=True)
    assert (m[order].diff() <= 0).all()                               # who has the larger share gets no less; of equals the first

@prop
@given(shares=some_shares, total=st.integers(0, 10**6))
def test_budgets_are_proportional_where_nothing_is_in_the_way(shares, total):
    "Less than one away from the exact share, if floor and cap bind nobody."
    exact = shares.double()/shares.double().sum()*total
    if total >= len(shares) and exact.min() < 1: return
    assert ((budgets(shares, total, total) - exact).abs() < 1 + 1e-6).all()

def test_budgets_of_batches_of_any_size():
    for n in (0, 1, 2, 17, 8192): assert budgets(zipf(1000, 1., 25.), 32*n, n).sum() == min(32*n, 1000*n)

@pytest.mark.parametrize("wrong, message", [
    ((torch.zeros(3), 4, 9), "not all 0"), ((torch.ones(2, 2), 4, 9), "list"), ((torch.tensor([1., -1.]), 4, 9), "at least 0"), ((torch.tensor([1., math.nan]), 4, 9), "finite"),
    ((torch.ones(3), -1, 9), "total=-1"), ((torch.ones(3), 1, -9), "cap=-9"), ((torch.ones(0), 1, 1), "not all 0")])
def test_budgets_refuse(wrong, message):
    with pytest.raises(ValueError, match=message): budgets(*wrong)

@prop
@given(M=st.integers(1, 3000), a=st.floats(0, 300), b=st.floats(0, 1e6))
def test_zipf_shares(M, a, b):
    p = zipf(M, a, b)
    assert p.dtype == torch.float64 and p.isfinite().all() and abs(p.sum() - 1) < 1e-9 and (p.diff() <= 0).all()

@prop
@given(M=st.integers(100, 2000), a=st.floats(.3, 2.5), b=st.sampled_from([0., .5, 3., 20., 60.]), dead=st.integers(0, 50), scale=st.floats(1e-6, 1), seed=st.integers(0, 99))
def test_an_exact_curve_is_recovered(M, a, b, dead, scale, seed):
    d = torch.cat([zipf(M, a, b)*scale, torch.zeros(dead, dtype=torch.float64)])
    got = fit_zipf(d[torch.randperm(len(d), generator=torch.Generator().manual_seed(seed))])
    assert got[0] == pytest.approx(a, rel=1e-3) and got[1] == pytest.approx(b, rel=1e-2, abs=1e-3)

@pytest.mark.parametrize("a, b", [(.7, 0.), (1., 25.), (1.3, 60.)])
def test_a_sampled_curve_is_recovered(a, b):
    truth = (20*zipf(1000, a, b)).clamp(max=1)
    for seed in range(3):
        got = fit_zipf(torch.poisson(200_000*truth, generator=torch.Generator().manual_seed(seed)).clamp(max=200_000)/200_000)
        fitted, true = zipf(1000, *got), zipf(1000, a, b)
        assert got[0] == pytest.approx(a, abs=.06) and ((fitted/true).log().abs() < .15).all()

@pytest.mark.parametrize("d, message", [
    (torch.tensor([.5, .2, 0.]), "2 living"), (torch.zeros(9), "0 living"), (torch.tensor([.5, .2, 1.5]), "divide counts"), (torch.tensor([.5, -.2, .5]), "from 0 to 1"),
    (torch.tensor([.5, math.nan, .5]), "from 0 to 1"), (torch.rand(3, 3), "one number per concept")])
def test_fit_refuses(d, message):
    with pytest.raises(ValueError, match=message): fit_zipf(d)

def test_fit_refuses_a_tail_that_is_everything():
    with pytest.raises(ValueError, match="tail=1"): fit_zipf(torch.rand(9), tail=1)


# ---- running densities ----
@prop
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=8), horizon=st.integers(1, 1000))
def test_the_running_density_is_a_mean_and_forgets_by_samples(cuts, horizon):
    d, fired, n = RunningDensity(3, horizon).double(), torch.tensor([1., .5, 0.]), 0
    for i, c in enumerate(cuts): d.observe(fired*c, c); n += c
    torch.testing.assert_close(d(), fired.double(), atol=1e-6, rtol=1e-6)
    d.observe(torch.zeros(3), 10*horizon); assert d.seen == n + 10*horizon
    assert (d() < 1e-4).all()

def test_densities_come_from_hard_codes():
    "A concept with a positive activation fires, a stored zero does not."
    sae = make_sae("mutual_choice", 8, 32, k=4, dead_after=100)
    x, counts = rand(50, 8), torch.zeros(32)
    for _ in range(3): counts += sae(x).hard.counts()
    torch.testing.assert_close(sae.aux.density(), counts/150)
    before = sae.aux.density()
    sae.eval()(x); assert torch.equal(before, sae.aux.density())
    sae.aux.observe(Codes.from_dense(torch.zeros(10, 32))); assert (sae.aux.density() <= before).all()


# ---- aux_zipf ----
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_aux_k_is_the_special_case_of_no_underused(path):
    "Bitwise the same losses, gradients and parameters over several steps, with the dead among them."
    def run(aux, **hyper):
        torch.manual_seed(0)
        sae = make_sae("mutual_choice", 16, 96, k=4, aux=aux, dead_after=600, **hyper)
        sae.sparsifier.path = path
        config, losses = make_config("mutual_choice", "smoke", device="cpu", steps=8), []
        optimizer = make_optimizer(sae, config)
        for i in range(8):
            if i > 2: sae.aux.since_fired[::5] = 600
            out = train_step(sae, optimizer, rand(200, 16, seed=i), i, config)
            losses.append([v.item() for v in out.parts.values()])
        return losses, [p.detach() for p in sae.parameters()], [p.grad for p in sae.parameters()]
    (l1, p1, g1), (l2, p2, g2) = run("aux_k"), run("aux_zipf", zipf_c=0.)
    assert l1 == l2 and len(l1[-1]) == 2 and all(map(torch.equal, p1 + g1, p2 + g2))
    assert run("aux_zipf", zipf_c=.9)[0] != l1

def test_underused_concepts_are_those_below_the_curve_once_enough_was_seen():
    sae = make_sae("mutual_choice", 8, 100, k=4, dead_after=1000, zipf_a=1., zipf_b=0., zipf_c=.5)
    density = zipf(100, 1., 0.)*4/5; density[90:] /= 10
    fire = lambda n: sae.aux.running.observe((density*n).float(), n)
    fire(999); assert not sae.aux.underused().any()
    fire(1); assert torch.equal(sae.aux.underused(), torch.arange(100) >= 90)
    sae.aux.since_fired[3] = 1000; assert sae.aux.underused()[3]

def test_only_underused_concepts_get_its_gradient():
    sae = make_sae("mutual_choice", 8, 60, k=4, dead_after=100, zipf_c=.5)
    for i in range(4): sae(rand(100, 8, seed=i))
    sae.aux.running.mean[:20] /= 50
    assert sae.aux.underused().sum() == 20
    again = make_sae("mutual_choice", 8, 60, k=4, dead_after=100, zipf_c=.5); again.load_state_dict(sae.state_dict())
    enc = again._encode(x := rand(100, 8)); again.zero_grad()
    again.aux.losses(enc, x, again.dictionary(enc.codes), again.dictionary)["aux_zipf"].backward()
    touched = again.scorer.W_enc.grad.abs().sum(1) > 0
    assert touched.any() and not (touched & ~again.aux.underused()).any()


# ---- mutual choice ----
@prop
@given(n=st.integers(0, 40), k=st.integers(1, 20), d_sae=st.integers(20, 200), path=st.sampled_from(["auto", "dense", "sparse"]), seed=st.integers(0, 99))
def test_mutual_choice_is_batchtopk_in_training(n, k, d_sae, path, seed):
    results = []
    for name in ("mutual_choice", "batchtopk"):
        torch.manual_seed(seed)
        sae = make_sae(name, 6, d_sae, k=k)
        sae.sparsifier.path = path
        out = sae(rand(n, 6, seed=seed)); out.loss.backward()
        results.append([out.codes.to_dense(), out.loss, sae.sparsifier.threshold] + [p.grad for p in sae.parameters()])
    assert all(a is b or torch.equal(a, b) for a, b in zip(*results))


# ---- feature choice ----
def chooser(d_in, d_sae, k, seed=0, exact=False, **hyper):
    "A Feature Choice sparsifier in its second phase, with random shares."
    fc = FeatureChoice(d_in, d_sae, k, switch=0., **hyper)
    fc.running.observe(torch.rand(d_sae, generator=torch.Generator().manual_seed(seed))**4*100, 100)
    fc.advance(0.)
    return fc

@st.composite
def problems(draw):
    "Scores, random or whole and full of ties, with and without bias and silenced concepts; any k."
    n, m, d, g = draw(st.integers(0, 40)), draw(st.integers(1, 300)), draw(st.integers(1, 12)), torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    number = (lambda *s: torch.randint(-2, 3, s, generator=g).float()) if draw(st.booleans()) else (lambda *s: torch.randn(*s, generator=g, dtype=torch.float64))
    bias = number(m)*draw(st.sampled_from([1, 8])) if draw(st.booleans()) else None
    mask = torch.rand(m, generator=g) < .7 if draw(st.booleans()) else None
    return Scores(number(n, d), number(m, d), bias, mask), draw(st.integers(1, m)), g

@prop
@given(problem=problems(), budget=st.sampled_from(["zipf", "uniform"]), wrong=st.sampled_from(["zero", "high", "low", "mixed", "right", "huge"]),
       precision=st.sampled_from(["float32", "bfloat16"]))
def test_the_search_finds_what_the_definition_says_whatever_the_thresholds(problem, budget, wrong, precision):
    scores, k, g = problem
    n, m = scores.shape
    fc = chooser(scores.queries.shape[1], m, k, budget=budget); fc.precision = precision
    s = scores.dense(); want = fc.dense(s)
    least = want.where(want > 0, torch.inf).amin(0) if n else torch.zeros(m)
    fc.thresholds.copy_({"zero": torch.zeros(m), "high": 3*least.nan_to_num(posinf=1.), "low": .1*least.nan_to_num(posinf=1.), "right": least.nan_to_num(posinf=0.),
                         "mixed": 4*torch.rand(m, generator=g), "huge": torch.full((m,), 1e30)}[wrong])
    fc.path = "sparse"
    codes = fc.encode(scores).codes
    assert not codes.is_dense and torch.equal(codes.to_dense() > 0, want > 0)
    torch.testing.assert_close(codes.to_dense(), want, atol=1e-5, rtol=1e-5)
    takes = fc.takes(n)
    assert takes.sum() == min(n*k, n*m) == n*k and (((want > 0).sum(0) == takes) | ((want > 0).sum(0) == (s > 0).sum(0))).all()

def test_largest_of_columns_takes_the_first_of_equals():
    s = torch.ones(5, 4); s[:, 3] = -1
    assert largest_of_columns(s, torch.tensor([0, 2, 5, 3])).int().sum(0).tolist() == [0, 2, 5, 0]
    assert largest_of_columns(s, torch.full((4,), 2))[:2, :3].all()

@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_paths_are_one_function(phase, dtype):
    "Codes, loss, gradients and running statistics over several steps."
    def run(path):
        torch.manual_seed(0)
        sae = make_sae("feature_choice", 12, 300, k=5, dead_after=150, zipf_c=.3).to(dtype)
        for i in range(2): sae(rand(80, 12, seed=9 + i, dtype=dtype))
        if phase == 2: sae.advance(.5)
        sae.sparsifier.path, seen = path, []
        for i in range(4):
            sae.zero_grad(); out = sae(rand(80, 12, seed=i, dtype=dtype)); out.loss.backward()
            seen += [out.codes.to_dense().detach(), out.loss.detach(), *(p.grad.clone() for p in sae.parameters())]
        return seen + list(sae.state_dict().values())
    tol = dict(atol=1e-10, rtol=1e-10) if dtype == torch.float64 else dict(atol=1e-5, rtol=1e-4)
    for path in ("sparse", "auto"):
        for a, b in zip(run("dense"), run(path)): torch.testing.assert_close(a, b, **tol)

@pytest.mark.parametrize("budget", ["zipf", "uniform"])
def test_budgets_are_kept_in_training(budget):
    sae = make_sae("feature_choice", 16, 256, k=8, budget=budget)
    sae(rand(100, 16)); sae.advance(.7)
    for n in (1, 2, 33, 200):
        codes, takes = sae(rand(n, 16, seed=n)).codes, sae.sparsifier.takes(n)
        assert takes.sum() == n*8 and takes.max() <= n and (codes.counts() <= takes).all()
        if n == 200: assert codes.l0().sum() == 1600 and codes.l0().float().std() > 1   # enough positive scores; and not the same for each sample
    assert sae(rand(0, 16)).codes.shape == (0, 256)

@pytest.mark.parametrize("arch", CHOICES)
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_no_sample_depends_on_others_in_evaluation(arch, phase, path):
    sae, x = make_sae(arch, 16, 256, k=8).double(), rand(60, 16, dtype=torch.float64)
    for i in range(3): sae(rand(100, 16, seed=i, dtype=torch.float64))
    if phase == 2:
        sae.advance(.9)
        for i in range(3): sae(rand(100, 16, seed=i, dtype=torch.float64))
    sae.eval(); sae.sparsifier.path = path
    together = sae.encode(x).to_dense()
    assert 1 < (together > 0).sum(1).double().mean() < 40
    for i in (0, 17, 59): torch.testing.assert_close(sae.encode(x[i]).to_dense(), together[i], atol=1e-12, rtol=0)
    torch.testing.assert_close(sae.encode(x.flip(0)).to_dense().flip(0), together, atol=1e-12, rtol=0)

def test_evaluation_uses_the_global_threshold_before_the_switch_and_one_per_concept_after():
    sae, x, other = make_sae("feature_choice", 16, 256, k=8).double(), rand(100, 16), rand(100, 16, seed=1)
    s, sp = lambda: sae.scorer(sae.normalised(other)[0]).dense(), sae.sparsifier
    sae(x); sae.eval(); assert torch.equal(sae.encode(other).to_dense() > 0, s() > sp.threshold)
    sae.train(); sae.advance(.5); assert torch.equal(sp.thresholds, sp.threshold.expand(256))
    kept = sae(x).codes.to_dense()
    least = kept.where(kept > 0, torch.inf).amin(0)
    assert torch.equal(sp.thresholds, least.where(least.isfinite(), sp.threshold)) and (sp.thresholds >= 0).all()
    sae.eval(); assert torch.equal(sae.encode(other).to_dense() > 0, s() > sp.thresholds)

def test_the_switch_happens_once_and_fixes_the_shares():
    sae = make_sae("feature_choice", 16, 64, k=4, switch=.3); sp = sae.sparsifier
    for i in range(5): sae(rand(100, 16, seed=i))
    density = sp.running()
    sae.advance(.29); assert not sp.chosen
    sae.advance(.3); assert sp.chosen
    order = density.argsort(descending=True, stable=True)
    torch.testing.assert_close(sp.shares[order].double(), zipf(64, *fit_zipf(density)), atol=1e-6, rtol=1e-5)
    before = sp.shares.clone()
    for i in range(3): sae(rand(100, 16, seed=i)); sae.advance(.4)
    assert torch.equal(before, sp.shares)

@pytest.mark.parametrize("hyper, flat", [(dict(budget="uniform"), True), (dict(), False), (dict(budget_a=0.), True), (dict(budget_a=3., budget_b=1.), False)])
def test_a_switch_without_a_density(hyper, flat):
    "From the first step on: the given or typical curve, in order of the concepts."
    sae = make_sae("feature_choice", 8, 50, k=3, switch=0., **hyper); sae.advance(0.)
    shares = sae.sparsifier.shares
    assert (shares.diff() <= 0).all() and (shares[0] == shares[-1]) == flat
    out = sae(rand(40, 8)); out.loss.backward(); assert out.codes.l0().sum() > 0

@pytest.mark.parametrize("wrong, message", [
    (dict(budget="zipff"), "Did you mean 'zipf'"), (dict(switch=1.5), "switch=1.5"), (dict(switch=-.1), "switch=-0.1"), (dict(k=0), "1 <= k <= 64"), (dict(k=65), "1 <= k <= 64"),
    (dict(budget_a=-1.), "at least 0"), (dict(memory=0), "memory=0"), (dict(zipf_c=-1.), "zipf_c=-1"), (dict(zipf_a=-1.), "at least 0")])
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message): make_sae("feature_choice", 8, 64, **wrong)

@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_and_loaded(phase, dtype, tmp_path):
    sae = make_sae("feature_choice", 16, 128, k=4)
    for i in range(3): sae(rand(50, 16, seed=i))
    if phase == 2:
        sae.advance(.5)
        for i in range(3): sae(rand(50, 16, seed=i))
    sae = sae.to(dtype); sae(rand(50, 16)).loss.backward()
    sae.save_pretrained(tmp_path); again, x = SAE.from_pretrained(tmp_path), rand(30, 16)
    assert again.sparsifier.chosen == (phase == 2)
    for k, v in sae.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k
    sae.eval(); assert torch.equal(again(x).x_hat, sae(x).x_hat)
    a, b = sae.train()(x), again.train()(x)                          # also to train on
    assert torch.equal(a.codes.to_dense(), b.codes.to_dense()) and all(map(torch.equal, sae.state_dict().values(), again.state_dict().values()))

@pytest.mark.parametrize("arch, options", [("mutual_choice", dict(k=4)), ("feature_choice", dict(k=4)), ("feature_choice", dict(k=4, budget="uniform", switch=.3))])
def test_an_interrupted_run_resumes_bit_for_bit_across_the_switch(arch, options, tmp_path):
    "Of 30 steps the switch comes before step 15 (or 9); the run is torn before, right at and after it."
    x = activations()
    make = lambda out: make_config(arch, "smoke", steps=30, d_sae=64, save_every=1, log_every=1, device="cpu", options=options, dead_after=1500, out=str(tmp_path/out))
    whole = train(make("whole"), TensorSource(x), progress=False)
    for after in (9, 6, 5):
        with pytest.raises(RuntimeError, match="interrupted"): train(make("torn"), Interrupted(x, after), progress=False)
        torch.manual_seed(after)
    torn = train(make("torn"), TensorSource(x), progress=False)
    assert_same_run(torn, whole)
    if arch == "feature_choice": assert torn.sae().sparsifier.chosen and torn.sae().sparsifier.met.any()

@pytest.mark.parametrize("arch", CHOICES)
def test_training_on_the_synthetic_source(arch):
    run = train(make_config(arch, "smoke", dataset="synthetic", device="cpu", options=dict(k=8), steps=40), progress=False)
    log = run.log()
    assert log.loss.iloc[-1] < log.loss.iloc[0] and log.l0.iloc[-1] == pytest.approx(8, rel=.05)
    assert Run(run.path).sae().config["aux"]["name"] == "aux_zipf"

@pytest.mark.cuda
def test_feature_choice_on_the_gpu():
    "The Triton sweep, lists and budgets: as on the CPU."
    for n, m, k in ((300, 2000, 8), (1, 500, 3), (0, 500, 3)):
        scores, fc = Scores(rand(n, 32), rand(m, 32), rand(m, seed=1)), chooser(32, m, k)
        want = fc.dense(scores.dense())
        on = Scores(*(p.cuda() for p in (scores.queries, scores.keys, scores.bias))); fc.cuda(); fc.path = "sparse"
        for thresholds in (torch.zeros(m), torch.full((m,), 5.), 8*torch.rand(m)):
            fc.thresholds.copy_(thresholds)
            got = fc.encode(on).codes.to_dense().cpu()
            assert torch.equal(got > 0, want > 0); torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
