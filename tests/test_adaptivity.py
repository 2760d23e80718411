"""Adaptivity and recovery: graded sources, rank correlation, calibration, matching and support scores, against plain references."""
import itertools, math
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from sparsemax_sae import make_sae
from sparsemax_sae.activations.source import NotGraded, Source, first_of, make_source
from sparsemax_sae.activations.store import ActivationStore, StoreSource
from sparsemax_sae.activations.synthetic import SyntheticSource
from sparsemax_sae.activations.text import TextSource, load_pretrained, load_tokenizer
from sparsemax_sae.metrics.adaptivity import (Adaptivity, as_numbers, bin_of, calibration, graded_size, l0_slope, observations, observed, partial_spearman, ranks,
                                              spearman)
from sparsemax_sae.metrics.evaluate import MeanPredictor, ZeroPredictor, available_metrics, evaluate, metrics_table
from sparsemax_sae.metrics.reconstruction import NotApplicable
from sparsemax_sae.metrics.recovery import Recovery, cosines, match_features, mean_max_cosine, support_counts, support_scores, true_batches
from sparsemax_sae.metrics.sparsity import take_rows
from sparsemax_sae.ops.codes import Codes, Pattern, counts_to_offsets
from sparsemax_sae.reproduce.paths import data_dir

CPU = dict(device="cpu")
few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 9999)


@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)


def close(a, b, rel=1e-9, abs=1e-12): return a == pytest.approx(b, rel=rel, abs=abs, nan_ok=True)
def rng(seed): return torch.Generator().manual_seed(seed)


def synthetic(**options): return SyntheticSource(**dict(dict(n_features=30, d_in=16, k_max=6, block_size=100), **CPU, **options))


class Given:
    "Codes laid down for the samples in their order; `W_dec` is a dictionary, if any."
    def __init__(self, codes, W_dec=None): self.codes, self.W_dec, self.at = codes, W_dec, 0
    def reconstruct(self, x):
        rows = torch.arange(self.at, self.at + len(x))
        self.at += len(x)
        return x, take_rows(self.codes, rows)


