"""Conformance of the metrics: known values, invariances, brute-force definitions, faults, discovery; and what the plots tolerate."""
import json, math, sys
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import sparsemax_sae.metrics as metrics_package
from sparsemax_sae import make_sae
from sparsemax_sae.activations.source import make_source
from sparsemax_sae.basics.log import read_log
from sparsemax_sae.explore.plots import as_log, l0_bins, plot_density, plot_l0_histogram, plot_training
from sparsemax_sae.metrics.cross_entropy import CrossEntropy, cross_entropies, splice
from sparsemax_sae.metrics.evaluate import (MeanPredictor, ZeroPredictor, available_metrics, evaluate, evaluate_all, metrics_table, no_codes, select_metrics, watch,
                                            with_arrows)
from sparsemax_sae.metrics.reconstruction import (DIRECTIONS, METRICS, Metric, Moments, NotApplicable, Reconstruction, cosine, evaluating, fve, fvu, nmse, nmse_raw,
                                                  register_metric)
from sparsemax_sae.metrics.sparsity import (CKNNA, DecoderOrthogonality, Sparsity, TokenSample, cat_codes, cknna, decoder_orthogonality, density, gram, hsic, l0_values,
                                            neighbours, quantile, take_rows)
from sparsemax_sae.ops.codes import Codes, Pattern, counts_to_offsets

FUNCTIONS = dict(nmse=nmse, nmse_raw=nmse_raw, fvu=fvu, fve=fve, cosine=cosine)
PERFECT = dict(nmse=0, nmse_raw=0, fvu=0, fve=1, cosine=1, ce_degradation=0, ce_recovered=1, cknna=1)
few = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)


def close(a, b, rel=1e-10, abs=1e-12): return a == pytest.approx(b, rel=rel, abs=abs, nan_ok=True)


def batch(seed, n=50, d=12, offset=0., noise=.3):
    "Activations with one large constant dimension, and reconstructions."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    x[:, 0] += offset
    return x, x + noise*torch.randn(n, d, generator=g)


def sparse_codes(z, stored):
    "Codes of the matrix `z` that also store zeros where `stored` is True."
    mask = (z != 0) | stored
    flat = mask.reshape(-1, z.shape[-1])
    return Codes(z[mask], Pattern(flat.nonzero()[:, 1], counts_to_offsets(flat.sum(1)), z.shape[-1]), z.shape)


def random_z(seed, n=40, m=30, share=.15):
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(n, m, generator=g) * (torch.rand(n, m, generator=g) < share)
    z[:, ::7] = 0
    return z, torch.rand(n, m, generator=g) < .1


def streamed(metric, x, x_hat, codes, cuts):
    edges = [0, *sorted(cuts), len(x)]
    for a, b in zip(edges, edges[1:]): metric.update(x[a:b], x_hat[a:b], None if codes is None else take_rows(codes, torch.arange(a, b)))
    return metric.compute()


class Identity:
    def reconstruct(self, x): return x, Codes.from_dense(x)


class TinySAE(nn.Module):
    "ReLU SAE with a dropout that must be off, a frozen part, and a counter that only training may move."
    def __init__(self, d_in=8, d_sae=20):
        super().__init__()
        self.enc, self.dec, self.drop, self.frozen = nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in), nn.Dropout(.5), nn.BatchNorm1d(d_in).eval()
    W_dec = property(lambda self: self.dec.weight.T)
    def reconstruct(self, x):
        z = torch.relu(self.drop(self.enc(x)))
        return self.dec(z), Codes.from_dense(z)


# Reconstruction ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("offset", [0, 50., 3000.])
def test_perfect_zero_and_mean(offset):
    x, _ = batch(0, 500, offset=offset)
    xd, d = x.double(), x.shape[1]
    for name, f in FUNCTIONS.items(): assert close(f(x, x), PERFECT[name])
    zero, mean = torch.zeros_like(x), xd.mean(0).expand_as(x)
    ratio = (xd.mean(1)**2 / xd.std(1)**2).mean().item()
    assert close(nmse(x, zero), (d - 1)/d + ratio, rel=1e-4)
    assert close(fvu(x, zero), 1) and close(nmse_raw(x, zero), 1) and cosine(x, zero) == 0
    assert close(fve(x, zero), 0, abs=1e-12) and close(fve(xd, mean), 0, abs=1e-12)
    assert close(nmse_raw(xd, mean), ((xd - mean)**2).sum().item() / (xd**2).sum().item())


