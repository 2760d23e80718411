"""SoftSAE: every row its own k, soft while it learns and hard when it counts, one function on two paths, nothing forgotten by a resumed run."""
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sparsemax_sae import SAE, make_sae
from sparsemax_sae.activations.source import TensorSource
from sparsemax_sae.ops.soft_topk import soft_topk
from sparsemax_sae.saes.base import Scores
from sparsemax_sae.saes.soft import SoftTopK, estimated_k, hard_pattern
from sparsemax_sae.training.config import make_config
from sparsemax_sae.training.trainer import make_optimizer, train, train_step
from test_training import Interrupted, activations, assert_same_run

prop = settings(deadline=None, derandomize=True, max_examples=60)

pytestmark = pytest.mark.usefixtures("one_thread")

def rand(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def leaf(t): return t.clone().requires_grad_()

# --- the operator on scores

@prop
@given(n=st.integers(0, 12), m=st.integers(1, 60), d=st.integers(1, 8), alpha=st.floats(1e-4, 3), seed=st.integers(0, 99), ties=st.booleans())
def test_sparse_and_dense_soft_codes_are_one_function_with_one_gradient(n, m, d, alpha, seed, ties):
    q, K, b = rand(n, d, seed=seed), rand(m, d, seed=seed + 1), rand(m, seed=seed + 2)
    if ties: q, K, b = q.round(), K.round(), b.round()
    k = 1 + (m - 1)*torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = {}
    for path in ("sparse", "dense"):
        s = SoftTopK(d, m, k=1).double(); s.path = path
        q_, K_, b_, k_ = leaf(q), leaf(K), leaf(b), leaf(k)
        enc = s.soft_codes(Scores(q_, K_, b_), k_, alpha)
        z = enc.codes.to_dense()
        (z*torch.linspace(-1, 2, m, dtype=torch.float64)).sum().backward()
        got[path] = [z, *(p.grad for p in (q_, K_, b_, k_)), (enc.hard.to_dense() != 0).double()]
    for a, b in zip(got["sparse"], got["dense"]):
        a, b = ((torch.zeros(()) if p is None else p) for p in (a, b))
        assert torch.allclose(a, b.expand_as(a), atol=1e-7/min(1, alpha), rtol=1e-6)

@prop
@given(n=st.integers(0, 10), m=st.integers(1, 50), seed=st.integers(0, 99), ties=st.booleans())
def test_the_hard_code_keeps_the_floor_of_k_largest_positive_scores_of_each_row(n, m, seed, ties):
    s = rand(n, m, seed=seed)
    if ties: s = s.round()
    k = 1 + (m - 1)*torch.rand(n, generator=torch.Generator().manual_seed(seed))
    wanted = torch.zeros_like(s)
    for i in range(n):
        best = sorted(range(m), key=lambda j: (-s[i, j].item(), j))[:int(k[i])]
        for j in best: wanted[i, j] = max(0., s[i, j].item())
    p = hard_pattern(s, k)
    assert torch.equal(torch.zeros_like(s).index_put((p.rows, p.indices), s[p.rows, p.indices]), wanted)
    scores = Scores(s, torch.eye(m, dtype=torch.float64))
    for path in ("sparse", "dense", "auto"):
        sparsifier = SoftTopK(m, m, k=1).double(); sparsifier.path = path
        assert torch.equal(sparsifier.hard_codes(scores, k).codes.to_dense(), wanted)

def test_soft_codes_are_the_definition():
    s, k = rand(20, 40), 1 + 20*torch.rand(20)
    wanted = s.relu()*soft_topk(s.relu(), k, .1)
    for path in ("sparse", "dense"):
        sparsifier = SoftTopK(40, 40, k=8); sparsifier.path = path
        assert torch.allclose(sparsifier.soft_codes(Scores(s, torch.eye(40, dtype=torch.float64)), k, .1).codes.to_dense(), wanted, atol=1e-9)

# --- the autoencoder

def test_phases_and_annealing():
    s = SoftTopK(100, 400, k=20, alpha=1e-4)
    for progress, target, alpha, hard in ((0, 100, 1., False), (.02, 60, .50005, False), (.04, 20, 1e-4, False), (.8499, 20, 1e-4, False), (.85, 20, 1e-4, True), (1, 20, 1e-4, True)):
        s.advance(progress)
        assert s.schedule() == (pytest.approx(target), pytest.approx(alpha), hard)
    s.advance(0); assert s.eval().schedule() == (20, 1e-4, True)
    never = SoftTopK(100, 400, k=20, anneal=0., hard=0.)
    never.advance(0); assert never.schedule() == (20, .05, False)

def test_the_estimate_stays_in_its_range_and_starts_from_the_encoder():
    sae = make_sae("soft", 16, 64, k=6)
    assert torch.equal(sae.sparsifier.estimate.W, sae.scorer.W_enc)
    k = estimated_k(sae, 1e4*rand(500, 16, dtype=torch.float32))
    assert k.min() >= 1 and k.max() <= 12
    assert estimated_k(sae, rand(2, 3, 16, dtype=torch.float32)).shape == (2, 3)
    assert estimated_k(make_sae("soft", 16, 64, k=40), rand(9, 16, dtype=torch.float32)).max() <= 64
    with pytest.raises(ValueError, match="estimates no k"): estimated_k(make_sae("topk", 16, 64, k=6), torch.randn(3, 16))

def test_the_k_loss_is_flat_below_the_target_and_linear_above():
    sae = make_sae("soft", 16, 64, k=6, k_weight=.5, anneal=0.)
    x, b = rand(100, 16, dtype=torch.float32), sae.sparsifier.estimate.b_out
    for shift, slope in ((-8., 0.), (8., .5)):
        with torch.no_grad(): b.fill_(shift)
        enc = sae._encode(x)
        loss = sae.sparsifier.losses(enc, x, sae.dictionary)["k_loss"]
        assert loss.item() == pytest.approx(.5*F.softplus(5*(enc.k.mean() - 6)).item()/5, abs=1e-6)
        assert torch.autograd.grad(loss, enc.k)[0].sum().item() == pytest.approx(slope, abs=1e-3)
    sae.advance(1.); assert "k_loss" not in sae(x).parts

def test_inputs_are_not_changed_in_any_phase():
    sae, x = make_sae("soft", 16, 64, k=6), rand(50, 16, dtype=torch.float32)
    before = x.clone()
    for progress in (0, .5, 1):
        sae.advance(progress); sae(x).loss.backward(); sae.reconstruct(x); estimated_k(sae, x)
        assert torch.equal(x, before)

def test_nobody_is_kept_alive_by_a_soft_weight():
    "At a high temperature every positive score is active a little; the counters must not see it."
    sae = make_sae("soft", 16, 64, k=2, dead_after=50)
    sae.advance(0.)
    x = rand(1, 16, dtype=torch.float32).expand(100, -1)
    out = sae(x)
    assert out.codes.l0().float().mean() > 10 and out.hard.l0().max() <= 4
    assert sae.aux.dead_fraction() >= 1 - 4/64
    assert torch.equal(sae.aux.density() > 0, out.hard.counts() > 0)

def test_a_sample_alone_has_the_code_it_has_in_company():
    sae = make_sae("soft", 16, 256, k=6).double().eval()
    x = rand(40, 16)
    together = sae.encode(x).to_dense()
    for i in range(40): assert torch.allclose(sae.encode(x[i]).to_dense(), together[i], atol=1e-12)
    assert torch.equal(sae.encode(x).l0(), torch.minimum(estimated_k(sae, x).long(), (sae.scorer(x - sae.dictionary.b_dec).dense() > 0).sum(1)))

@pytest.mark.parametrize("bad, word", [(dict(k=0), "k = 0"), (dict(k=65), "65"), (dict(alpha=0.), "alpha"), (dict(hard=1.5), "hard"), (dict(anneal=-.1), "anneal"), (dict(k_max=65), "k_max")])
def test_options_out_of_range(bad, word):
    with pytest.raises(ValueError, match=word): make_sae("soft", 16, 64, **bad)

def test_progress_out_of_range():
    with pytest.raises(ValueError, match="step/steps"): make_sae("soft", 16, 64, k=4).advance(12)

def test_a_loaded_sae_is_the_saved_one_in_its_phase(tmp_path):
    sae = make_sae("soft", 16, 64, k=6); sae.advance(.3); sae(rand(50, 16, dtype=torch.float32))
    sae.save_pretrained(tmp_path); again = SAE.from_pretrained(tmp_path)
    assert next(again.parameters()).dtype == torch.float32
    assert again.train().sparsifier.schedule() == sae.sparsifier.schedule()
    x = rand(20, 16, dtype=torch.float32)
    assert torch.equal(again.eval().encode(x).indices, sae.eval().encode(x).indices)

def test_training_learns_to_spend_more_on_samples_that_hold_more():
    torch.manual_seed(0)
    features = F.normalize(rand(40, 20, dtype=torch.float32), dim=1)
    def sample(n):
        complexity = torch.randint(1, 9, (n,))
        return ((torch.rand(n, 40).argsort(1).argsort(1) < complexity[:, None])*(.5 + torch.rand(n, 40))) @ features, complexity
    sae = make_sae("soft", 20, 80, k=5)
    config = make_config("soft", "smoke", steps=300, lr=4e-3, warmup=10)
    optimizer = make_optimizer(sae, config)
    for step in range(300): out = train_step(sae, optimizer, sample(256)[0], step, config)
    assert out.codes.l0().max() <= 10   # the hard phase
    x, complexity = sample(2000)
    k = estimated_k(sae.eval(), x)
    assert 3 < k.mean() < 7
    assert k[complexity >= 6].mean() > k[complexity <= 3].mean() + .5

# --- runs

@pytest.mark.parametrize("options", [dict(k=8), dict(k=8, alpha=1e-4), dict(k=8, scorer="attention", dictionary="concepts")])
def test_an_interrupted_run_resumes_bit_for_bit_in_every_phase(options, tmp_path):
    "Of 30 steps the first 4 anneal and the last 9 are hard."
    x = activations()
    options = dict(options, anneal=.14, hard=.3)
    make = lambda out: make_config("soft", "smoke", steps=30, d_sae=64, save_every=1, log_every=1, device="cpu", options=options, dead_after=1500, out=str(tmp_path/out))
    whole = train(make("whole"), TensorSource(x), progress=False)
    for after in (2, 10, 10):
        with pytest.raises(RuntimeError, match="interrupted"): train(make("torn"), Interrupted(x, after), progress=False)
        torch.manual_seed(after)
    assert_same_run(train(make("torn"), TensorSource(x), progress=False), whole)

def test_the_log_shows_the_hard_l0():
    log = train(make_config("soft", "smoke", dataset="synthetic", device="cpu", options=dict(k=8), steps=40), progress=False).log()
    assert log.l0.max() <= 16 and {"k_loss", "reconstruction"} <= set(log)

@pytest.mark.cuda
def test_on_the_gpu_as_on_the_cpu():
    scores, k = Scores(rand(200, 32, dtype=torch.float32), rand(3000, 32, dtype=torch.float32)/6), 1 + 40*torch.rand(200)
    on = Scores(scores.queries.cuda(), scores.keys.cuda())
    s = SoftTopK(32, 3000)
    for alpha in (1., .05):
        a, b = s.soft_codes(scores, k, alpha), s.cuda().soft_codes(on, k.cuda(), alpha)
        assert torch.allclose(a.codes.to_dense(), b.codes.to_dense().cpu(), atol=1e-3); s.cpu()