def heldout_truth(source, n):
    parts = list(itertools.islice(source.heldout_truth(), -(-n // source.block_size)))
    dense = torch.cat([z.to_dense() for _, z, _ in parts])[:n]
    return torch.cat([x for x, *_ in parts])[:n], dense, torch.cat([c for *_, c in parts])[:n]


# Graded sources ---------------------------------------------------------------------------------------------------------------------------

def graded(source, n, batch_size=4096):
    out = list(source.graded(n, batch_size))
    assert all(len(x) == len(c) <= batch_size and x.device == c.device == torch.device(source.device) and c.ndim == 1 for x, c in out)
    return torch.cat([x for x, _ in out]), torch.cat([c for _, c in out])


@pytest.fixture(scope="module")
def gpt2():
    folder = data_dir("backbones", "tiny-gpt2")
    return load_pretrained(folder, torch.float32), load_tokenizer(folder)


@pytest.fixture(scope="module")
def text(gpt2):
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon".split()
    draw = np.random.default_rng(0)
    texts = [f"{i} " + " ".join(draw.choice(words, int(draw.integers(20, 90)))) + "." for i in range(120)]
    def make(**options): return TextSource(texts, **dict(dict(model=gpt2[0], tokenizer=gpt2[1], seq_len=16, block_size=8, model_batch=4, heldout=.2), **CPU, **options))
    return make


@pytest.fixture(params=["synthetic", "noise", "document", "sequence", "none", "first"])
def any_source(request, text):
    if request.param == "synthetic": return synthetic()
    if request.param == "noise": return synthetic(noise=.2, frequency="zipf", k_min=2)
    if request.param == "first": return text(bos="sequence", skip_first=5, hook="pre", layer=1)
    return text(bos=request.param)


def test_graded_is_fixed_and_independent_of_the_batch_size(any_source):
    x, c = graded(any_source, 250)
    assert x.shape == (250, any_source.d_in) and x.dtype == torch.float32 and len(c) == 250 and c.isfinite().all() and any_source.graded_by
    for n, batch_size in ((250, 1), (250, 77), (250, 100), (101, 10_000), (100, 100), (7, 3)):
        y, d = graded(any_source, n, batch_size)
        assert torch.equal(y, x[:n]) and torch.equal(d, c[:n])
    next(any_source.stream(10, seed=1))
    assert torch.equal(c, graded(any_source, 250)[1])
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="at least 1"): any_source.graded(bad)
        with pytest.raises(ValueError, match="at least 1"): any_source.graded(5, bad)


def test_synthetic_complexity_is_the_number_of_true_features():
    source = synthetic(noise=.1)
    x, c = graded(source, 333)
    held, z, complexity = heldout_truth(source, 333)
    assert torch.equal(x, held) and torch.equal(x, torch.cat(list(source.heldout(333)))) and torch.equal(c, complexity) and torch.equal(c, (z != 0).sum(1))


@pytest.mark.parametrize("options", [dict(), dict(bos="sequence"), dict(skip_first=1), dict(skip_first=6), dict(skip_first=15), dict(hook="pre", layer=0)])
def test_text_complexity_is_the_surprisal_of_the_token(text, options):
    source = text(**options)
    skip, start, T = source.skip_first, max(1, source.skip_first), 16
    tokens = torch.cat(list(source.heldout_tokens(9, 4)))
    n = len(tokens)*(T - start)
    x, c = graded(source, n, 29)
    held = torch.cat(list(source.heldout(len(tokens)*(T - skip)))).view(len(tokens), T - skip, -1)
    assert torch.equal(x, held[:, start - skip:].flatten(0, 1))                       # the very activations of `heldout`
    with torch.no_grad(): p = source.model(tokens).logits.double().log_softmax(-1)
    expected = torch.stack([-p[:, t - 1].gather(1, tokens[:, t:t+1])[:, 0] for t in range(start, T)], 1)
    assert torch.allclose(c.double(), expected.flatten(), atol=1e-4) and (c >= 0).all()


def test_text_grades_in_one_pass_and_only_what_is_asked_for(text):
    source, passes = text(), []
    handle = source.model.register_forward_hook(lambda *a: passes.append(1))
    try: graded(source, 4*15)
    finally: handle.remove()
    assert len(passes) == 1                                                            # model_batch = 4 sequences of 15 graded positions


def test_text_in_half_precision(gpt2, text):
    import copy
    source = text(model=copy.deepcopy(gpt2[0]), dtype="bfloat16")
    x, c = graded(source, 60)
    assert x.dtype == c.dtype == torch.float32 and torch.equal(x, torch.cat(list(source.heldout(64))).view(4, 16, -1)[:, 1:].flatten(0, 1)) and c.isfinite().all()


def test_data_may_end(text):
    source = text()
    n = sum(len(t) for t in source.heldout_sequences())*15
    assert len(graded(source, 10**6, 100)[0]) == n


def test_sources_without_complexity_say_so_at_once(tmp_path, text, gpt2):
    from transformers import BertConfig, BertModel
    bert = BertModel(BertConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=len(gpt2[1]))).eval()
    source = synthetic()
    store = StoreSource(ActivationStore.build(source, tmp_path/"store", n=300, shard_size=70, progress=False), **CPU)
    for s in (make_source(torch.randn(30, 4), name="plain vectors"), store, text(model=bert)):
        with pytest.raises(NotGraded, match="SyntheticSource .number of active features.; TextSource .surprisal") as e: s.graded(5)
        assert s.name in str(e.value) and isinstance(e.value, NotImplementedError)
        with pytest.raises(NotApplicable, match="does not know how complex"): observed(Given(None), s, 5)
        assert "does not know how complex" in evaluate(make_sae("topk", s.d_in, 20, k=2), s, n=20, n_sequences=1).omitted["adaptivity"]
    with pytest.raises(ValueError, match="n=0"): store.graded(0)


@few
@given(st.lists(st.integers(0, 7), max_size=8), st.integers(1, 40), st.integers(1, 9))
def test_first_of(sizes, n, batch_size):
    parts, asked = torch.arange(sum(sizes)).split(sizes) if sizes else [], []
    out = list(first_of((asked.append(len(p)) or p for p in parts), n, batch_size))
    assert torch.cat(out).tolist() == list(range(min(n, sum(sizes)))) if out else min(n, sum(sizes)) == 0
    assert all(0 < len(x) <= batch_size for x in out)
    assert all(len(x) == batch_size for x in out[:-1]) and sum(asked[:-1]) < n         # no block is asked for in vain


# Rank correlation -------------------------------------------------------------------------------------------------------------------------

values = st.one_of(st.lists(st.integers(-3, 5), min_size=2, max_size=60), st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60))