def test_zero_nmse_of_centred_tokens():
    x, _ = batch(1, 200)
    x = x.double() - x.double().mean(1, keepdim=True)
    assert close(nmse(x, torch.zeros_like(x)), (x.shape[1] - 1)/x.shape[1], rel=1e-4)


def test_literal_definitions():
    x, x_hat = (t.double().numpy() for t in batch(2, 30, 7, offset=5))
    t = lambda a: torch.from_numpy(a)
    standard = lambda a: (a - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    assert close(nmse(t(x), t(x_hat)), np.mean((standard(x_hat) - standard(x))**2))
    assert close(nmse_raw(t(x), t(x_hat)), sum(np.sum((a - b)**2) for a, b in zip(x, x_hat)) / sum(np.sum(a**2) for a in x))
    assert close(fvu(t(x), t(x_hat)), np.mean([np.var(a - b)/np.var(a) for a, b in zip(x, x_hat)]))
    assert close(fve(t(x), t(x_hat)), 1 - np.var(x - x_hat, axis=0).sum()/np.var(x, axis=0).sum())
    assert close(cosine(t(x), t(x_hat)), np.mean([a @ b/np.linalg.norm(a)/np.linalg.norm(b) for a, b in zip(x, x_hat)]))


@few
@given(st.integers(0, 999), st.sampled_from([0., 60., 3000., 1e6]), st.lists(st.integers(0, 50), max_size=8))
def test_any_batching_gives_the_same_answer(seed, offset, cuts):
    x, x_hat = batch(seed, offset=offset)
    got = streamed(Reconstruction(), x, x_hat, None, cuts)
    for name, f in FUNCTIONS.items(): assert close(got[name], f(x, x_hat))


def test_leading_shapes_and_half_precision():
    x, x_hat = batch(3, 60)
    for f in FUNCTIONS.values(): assert close(f(x.view(3, 4, 5, 12), x_hat.view(3, 4, 5, 12)), f(x, x_hat))
    assert close(nmse(x.bfloat16(), x_hat.bfloat16()), nmse(x.bfloat16().double(), x_hat.bfloat16().double()))
    with pytest.raises(ValueError, match="another batch"): nmse(x, x_hat[:5])


@few
@given(st.integers(0, 999), st.floats(1e-2, 1e4), st.sampled_from([0., 60.]))
def test_scale(seed, c, offset):
    x, x_hat = (t.double() for t in batch(seed, offset=offset))
    for name, f in FUNCTIONS.items(): assert close(f(c*x, c*x_hat), f(x, x_hat), rel=5e-3 if name == "nmse" else 1e-9)   # nmse: the 1e-5 in its denominator


def test_shift():
    x, x_hat = (t.double() for t in batch(4, 200))
    v = torch.randn(12).double()
    same = lambda f, a, b: close(f(x + a, x_hat + b), f(x, x_hat), rel=1e-9)
    assert same(fve, v, v) and same(fve, v, 0*v) and same(fvu, 3, -2) and same(nmse, 7, 7)
    for f in (nmse, nmse_raw, fvu, cosine): assert not same(f, v, v)
    for f in (nmse, nmse_raw, cosine): assert not same(f, 0, 5)


def test_tokens_without_variance_and_faults():
    x, x_hat = batch(5, 40)
    flat = torch.cat([x, torch.zeros(2, 12), torch.full((3, 12), .1)])
    hat = torch.cat([x_hat, torch.ones(5, 12)])
    assert close(nmse(flat, hat), nmse(x, x_hat)) and close(fvu(flat, hat), fvu(x, x_hat))
    assert nmse_raw(flat, hat) > nmse_raw(x, x_hat)
    assert all(math.isfinite(v) for v in streamed(Reconstruction(), flat, hat, None, [40, 41, 44]).values())
    assert math.isnan(nmse(flat[40:], hat[40:])) and math.isnan(fvu(flat[40:], hat[40:])) and math.isnan(cosine(flat[40:42], hat[40:42]))
    assert math.isnan(fve(x[:1], x_hat[:1])) and math.isnan(nmse_raw(flat[40:42], hat[40:42]))
    assert all(math.isnan(v) for v in Reconstruction().compute().values())
    x_hat[3, 3] = float("nan")                                                    # the SAE's own fault is never hidden
    assert all(math.isnan(v) for v in streamed(Reconstruction(), x, x_hat, None, [10]).values())


@few
@given(st.integers(0, 999), st.sampled_from([0., 1e3, 1e8]), st.lists(st.integers(1, 200), max_size=6))
def test_moments_keep_their_digits(seed, offset, cuts):
    x = offset + 0.01*torch.randn(200, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    m = Moments()
    for part in x.tensor_split(sorted(cuts)): m.update(part)
    exact = (x.numpy().astype(np.longdouble) - x.numpy().astype(np.longdouble).mean(0))**2
    assert m.n == 200 and close(m.total(), float(exact.sum()), rel=1e-10)


# Sparsity ---------------------------------------------------------------------------------------------------------------------------------

@few
@given(st.integers(0, 999), st.booleans(), st.lists(st.integers(0, 40), max_size=5))
def test_counts_against_brute_force(seed, dense, cuts):
    z, stored = random_z(seed)
    codes = Codes.from_dense(z) if dense else sparse_codes(z, stored)
    m = Sparsity()
    got = streamed(m, z, z, codes, cuts)
    l0 = np.array([sum(v != 0 for v in row) for row in z.tolist()])
    assert close(got["l0"], l0.mean()) and close(got["l0_std"], l0.std()) and close(got["zero_fraction"], 1 - l0.mean()/30)
    for key, q in dict(l0_p05=.05, l0_median=.5, l0_p95=.95).items(): assert got[key] == np.quantile(l0, q, method="inverted_cdf")
    assert close(got["dead_fraction"], np.mean([not any(col) for col in z.T.tolist()]))
    assert l0_values(m).tolist() == sorted(l0.tolist()) and torch.equal(density(m), (z != 0).double().mean(0))


def test_sparsity_edges():
    m = Sparsity()
    assert all(math.isnan(v) for v in m.compute().values())
    with pytest.raises(ValueError, match="update first"): l0_values(m)
    m.update(None, None, Codes.from_dense(torch.zeros(4, 3, 6)))                  # nothing fires, any leading shape
    assert m.compute()["l0"] == 0 and m.compute()["dead_fraction"] == 1 and m.compute()["zero_fraction"] == 1
    with pytest.raises(ValueError, match="one SAE at a time"): m.update(None, None, Codes.from_dense(torch.zeros(4, 5)))
    none = Sparsity()
    none.update(None, None, no_codes(torch.zeros(3, 8)))
    assert none.compute()["l0"] == 0 and math.isnan(none.compute()["zero_fraction"]) and math.isnan(none.compute()["dead_fraction"])


@few
@given(st.lists(st.integers(0, 30), min_size=1), st.floats(0, 1))
def test_quantile(values, q):
    assert quantile(torch.bincount(torch.tensor(values)), q) == np.quantile(values, q, method="inverted_cdf")


def do_literal(W):
    cos = lambda a, b: float(a @ b / (np.linalg.norm(a)*np.linalg.norm(b))) if a.any() and b.any() else 0.
    return np.mean([[0. if i == j else cos(a, b)**2 for j, b in enumerate(W)] for i, a in enumerate(W)])


@few
@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 9), st.integers(1, 40))
def test_do(seed, m, d, chunk):
    W = torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    W[m//2] = 0
    got = decoder_orthogonality(W, chunk)
    assert close(got, do_literal(W.numpy()), rel=1e-9, abs=1e-13)
    full = torch.cat([W[:m//2], W[m//2 + 1:]])
    if len(full): assert max(0, 1/d - 1/len(full)) - 1e-12 <= decoder_orthogonality(full) <= 1 - 1/len(full) + 1e-12
    assert close(decoder_orthogonality(W * torch.logspace(-30, 30, m).double()[:, None]), got, rel=1e-9, abs=1e-13)


def test_do_metric():
    sae = TinySAE()
    assert DecoderOrthogonality().measure(sae) == {"do": decoder_orthogonality(sae.W_dec)}
    assert decoder_orthogonality(torch.eye(5)) == 0
    for W in (torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="d_sae, d_in"): decoder_orthogonality(W)
    with pytest.raises(NotApplicable, match="no dictionary"): DecoderOrthogonality().measure(ZeroPredictor())


def cknna_literal(X, Z, k):
    n = len(X)
    K, L = ([[float(np.dot(a, b)) if i != j else 0. for j, b in enumerate(F)] for i, a in enumerate(F)] for F in (X, Z))
    near = lambda A: [sorted((j for j in range(n) if j != i), key=lambda j: (-A[i][j], j))[:k] for i in range(n)]
    def align(A, B):
        nA, nB = near(A), near(B)
        P, Q = (np.array([[M[i][j]*(j in nA[i] and j in nB[i]) for j in range(n)] for i in range(n)]) for M in (A, B))
        product = sum(P[i, j]*Q[j, l] for i in range(n) for j in range(n) for l in range(n))
        return (sum(P[i, j]*Q[j, i] for i in range(n) for j in range(n)) + P.sum()*Q.sum()/((n-1)*(n-2)) - 2*product/(n-2)) / (n*(n-3))
    kk, ll = align(K, K), align(L, L)
    return align(K, L)/math.sqrt(kk*ll) if kk > 0 and ll > 0 else math.nan


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6))
def test_cknna_against_loops(seed, k):
    z, stored = random_z(seed, 14, 20)
    x = torch.randint(-2, 3, (14, 5), generator=torch.Generator().manual_seed(seed)).float()    # whole numbers: ties are exact
    z = (8*z).round()
    expected = cknna_literal(x.numpy(), z.numpy(), k)
    for codes in (Codes.from_dense(z), sparse_codes(z, stored)): assert close(cknna(x, codes, k), expected, rel=1e-9)


def test_cknna_properties():
    z, stored = random_z(1, 200, 60)
    x, codes = z @ torch.randn(60, 10), sparse_codes(z, stored)
    assert close(cknna(x, Codes.from_dense(x)), 1) and close(cknna(4*x, codes.with_values(2*codes.values)), cknna(x, codes), rel=1e-6)
    assert abs(cknna(x, take_rows(codes, torch.randperm(200)))) < .1 < cknna(x, codes)
    assert math.isnan(cknna(x, Codes.from_dense(0*z)))
    for args in ((x[:9], codes), (x[:3], take_rows(codes, torch.arange(3)), 2), (x, codes, 200), (x, codes, 0)):
        with pytest.raises(ValueError): cknna(*args)


@few
@given(st.integers(0, 99), st.integers(1, 9))
def test_gram_and_rows(seed, chunk):
    z, stored = random_z(seed, 12, 20)
    codes, rows = sparse_codes(z, stored), torch.randint(0, 12, (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(take_rows(codes, rows).to_dense(), z[rows]) and torch.equal(take_rows(Codes.from_dense(z), rows).to_dense(), z[rows])
    assert torch.equal(cat_codes([codes, Codes.from_dense(z), take_rows(codes, rows)]).to_dense(), torch.cat([z, z, z[rows]]))
    assert torch.allclose(gram(codes, chunk), z.double() @ z.double().T, atol=1e-12)
    assert torch.equal(take_rows(codes, rows[:0]).to_dense(), z[:0])


def test_hsic_and_neighbours():
    K, L = torch.randn(2, 9, 9, dtype=torch.float64)
    P, Q = K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)
    assert close(hsic(K, L).item(), (((P*Q.T).sum() + P.sum()*Q.sum()/(8*7) - 2*(P @ Q).sum()/7)/(9*6)).item())
    mask = neighbours(torch.zeros(5, 5), 2)                                       # all tied: the smallest other indices
    assert mask.sum(1).tolist() == [2]*5 and mask[0].nonzero().flatten().tolist() == [1, 2] and mask[4].nonzero().flatten().tolist() == [0, 1]


@few
@given(st.integers(0, 99), st.lists(st.integers(0, 40), max_size=6), st.integers(4, 60))
def test_token_sample_ignores_batching(seed, cuts, n):
    z, stored = random_z(seed)
    x, codes = torch.arange(40.)[:, None].expand(40, 3), sparse_codes(z, stored)
    samples = []
    for edges in ([0, 40], [0, *sorted(cuts), 40]):
        s = TokenSample(n)
        for a, b in zip(edges, edges[1:]): s.update(x[a:b], take_rows(codes, torch.arange(a, b)))
        samples.append(s)
    a, b = samples
    assert len(a.x) == min(n, 40) and torch.equal(a.x, b.x) and torch.equal(a.codes.to_dense(), b.codes.to_dense())
    assert (a.x[:, 0].diff() > 0).all() and torch.equal(a.codes.to_dense(), z[a.x[:, 0].long()])


def test_token_sample_is_uniform():
    hits = torch.zeros(60)
    for seed in range(400):
        s = TokenSample(15, seed)
        for i in torch.arange(60).split(7): s.update(i[:, None].float(), Codes.from_dense(torch.ones(len(i), 1)))
        hits[s.x[:, 0].long()] += 1
    assert hits.sum() == 400*15 and ((hits - 100).abs() < 5*math.sqrt(400*.25*.75)).all()


def test_cknna_metric_of_few_tokens():
    m = CKNNA(k=3)
    m.update(torch.randn(3, 5), None, Codes.from_dense(torch.randn(3, 5)))
    assert math.isnan(m.compute()["cknna"])
    m.update(torch.randn(3, 5), None, Codes.from_dense(torch.randn(3, 5)))
    assert math.isfinite(m.compute()["cknna"])


# Cross-entropy on a real, tiny, random GPT-2 --------------------------------------------------------------------------------------------------

class TinyGPT2:
    name, d_in, has_model = "random gpt2", 16, True
    def __init__(self):
        from transformers import GPT2Config, GPT2LMHeadModel
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
        for p in self.model.parameters(): p.data.mul_(8)                            # far from uniform predictions
    def heldout_tokens(self, n_sequences, batch_size=16):
        yield from torch.randint(50, (n_sequences, 12), generator=torch.Generator().manual_seed(1)).split(batch_size)
    @torch.no_grad()
    def token_losses(self, tokens, edit=None):
        def hook(module, args, out): return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
        handle = self.model.transformer.h[0].register_forward_hook(hook) if edit else None
        try: logits = self.model(tokens).logits
        finally:
            if handle: handle.remove()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
    def acts(self, n):
        x = []
        self.token_losses(next(self.heldout_tokens(n, n)), lambda h: x.append(h) or h)
        return x[0].reshape(-1, 16)
    def heldout(self, n, batch_size=4096): yield from self.acts(20)[:n].split(batch_size)
    def stream(self, batch_size, seed=0, cursor=None):
        while True: yield self.acts(20)[:batch_size], {}


@pytest.fixture(scope="module")
def gpt2(): return TinyGPT2()


def test_identity_splice_is_exactly_zero(gpt2):
    r = cross_entropies(Identity(), gpt2, 20)
    assert r["ce_degradation"] == 0.0 and r["ce_recovered"] == 1.0 and r["ce_spliced"] == r["ce_original"]


def test_cross_entropy_definitions(gpt2):
    class Half:
        def reconstruct(self, x): return .5*x + .1, None
    tokens = next(gpt2.heldout_tokens(20, 20))
    ce = {k: gpt2.token_losses(tokens, e).double().mean().item() for k, e in dict(original=None, spliced=splice(Half()), zero=torch.zeros_like).items()}
    r = cross_entropies(Half(), gpt2, 20, batch_size=3)
    for k, v in ce.items(): assert close(r[f"ce_{k}"], v, rel=1e-6)
    assert abs(r["ce_degradation"]) > 1e-3 and close(r["ce_degradation"], ce["original"] - ce["spliced"], rel=1e-4)
    assert close(r["ce_recovered"], (ce["zero"] - ce["spliced"])/(ce["zero"] - ce["original"]), rel=1e-4)
    assert cross_entropies(ZeroPredictor(), gpt2, 20)["ce_recovered"] == pytest.approx(0, abs=1e-12)
    for size in (1, 20): assert close(cross_entropies(Half(), gpt2, 20, size)["ce_degradation"], r["ce_degradation"], rel=1e-4)


def test_splice_keeps_the_dtype():
    class Single:
        def reconstruct(self, x): return x.float(), None
    assert splice(Single())(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_no_language_model():
    source = make_source(torch.randn(100, 8), name="plain vectors")
    with pytest.raises(NotApplicable, match="'plain vectors' has none"): cross_entropies(Identity(), source)
    with pytest.raises(ValueError, match="causal language model"): evaluate(TinySAE(), source, metrics=["nmse", "ce_recovered"])
    r = evaluate(TinySAE(), source, metrics=None)
    assert "ce_degradation" not in r and "causal language model" in r.omitted["cross_entropy"] and "nmse" in r


# The registry -----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def clean_registry():
    before = dict(METRICS)
    yield
    METRICS.clear(); METRICS.update(before)


def test_every_metric_is_complete():
    keys = [k for cls in available_metrics().values() for k in cls.direction]
    assert {"nmse", "nmse_raw", "fvu", "fve", "cosine", "l0", "zero_fraction", "dead_fraction", "do", "cknna", "ce_degradation", "ce_recovered"} <= set(keys)
    assert len(keys) == len(set(keys)) and all(set(cls.direction.values()) <= set(DIRECTIONS) for cls in METRICS.values())


def test_a_new_module_is_found(tmp_path, monkeypatch, clean_registry):
    (tmp_path/"word_count.py").write_text(
        "from sparsemax_sae.metrics.reconstruction import Metric, register_metric\n@register_metric\nclass Seen(Metric):\n"
        "    name, direction = 'seen', {'seen': 'higher'}\n    def __init__(self): self.n = 0\n"
        "    def update(self, x, x_hat, codes): self.n += len(x)\n    def compute(self): return {'seen': self.n}\n")
    monkeypatch.setattr(metrics_package, "__path__", [*metrics_package.__path__, str(tmp_path)])
    try:
        assert "seen" in available_metrics()
        source = make_source(torch.randn(100, 8))
        assert evaluate(TinySAE(), source, n=4, metrics="seen") == {"seen": 4.} and "seen" in metrics_table(TinySAE(), source, n=4)
    finally: sys.modules.pop("sparsemax_sae.metrics.word_count", None)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown metric 'nmse_row'. Did you mean 'nmse_raw'?"): select_metrics(["fvu", "nmse_row"])
    with pytest.raises(ValueError, match="reconstruction.*fvu"): evaluate(Identity(), make_source(torch.randn(50, 4)), metrics="zzz")
    assert select_metrics("reconstruction") == {Reconstruction: None}
    assert select_metrics(["nmse", "reconstruction", "l0", "fvu"]) == {Reconstruction: None, Sparsity: {"l0"}}
    assert select_metrics(iter(["fvu", "nmse"])) == {Reconstruction: {"fvu", "nmse"}} and select_metrics([]) == {}


def test_incomplete_metrics_are_refused(clean_registry):
    bad = [(dict(), "no name"), (dict(name="a", needs="x"), "must be one of"), (dict(name="a"), "direction"), (dict(name="a", direction="lower"), "direction"),
           (dict(name="a", direction={"a": "lower"}), "update and compute"), (dict(name="a", needs="model", direction={"a": "lower"}), "define measure")]
    for attrs, match in bad:
        with pytest.raises(ValueError, match=match): register_metric(type("Bad", (Metric,), attrs))
    methods = dict(update=lambda *a: None, compute=lambda *a: {})
    with pytest.raises(ValueError, match="'nmse'"): register_metric(type("Taken", (Metric,), dict(name="mine", direction={"nmse": "lower"}, **methods)))
    with pytest.raises(ValueError, match="'sparsity'"): register_metric(type("Taken", (Metric,), dict(name="sparsity", direction={"a": "lower"}, **methods)))
    assert "mine" not in METRICS
    again = register_metric(type("Reconstruction", (Metric,), dict(name="reconstruction", direction={"nmse": "lower"}, **methods)))   # a notebook that is run again
    assert METRICS["reconstruction"] is again


def test_metrics_on_request_only(clean_registry):
    register_metric(type("Dear", (Metric,), dict(name="dear", default=False, direction={"dear": "lower"}, update=lambda *a: None, compute=lambda self: {"dear": 1, "extra": 2})))
    source = make_source(torch.randn(50, 8))
    assert "dear" not in evaluate(TinySAE(), source) and evaluate(TinySAE(), source, metrics="dear") == {"dear": 1., "extra": 2.}
    assert evaluate(TinySAE(), source, metrics=["dear", "l0"]).keys() == {"l0", "dear", "extra"}


# evaluate -------------------------------------------------------------------------------------------------------------------------------

def test_perfect_reconstruction_is_perfect_everywhere(gpt2):
    r = evaluate(Identity(), gpt2, n=200, n_sequences=8)
    assert r.n == 200 and set(PERFECT) <= set(r) and "decoder_orthogonality" in r.omitted
    for k, v in PERFECT.items(): assert close(r[k], v)


@pytest.mark.parametrize("arch", ["topk", "relu"])
def test_batch_size_is_a_matter_of_memory(arch):
    source, sae = make_source(torch.randn(4000, 8), heldout=.2), make_sae(arch, 8, 32)
    a, b, c = (evaluate(sae, source, n=500, batch_size=size) for size in (4096, 500, 33))
    assert a.n == b.n == c.n == 500
    for k in a: assert close(a[k], b[k], rel=1e-5) and close(a[k], c[k], rel=1e-5)


def test_nothing_is_changed_by_measuring(gpt2):
    sae = TinySAE(16).train()
    sae.frozen.eval()
    modes, state, rng = {m: m.training for m in sae.modules()}, {k: v.clone() for k, v in sae.state_dict().items()}, torch.get_rng_state()
    r = evaluate(sae, gpt2, n=100, n_sequences=4)
    assert {m: m.training for m in sae.modules()} == modes and sae.training and not sae.frozen.training
    assert all(torch.equal(v, sae.state_dict()[k]) for k, v in state.items()) and torch.equal(rng, torch.get_rng_state())
    assert r == evaluate(sae.eval(), gpt2, n=100, n_sequences=4) and all(p.grad is None for p in sae.parameters())
    with pytest.raises(RuntimeError), evaluating(sae.train()): raise RuntimeError
    assert sae.training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_several_saes_share_one_pass():
    class Counting:
        name, d_in, passes, x = "counted", 8, 0, torch.randn(300, 8)
        def heldout(self, n, batch_size=4096): self.passes += 1; yield from self.x[:n].split(batch_size)
    source, saes = Counting(), {"a": TinySAE(), "b": TinySAE()}
    both = evaluate_all(saes, source, n=300)
    assert source.passes == 1
    for name, sae in saes.items(): assert both[name] == evaluate(sae, source, n=300)


def test_sizes_are_checked_and_data_may_end():
    source = make_source(torch.randn(100, 8))
    for bad in (dict(n=0), dict(n=1.5), dict(n_sequences=0), dict(batch_size=-1)):
        with pytest.raises(ValueError, match="at least 1"): evaluate(TinySAE(), source, **bad)
    assert evaluate(TinySAE(), source, n=10_000).n == 5
    assert evaluate(TinySAE(), source, metrics="do").n == 0                       # nothing to stream


def test_table(gpt2):
    df = metrics_table(TinySAE(16), gpt2, n=200, n_sequences=4)
    assert list(df.index) == ["sae", "mean", "zero"] and df.columns[0] == "nmse" and list(df.columns).index("ce_degradation") < list(df.columns).index("l0")
    assert close(df.loc["zero", "fvu"], 1) and df.loc["zero", "l0"] == 0 and math.isnan(df.loc["mean", "do"]) and df.loc["zero", "ce_recovered"] == pytest.approx(0, abs=1e-12)
    assert close(df.loc["mean", "fve"], 0, abs=1e-5)
    assert df.attrs["direction"]["nmse"] == "lower" and df.attrs["direction"]["ce_degradation"] == "zero" and df.attrs["n"] == 200 and df.attrs["source"] == "random gpt2"
    omitted = df.attrs["omitted"]
    assert all("decoder_orthogonality" in omitted[row] for row in ("mean", "zero")) and set(omitted["sae"]) == {"adaptivity", "recovery", "monosemanticity", "zero_shot"} and "nmse ↓" in with_arrows(df) and "ce_original" in with_arrows(df)
    json.dumps(df.attrs)
    two = metrics_table({"a": TinySAE(16), "b": TinySAE(16)}, gpt2, n=50, metrics=["l0", "do"], mean=torch.zeros(16))
    assert list(two.index) == ["a", "b", "mean", "zero"] and list(two.columns) == ["l0", "do"]
    with pytest.raises(ValueError, match="other names"): metrics_table({"zero": TinySAE(16)}, gpt2)


def test_trivial_predictors():
    x = torch.randn(2, 5, 8)
    source = make_source(torch.randn(2000, 8) + 3)
    mean = MeanPredictor.fit(source, n=1900, batch_size=100)
    assert torch.allclose(mean.mean, source.x[source.train_rows].mean(0), atol=1e-5)
    for p in (mean, ZeroPredictor()):
        x_hat, codes = p.reconstruct(x)
        assert x_hat.shape == x.shape and codes.shape == (2, 5, 0) and codes.l0().shape == (2, 5) and len(codes) == 10
    assert torch.equal(mean.reconstruct(x)[0][1, 3], mean.mean) and mean.reconstruct(x.double())[0].dtype == torch.float64
    with pytest.raises(ValueError, match="d_in"): MeanPredictor(x)


@pytest.mark.cuda
def test_gpu_gives_the_same_numbers():
    sae, source = make_sae("topk", 8, 32), make_source(torch.randn(2000, 8), heldout=.2, device="cpu")
    a = metrics_table(sae, source, n=400, metrics=["reconstruction", "sparsity", "cknna", "do"])
    source.device = torch.device("cuda")
    b = metrics_table(sae.cuda(), source, n=400, metrics=["reconstruction", "sparsity", "cknna", "do"])
    pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-6)


def test_watch_hands_over_the_metric():
    m, sae = Sparsity(), TinySAE()
    assert watch({"sae": sae}, [torch.randn(10, 8), torch.randn(2, 3, 8)], {"sae": [m]}) == 16 and len(l0_values(m)) == 16 and density(m).shape == (20,)


# Plots ------------------------------------------------------------------------------------------------------------------------------------

def test_logs(tmp_path):
    file = tmp_path/"log.jsonl"
    file.write_text('{"step": 0, "loss": 1}\n\n{"step": 10, "l0": 3}\n{"step": 20, "lo')
    assert read_log(file) == read_log(tmp_path) == read_log(str(file)) == [dict(step=0, loss=1), dict(step=10, l0=3)]
    assert as_log(file).equals(as_log(tmp_path)) and as_log(str(file))["step"].tolist() == [0, 10]
    file.write_text('{"step": 0}\nnonsense\n{"step": 1}')
    with pytest.raises(ValueError, match="line 2"): read_log(file)
    with pytest.raises(FileNotFoundError): read_log(tmp_path/"missing.jsonl")


@pytest.mark.parametrize("log", [dict(step=[0], loss=[1.]), dict(step=range(300), loss=np.linspace(5, -1, 300), l0=np.linspace(900, 3, 300)), dict(step=[1, 2], mse=[1, 2]),
                                 dict(step=[3, 1], l0=[4, np.nan], loss=[None, None]), dict(step=[])])
def test_plot_training_tolerates(log):
    fig = plot_training(pd.DataFrame(log))
    fig.canvas.draw()
    assert len(fig.axes) == 2 and not plt.get_fignums()
    with pytest.raises(ValueError, match="'step'"): plot_training(pd.DataFrame(dict(loss=[1])))


def test_plot_distributions():
    for l0 in (torch.randint(0, 9, (3, 4)), [5], {"fixed": np.full(9, 32), "wide": np.arange(5000)}, [0, 0]): plot_l0_histogram(l0).canvas.draw()
    for p in (torch.rand(50), [0., .5], np.zeros(4), {"a": [1.], "b": [.1, 0]}): plot_density(p).canvas.draw()
    for bad in ([], [float("nan")], [-1]):
        with pytest.raises(ValueError, match="at least one"): plot_l0_histogram(bad)
    with pytest.raises(ValueError, match="Divide counts"): plot_density([3])
    assert not plt.get_fignums()


@few
@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_l0_bins_cover_everything(values):
    v = np.array(values)
    bins = l0_bins([v])
    assert bins[0] < v.min() and bins[-1] > v.max() and len(bins) <= 62 and len(set(np.diff(bins))) <= 1 and (bins % 1 == .5).all()