@few
@given(values)
def test_ranks_against_scipy(v):
    assert np.array_equal(ranks(torch.tensor(v)).numpy(), scipy.stats.rankdata(np.array(torch.tensor(v))))


@few
@given(st.data(), st.sampled_from([2, 5, 1000]), st.sampled_from([torch.int64, torch.int32, torch.float32, torch.float64, torch.bool]))
@pytest.mark.filterwarnings("ignore")
def test_spearman_against_scipy(data, kinds, dtype):
    n = data.draw(st.integers(2, 80))
    a, b = (torch.randint(kinds, (n,), generator=rng(data.draw(seeds))) for _ in range(2))
    got, expected = spearman(a.to(dtype), b), scipy.stats.spearmanr(a.to(dtype).numpy(), b.numpy()).statistic
    assert close(got, float(expected)) and (math.isnan(got) or -1 <= got <= 1)
    assert close(spearman(b, a.to(dtype)), got) and close(spearman(-b, a.to(dtype)), -got)
    assert close(spearman(b.double().exp().log1p(), a.to(dtype)), got) or kinds == 1000      # any increasing function


def test_spearman_edges():
    assert spearman([1, 2, 3], [10., 20., 30.]) == 1 and spearman([1, 2, 3], [3, 2, 1]) == -1
    for a, b in [([], []), ([1], [2]), ([3, 3, 3], [1, 2, 3]), ([1, 2, 3], [.1]*3), ([1, 2, math.nan], [1, 2, 3])]: assert math.isnan(spearman(a, b))
    for a, b in [([1, 2], [1, 2, 3]), (torch.zeros(2, 2), torch.zeros(2, 2)), (1, 2)]:
        with pytest.raises(ValueError, match="one number per sample"): spearman(a, b)
    tiny = [1., 1 + 1e-12, 1 + 2e-12]
    assert spearman(tiny, [1, 2, 3]) == 1 and spearman(pd.Series(tiny), np.array([3, 2, 1])) == -1           # no cast to single precision
    big = torch.tensor([2**53, 2**53 + 1, 2**53 + 2])
    assert spearman(big, [1, 2, 3]) == 1 and spearman(torch.randn(5, requires_grad=True).exp(), torch.zeros(5)) != 0
    assert spearman([math.inf, 0, 1], [3, 1, 2]) == 1
    n = 200_000
    assert spearman(torch.arange(n), torch.arange(n)) == 1


@few
@given(seeds, st.integers(4, 80), st.sampled_from([3, 10, 10_000]))
def test_partial_spearman_is_the_correlation_of_residuals(seed, n, kinds):
    g = torch.randint(kinds, (n,), generator=rng(seed))
    a, b = (torch.randint(kinds, (n,), generator=rng(seed + i)) + s*g for i, s in ((1, 1), (2, -2)))
    R = np.stack([scipy.stats.rankdata(v) for v in (a, b, g)])
    R = R - R.mean(1, keepdims=True)
    got = partial_spearman(a, b, g)
    if (R[2] == 0).all() or (R[:2] == 0).all(1).any(): return
    ra, rb = (v - (v @ R[2])/(R[2] @ R[2])*R[2] for v in R[:2])
    den = np.linalg.norm(ra)*np.linalg.norm(rb)
    if den > 1e-6*np.linalg.norm(R[0])*np.linalg.norm(R[1]): assert close(got, ra @ rb/den, rel=1e-6, abs=1e-8)
    else: assert math.isnan(got) or abs(got) <= 1


def test_partial_spearman_edges():
    a, b, g = torch.randn(3, 500)
    assert partial_spearman(a, b, torch.ones(500)) == spearman(a, b) and abs(partial_spearman(a + 5*g, b + 5*g, g)) < .15 < .8 < spearman(a + 5*g, b + 5*g)
    assert close(partial_spearman(a, a, g), 1) and close(partial_spearman(a, -a, g), -1)
    for args in ((a, b, a), (a, b, b**3), (torch.ones(500), b, g), (a, b, g.masked_fill(g > 2, math.nan))): assert math.isnan(partial_spearman(*args))


@few
@given(seeds, st.integers(2, 60))
def test_slope_against_numpy(seed, n):
    c, l0 = torch.randint(9, (n,), generator=rng(seed)), torch.randint(90, (n,), generator=rng(seed + 1))
    if c.unique().numel() == 1: assert math.isnan(l0_slope(l0, c)); return
    assert close(l0_slope(l0, c), np.polyfit(c.double().numpy(), l0.double().numpy(), 1)[0], abs=1e-9)
    assert l0_slope(3*c + 4, c) == pytest.approx(3) and l0_slope(torch.full((n,), 32), c) == 0


# Calibration ------------------------------------------------------------------------------------------------------------------------------

@few
@given(st.one_of(st.lists(st.integers(0, 60), min_size=1, max_size=200), st.lists(st.floats(0, 20), min_size=1, max_size=200)), st.integers(1, 15))
def test_calibration(c, bins):
    l0 = torch.randint(0, 50, (len(c),), generator=rng(len(c)))
    table, c = calibration(l0, c, bins), np.array(c)
    group = bin_of(torch.from_numpy(c), bins).numpy()
    assert list(table.columns) == ["complexity", "l0", "l0_std", "n"] and table.n.sum() == len(c) and (table.n > 0).all() and list(table.index) == list(range(len(table)))
    assert table.complexity.is_monotonic_increasing and all(len(set(group[c == v])) == 1 for v in set(c))                        # ties are never split
    assert all(np.diff(group[np.argsort(c, kind="stable")]) >= 0)
    for row, g in zip(table.itertuples(), sorted(set(group))):
        assert close(row.l0, l0.numpy()[group == g].mean()) and close(row.l0_std, l0.numpy()[group == g].std(), abs=1e-9) and close(row.complexity, c[group == g].mean())
    if len(set(c)) <= 32 and (c == c.round()).all(): assert list(table.complexity) == sorted(set(c))
    else: assert len(table) <= bins
    if len(set(c)) == len(c) > 32: assert table.n.max() - table.n.min() <= 1 or bins > len(c)


def test_calibration_bins():
    assert calibration(torch.zeros(100), torch.arange(100), 10).n.tolist() == [10]*10 and len(calibration(torch.zeros(32), torch.arange(32), 4)) == 32
    assert len(calibration(torch.zeros(33), torch.arange(33), 4)) == 4 and calibration([1, 2], [.5, .5]).to_dict("list") == dict(complexity=[.5], l0=[1.5], l0_std=[.5], n=[2])
    assert len(calibration(torch.zeros(1000), torch.rand(1000), 7)) == 7
    for bad, match in [(([], []), "0 samples"), (([1], [math.nan]), "NaN"), (([1, 2], [1]), "one number per sample"), (([1], [1], 0), "bins=0")]:
        with pytest.raises(ValueError, match=match): calibration(*bad)


# The adaptivity of codes ------------------------------------------------------------------------------------------------------------------

def laid_down(z): return Codes.from_dense(z)


def test_oracle_shuffled_and_topk():
    source = synthetic(k_max=8)
    x, z, c = heldout_truth(source, 2000)
    oracle, shuffled, topk = laid_down(z), laid_down(z[torch.randperm(2000)]), laid_down(torch.eye(30)[:4].sum(0).expand(2000, 30))
    for codes, rho, slope in ((oracle, 1, 1), (shuffled, 0, 0), (topk, math.nan, 0)):
        l0, complexity = observed(Given(codes), source, 2000, 333)
        assert torch.equal(complexity, c) and torch.equal(l0, codes.l0()) and l0.dtype == torch.int64
        assert close(spearman(l0, complexity), rho, abs=.08 if rho == 0 else 1e-12) and close(l0_slope(l0, complexity), slope, abs=.08 if rho == 0 else 1e-12)
    seen = observations(Given(oracle), source, 50)
    assert torch.allclose(seen["norm"], x[:50].double().norm(dim=1)) and set(seen) == {"l0", "complexity", "norm"}


def test_stored_zeros_are_not_concepts():
    source = synthetic()
    _, z, c = heldout_truth(source, 100)
    everything = Codes(z.flatten(), Pattern(torch.arange(30).repeat(100), torch.arange(0, 3001, 30), 30), (100, 30))
    assert torch.equal(observed(Given(everything), source, 100)[0], c)


def test_observed_is_measured_in_eval_mode_and_changes_nothing():
    class Dropping(nn.Module):
        def __init__(self): super().__init__(); self.drop, self.lin = nn.Dropout(.5), nn.Linear(16, 40)
        def reconstruct(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return x, Codes.from_dense(torch.relu(self.drop(self.lin(x))))
    sae, source, before = Dropping().train(), synthetic(), torch.get_rng_state()
    a, b = observed(sae, source, 150), observed(sae, source, 150, 7)
    assert sae.training and sae.drop.training and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(before, torch.get_rng_state())


def test_adaptivity_metric(text):
    source, sae = synthetic(block_size=1000), make_sae("relu", 16, 60)
    r = evaluate(sae, source, n=10, metrics="adaptivity")
    seen = observations(sae, source, 8192)
    assert len(seen["l0"]) == 8192 and set(r) == {"rho", "rho_given_norm", "l0_slope"}
    assert r["rho"] == spearman(seen["l0"], seen["complexity"]) and r["l0_slope"] == l0_slope(seen["l0"], seen["complexity"])
    assert r["rho_given_norm"] == partial_spearman(seen["l0"], seen["complexity"], seen["norm"])
    t = text(skip_first=3)
    assert graded_size(t, 5) == 5*13 and graded_size(text(), 5) == 5*15 and graded_size(source, 5) == 8192
    assert -1 <= evaluate(make_sae("relu", t.d_in, 60), t, n=50, n_sequences=4)["rho"] <= 1
    fixed = evaluate(make_sae("topk", 16, 60, k=3), source, n=10, metrics=["rho", "l0_slope", "l0_std"])
    assert math.isnan(fixed["rho"]) and fixed["l0_slope"] == fixed["l0_std"] == 0


def test_tables_have_the_columns():
    table = metrics_table(make_sae("relu", 16, 60), synthetic(block_size=1000), n=500, mean=torch.zeros(16))
    columns = ["rho", "rho_given_norm", "l0_slope", "support_precision", "support_recall", "mmcs"]
    assert list(table.columns[-6:]) == columns and table.loc[["mean", "zero"], "rho"].isna().all() and table.loc[["mean", "zero"], columns[3:]].isna().all().all()
    assert table.loc["sae", columns[3:]].notna().all() and table.attrs["direction"]["rho"] == table.attrs["direction"]["mmcs"] == "higher"
    known = available_metrics()
    assert known["adaptivity"].default and known["recovery"].default


# Recovery ---------------------------------------------------------------------------------------------------------------------------------

def cos(a, b): return float(a @ b/(np.linalg.norm(a)*np.linalg.norm(b))) if a.any() and b.any() else 0.


@few
@given(seeds, st.integers(1, 20), st.integers(1, 9), st.integers(1, 6), st.integers(1, 25))
def test_mmcs_against_loops(seed, M, F, d, chunk):
    W, f = torch.randn(M, d, generator=rng(seed)), torch.randn(F, d, generator=rng(seed + 1))
    W[M//2] = 0
    expected = np.mean([max(cos(a, b) for b in W.double().numpy()) for a in f.double().numpy()])
    assert close(mean_max_cosine(W, f, chunk), expected, rel=1e-9, abs=1e-12)
    scaled = W.double()*torch.logspace(-20, 20, M).double()[:, None]
    assert close(mean_max_cosine(scaled, f, chunk), expected, rel=1e-9, abs=1e-12) and close(mean_max_cosine(torch.cat([W, f]), f, chunk), 1, rel=1e-6)


def test_mmcs_edges():
    f = torch.eye(4)
    assert mean_max_cosine(-f, f[:1]) == 0 and mean_max_cosine(-f[:1], f[:1]) == -1 and mean_max_cosine(torch.zeros(3, 4), f) == 0
    assert math.isnan(mean_max_cosine(torch.full((2, 4), math.nan), f)) and close(mean_max_cosine(f.bfloat16(), f.double()), 1)
    for W in (torch.zeros(3), torch.zeros(3, 5), torch.zeros(0, 4)):
        with pytest.raises(ValueError): mean_max_cosine(W, f)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_matching_is_the_best_of_all(seed, M, F, d):
    W, f = torch.randn(M, d, generator=rng(seed)), torch.randn(F, d, generator=rng(seed + 1))
    if seed % 3 == 0: W[0] = 0
    match, c = match_features(W, f), cosines(f, W).numpy()
    taken = match[match >= 0].tolist()
    assert match.shape == (F,) and match.dtype == torch.int64 and len(set(taken)) == len(taken) and all(-1 <= j < M for j in match.tolist())
    assert all(c[i, j] > 0 for i, j in enumerate(match.tolist()) if j >= 0)
    slots = [*range(M), *[-1]*F]                                                        # any concept once, or none
    best = max(sum(c[i, j] for i, j in enumerate(p) if j >= 0) for p in set(itertools.permutations(slots, F)))
    assert close(sum(c[i, j] for i, j in enumerate(match.tolist()) if j >= 0), best, abs=1e-12)


def test_matching_finds_a_permutation():
    f, order = nn.functional.normalize(torch.randn(40, 20), dim=1), torch.randperm(40)
    W = torch.cat([torch.zeros(5, 20), f[order]*torch.rand(40, 1).add(.1), torch.randn(9, 20)])
    assert torch.equal(match_features(W, f)[order], torch.arange(5, 45)) and torch.equal(match_features(W.half(), f)[order], torch.arange(5, 45))
    assert (match_features(-f[:1], f[:1]) == -1).all() and (match_features(torch.zeros(3, 20), f) == -1).all() and (match_features(f[:7], f) == -1).sum() >= 33
    with pytest.raises(ValueError, match="diverge"): match_features(torch.full((3, 20), math.nan), f)
    with pytest.raises(ValueError, match="same d_in"): match_features(torch.randn(3, 19), f)


def dense_support(z, t, match):
    on, true = z != 0, t != 0
    said = torch.stack([on[:, j] if j >= 0 else torch.zeros(len(z), dtype=torch.bool) for j in match.tolist()], 1)
    hits, nan = (said & true).sum().item(), math.nan
    return hits/on.sum().item() if on.any() else nan, hits/true.sum().item() if true.any() else nan


def stored(z, share, seed):
    "Codes of `z` with some stored zeros and the entries of each row in any order."
    mask = (z != 0) | (torch.rand(z.shape, generator=rng(seed)) < share)
    rows, cols = mask.nonzero().T
    order = torch.argsort(rows + .9*torch.rand(len(rows), generator=rng(seed + 1)).double())
    return Codes(z[rows[order], cols[order]], Pattern(cols[order], counts_to_offsets(mask.sum(1)), z.shape[1]), z.shape)


@few
@given(seeds, st.integers(1, 30), st.integers(1, 15), st.integers(1, 10), st.floats(0, .6), st.integers(1, 9))
def test_support_against_a_dense_reference(seed, n, M, F, density, batch):
    g = rng(seed)
    z, t = (torch.randn(n, m, generator=g)*(torch.rand(n, m, generator=g) < density) for m in (M, F))
    match = torch.cat([torch.randperm(M, generator=g)[:F], torch.full((max(0, F - M),), -1)])[torch.randperm(F, generator=g)]
    match[torch.rand(F, generator=g) < .2] = -1
    expected = dense_support(z, t, match)
    for codes, truth in ((Codes.from_dense(z), Codes.from_dense(t)), (stored(z, .2, seed), stored(t, .2, seed + 5))):
        got = support_scores(codes, truth, match)
        assert close(got[0], expected[0]) and close(got[1], expected[1])
        parts = sum(support_counts(take_rows(codes, r), take_rows(truth, r), match) for r in torch.arange(n).split(batch))
        assert torch.equal(parts, support_counts(codes, truth, match)) and parts.dtype == torch.int64
        assert support_scores(codes.with_values(-3*codes.values.double()), truth, match) == pytest.approx(got, nan_ok=True)


def test_support_edges():
    z, none = Codes.from_dense(torch.eye(4)), Codes.from_dense(torch.zeros(4, 4))
    everyone, nobody = torch.arange(4), torch.full((4,), -1)
    assert support_scores(z, z, everyone) == (1, 1) and support_scores(z, z, nobody) == (0, 0) and support_scores(z, z, everyone.flip(0)) == (0, 0)
    p, r = support_scores(none, z, everyone); assert math.isnan(p) and r == 0
    p, r = support_scores(z, none, everyone); assert p == 0 and math.isnan(r)
    empty = Codes.from_dense(torch.zeros(0, 4))
    assert support_counts(empty, empty, everyone).tolist() == [0, 0, 0]
    for args in ((z, none, everyone[:3]), (z, empty, everyone), (z, z, everyone + 1)):
        with pytest.raises(ValueError, match="do not fit"): support_counts(*args)
    leading = Codes.from_dense(torch.eye(4).view(2, 2, 4))
    assert support_scores(leading, z, everyone) == (1, 1)


def test_recovery_metric():
    source = synthetic(block_size=3000)
    _, z, _ = heldout_truth(source, 8192)
    order = torch.randperm(50)
    W, codes = torch.cat([source.features*3, torch.zeros(20, 16)])[order], torch.cat([z, torch.zeros(8192, 20)], 1)[:, order]
    assert Recovery().measure(Given(Codes.from_dense(codes), W), source) == pytest.approx(dict(support_precision=1, support_recall=1, mmcs=1), abs=1e-6)
    chance = Recovery().measure(Given(Codes.from_dense(codes[torch.randperm(8192)][:, torch.randperm(50)]), torch.randn(50, 16)), source)
    assert chance["support_precision"] < .3 and chance["support_recall"] < .3 and chance["mmcs"] < .8
    assert all(math.isnan(v) for v in Recovery().measure(Given(Codes.from_dense(codes), W*math.nan), source).values())
    sae = make_sae("relu", 16, 40).train()
    r = evaluate(sae, source, n=10, metrics="recovery")
    assert sae.training and set(r) == {"support_precision", "support_recall", "mmcs"} and all(0 <= v <= 1 for v in r.values())
    assert evaluate(sae, source, n=10, metrics="mmcs") == {"mmcs": mean_max_cosine(sae.W_dec, source.features)}


def test_recovery_needs_a_truth(tmp_path):
    source = synthetic()
    store = StoreSource(ActivationStore.build(source, tmp_path/"store", n=300, shard_size=70, progress=False), source=source, **CPU)
    sae = make_sae("topk", 16, 30, k=2)
    for s in (store, make_source(torch.randn(40, 16), name="plain vectors"), object()):
        with pytest.raises(NotApplicable, match="does not know the true features"): Recovery().measure(sae, s)
    for s in (ZeroPredictor(), MeanPredictor(torch.zeros(16))):
        with pytest.raises(NotApplicable, match="no dictionary"): Recovery().measure(s, source)


def test_true_batches_are_the_heldout_samples():
    source = synthetic()
    for n, batch_size in ((250, 33), (100, 100), (1, 5), (101, 1000)):
        out = list(true_batches(source, n, batch_size))
        x, z, _ = heldout_truth(source, n)
        assert torch.equal(torch.cat([a for a, _ in out]), x) and torch.equal(torch.cat([b.to_dense() for _, b in out]), z) and all(len(a) <= batch_size for a, _ in out)


# On a GPU ---------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.cuda
def test_gpu_gives_the_same_numbers(text):
    torch.manual_seed(0)
    a = make_sae("relu", 16, 60)
    names = ["adaptivity", "recovery"]
    x, y = evaluate(a, synthetic(block_size=1000), metrics=names), evaluate(a.cuda(), synthetic(block_size=1000, device="cuda"), metrics=names)
    assert x == pytest.approx(y, abs=5e-3)
    t = text(device="cuda")
    try:
        x, c = graded(t, 100)
        assert x.is_cuda and c.is_cuda and -1 <= evaluate(make_sae("relu", t.d_in, 60).cuda(), t, n=50, n_sequences=4)["rho"] <= 1
    finally: t.model.cpu()
