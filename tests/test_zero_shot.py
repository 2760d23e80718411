"""Zero-shot classification: counts and masks against brute force, what the settings must equal, what must not matter, and who is told the label."""
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from sparsemax_sae import make_sae
from sparsemax_sae.activations.source import make_source
from sparsemax_sae.metrics.evaluate import MeanPredictor, ZeroPredictor, evaluate
from sparsemax_sae.metrics.reconstruction import NotApplicable
from sparsemax_sae.metrics.zero_shot import (Outcome, ZeroShotAccuracy, ZeroShotFiring, class_counts, concept_ranks, count_concepts, entry_ranks, keep_where, labelled_sources, splices, tally, top_concepts,
                                             zero_shot, zero_shot_all, zero_shot_loop, zero_shot_table)
from sparsemax_sae.ops.codes import Codes, Pattern, counts_to_offsets

pytestmark = pytest.mark.usefixtures("one_thread")
D, TOKENS, CLASSES = 16, 6, 5


@dataclass
class Loaded: images: torch.Tensor; labels: torch.Tensor; indices: torch.Tensor


class Pictures:
    "Images that are their own tokens (n, TOKENS, D): a direction of their class, and noise. Classes of very different size; every seventh label is unknown."
    templates = ["a {}"]
    def __init__(self, name="toy", seed=0, n=90, classes=CLASSES, noise=1., unknown=True):
        g = torch.Generator().manual_seed(seed)
        self.name, self.classes, self.parts, self.loads = name, [f"class {c}" for c in range(classes)], [name], []
        self.directions = F.normalize(torch.randn(classes, D, generator=g), dim=1)
        self.sizes, self.labels, self.images = dict(train=0, count=n, test=n + 7), {}, {}
        for split, m in self.sizes.items():
            y = (torch.rand(m, generator=g)**2*classes).long()
            y[:classes] = torch.arange(classes)[:m]
            self.images[split] = 3*self.directions[y][:, None] + noise*torch.randn(m, TOKENS, D, generator=g)
            self.labels[split] = torch.where(torch.arange(m) % 7 == 6, -1, y) if unknown else y
    def size(self, split): return self.sizes[split]
    def sample(self, split, n): return torch.randperm(self.sizes[split], generator=torch.Generator().manual_seed(5))[:n]
    def load(self, split, indices):
        i = torch.as_tensor(indices)
        self.loads.append((split, i))
        return Loaded(self.images[split][i], self.labels[split][i], i)


class Mixture:
    name, classes, parts = "mixture", [], ["a", "b"]


class Source:
    "A model of two layers around the hook; `tokens` as in `ImageSource`."
    d_in, has_text, device = D, True, "cpu"
    def __init__(self, data=None, tokens="all"):
        g = torch.Generator().manual_seed(9)
        self.data, self.tokens, self.name, self.n_tokens = data or Pictures(), tokens, f"toy/{tokens}", dict(all=TOKENS, cls=1, patches=TOKENS - 1)[tokens]
        self.A, self.B = torch.randn(D, D, generator=g)/4, torch.randn(D, D, generator=g)/4
    def with_data(self, data): return Source(Pictures(data, seed=len(data)) if isinstance(data, str) else data, self.tokens)
    def pixels(self, images): return images
    def residual(self, pixels): return pixels + .3*torch.tanh(pixels @ self.A)
    def given(self, x): return dict(all=x, cls=x[:, :1], patches=x[:, 1:])[self.tokens]
    def merge(self, x, y): return dict(all=y, cls=torch.cat([y, x[:, 1:]], 1), patches=torch.cat([x[:, :1], y], 1))[self.tokens] if self.tokens != "all" else y
    def finish(self, x): return F.normalize(torch.tanh(x @ self.B).mean(1) + .3*x[:, 0], dim=-1)
    def embeddings(self, images, edit=None):
        x = self.residual(self.pixels(images))
        return self.finish(x if edit is None else self.merge(x, edit(self.given(x))))
    def prototypes(self, classes, templates): return self.finish(self.residual(3*self.data.directions[:, None].expand(-1, TOKENS, -1)))


class Identity:
    "Reconstructs exactly: the coordinates are the codes."
    d_sae = D
    def encode(self, x): return Codes.from_dense(x)
    def decode(self, codes, like=None): return codes.to_dense()
    def reconstruct(self, x): return x, Codes.from_dense(x)


def make(name="topk", d_sae=40, seed=0, **options):
    torch.manual_seed(seed)
    return make_sae(name, D, d_sae, **options or (dict(k=5) if "topk" in name else {}))


ARCHS = dict(topk=make(), relu=make("relu"), sparsemax=make("sparsemax"), release=make("sparsemax_release", seed=2), identity=Identity())
few = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def scenes(): return make_source("scenes", device="cpu")


def predictions(result, dataset="toy"): return result[dataset].predictions


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def sparse(z):
    flat = z.reshape(-1, z.shape[-1])
    return Codes(z[z != 0], Pattern(flat.nonzero()[:, 1], counts_to_offsets((flat != 0).sum(1)), z.shape[-1]), z.shape)


# Counting

@given(st.integers(0, 10_000), st.booleans())
@few
def test_counts_are_what_a_dense_matrix_says(seed, as_sparse):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(7, 3, 11, generator=g).mul(4).round().div(10) * (torch.rand(7, 3, 11, generator=g) < .5)     # many values of exactly .2
    y, counts = torch.randint(4, (7,), generator=g), torch.zeros(4, 11, dtype=torch.long)
    tally(counts, sparse(z) if as_sparse else Codes.from_dense(z), y, .2)
    assert torch.equal(counts, torch.stack([(z[y == c] > .2).sum((0, 1)) for c in range(4)]))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
def test_class_counts(arch, tokens):
    source, sae = Source(tokens=tokens), ARCHS[arch]
    with torch.no_grad(): z = sae.encode(source.given(source.residual(source.data.images["count"]))).to_dense()
    y = source.data.labels["count"]
    for threshold in (0, .2, .7):
        counts = class_counts(sae, source, threshold=threshold, batch_size=13)
        assert counts.dtype == torch.int64 and torch.equal(counts, torch.stack([(z[y == c] > threshold).sum((0, 1)) for c in range(CLASSES)]))
    assert torch.equal(counts, class_counts(sae, source, threshold=.7, batch_size=90))


def test_counts_of_a_split_and_of_several():
    source = Source()
    both = count_concepts(dict(a=ARCHS["topk"], b=ARCHS["sparsemax"]), source, "test", batch_size=31)
    assert torch.equal(both["a"], class_counts(ARCHS["topk"], source, "test")) and torch.equal(both["b"], class_counts(ARCHS["sparsemax"], source, "test"))
    assert not torch.equal(both["a"], class_counts(ARCHS["topk"], source, "count"))


def test_few_counting_images_still_cover_the_classes():
    source, sae = Source(), Identity()
    y = source.data.labels["count"]
    order = source.data.sample("count", 90)
    for n in (1, 3, 20, 90):
        taken = set(order[:n].tolist()) | {next(i for i in order.tolist() if y[i] == c) for c in range(CLASSES) if not (y[order[:n]] == c).any()}
        x = source.residual(source.data.images["count"])
        expected = torch.stack([(x[[i for i in taken if y[i] == c]] > .2).sum((0, 1)) for c in range(CLASSES)])
        for batch_size in (1, 8, 64): assert torch.equal(class_counts(sae, source, n=n, batch_size=batch_size), expected)


def test_a_class_without_a_counting_image():
    data = Pictures()
    data.labels["count"][data.labels["count"] == 3] = 0
    with pytest.raises(ValueError, match="no image of 'class 3' to count"): class_counts(Identity(), Source(data))
    with pytest.raises(ValueError, match="'toy' has no image of 'class 3'"): zero_shot(Identity(), Source(data), n=(1,))
    zero_shot(Identity(), Source(data), n=(1,), same_split=True)
    with pytest.raises(ValueError, match="no image of"): zero_shot(Identity(), Source(Pictures()), n=(1,), same_split=True, n_test=1)


# Ranks and masks

@given(st.integers(0, 10_000), st.integers(1, 12))
@few
def test_ranks(seed, m):
    counts = torch.randint(4, (3, m), generator=torch.Generator().manual_seed(seed))
    ranks, top = concept_ranks(counts), top_concepts(counts, m)
    for c in range(3):
        order = sorted((j for j in range(m) if counts[c, j]), key=lambda j: (-counts[c, j], j))
        assert top[c].tolist() == order + [-1]*(m - len(order))
        assert ranks[c].tolist() == [order.index(j) if j in order else m for j in range(m)]
    for n in range(m + 1): assert torch.equal(top_concepts(counts, n), top[:, :n])


@pytest.mark.parametrize("arch", ARCHS)
def test_masks_are_complements_entry_by_entry(arch):
    source, sae = Source(), ARCHS[arch]
    with torch.no_grad(): codes = sae.encode(source.residual(source.data.images["test"][:20]))
    ranks, y = concept_ranks(class_counts(sae, source)), torch.arange(20) % CLASSES
    for codes in (codes, sparse(codes.to_dense())):
        place = entry_ranks(codes, ranks, y)
        for n in (0, 1, 3, codes.d_sae):
            on, off, mask = keep_where(codes, place < n), keep_where(codes, place >= n), (ranks < n)[y][:, None]
            assert torch.equal(on.to_dense(), codes.to_dense()*mask) and torch.equal(off.to_dense(), codes.to_dense()*~mask)
            assert len(on.values) + len(off.values) == len(codes.values) and torch.equal(on.to_dense() + off.to_dense(), codes.to_dense())


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_spliced(arch):
    source, sae = Source(), ARCHS[arch]
    x, ranks, y = source.residual(source.data.images["test"][:20]), concept_ranks(class_counts(sae, source)), torch.arange(20) % CLASSES
    with torch.no_grad():
        made = dict(splices(sae, x, y, ranks, n=(0, 4), off=(0, 4)))
        z = sae.encode(x).to_dense()
        torch.testing.assert_close(made["on_all"], sae.reconstruct(x)[0])
        torch.testing.assert_close(made["on_0"], sae.decode(Codes.from_dense(torch.zeros_like(z)), like=x))
        torch.testing.assert_close(made["on_4"], sae.decode(Codes.from_dense(z*(ranks < 4)[y][:, None]), like=x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made["off_0"], made["on_all"])
        torch.testing.assert_close(made["on_4"] + made["off_4"] - made["on_0"], made["on_all"], rtol=1e-4, atol=1e-5)     # decoding is affine


# Accuracies

@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
def test_as_the_straightforward_loop(arch, tokens):
    source, sae = Source(tokens=tokens), ARCHS[arch]
    ours, loop = zero_shot(sae, source, n=(1, 3, 10), batch_size=32)["toy"].accuracy(), zero_shot_loop(sae, source, n=(1, 3, 10))
    assert ours.to_dict() == pytest.approx(loop[ours.index].to_dict())
    assert len(set(ours)) > (2 if tokens != "cls" else 1)


def test_the_identity_changes_nothing():
    for oracle in (True, False):
        p = predictions(zero_shot(Identity(), Source(), n=(D,), oracle=oracle))
        assert torch.equal(p["on_all"], p["no_sae"])
    accuracy = zero_shot(Identity(), Source(), n=(1,))["toy"].accuracy()
    assert accuracy["on_all"] == accuracy["no_sae"] > accuracy["on_1"]


def test_settings_that_coincide():
    p = predictions(zero_shot(ARCHS["topk"], Source(), n=(0, 1, 5), off=(0, 5, 40), threshold=0))
    assert list(p) == ["no_sae", "on_0", "on_1", "on_5", "on_all", "off_0", "off_5", "off_40"]
    assert torch.equal(p["off_0"], p["on_all"]) and p["on_0"].unique().numel() == 1
    a, b = (zero_shot(ARCHS["topk"], Source(), n=n)["toy"].accuracy() for n in ([5, 5, 1], (1, 5)))
    assert a.to_dict() == b.to_dict()


def test_macro_and_micro():
    o = zero_shot(ARCHS["topk"], Source(), n=(3,))["toy"]
    y, p = o.labels, o.predictions["on_3"]
    by_class = [(p[y == c] == c).double().mean().item() for c in range(CLASSES)]
    assert o.per_class()["on_3"].tolist() == pytest.approx(by_class)
    assert o.accuracy()["on_3"] == pytest.approx(sum(by_class)/CLASSES) and o.accuracy("micro")["on_3"] == pytest.approx((p == y).double().mean().item())
    assert o.accuracy()["on_3"] != o.accuracy("micro")["on_3"]
    absent = Outcome(["a", "b"], torch.arange(3), torch.zeros(3, dtype=torch.long), dict(no_sae=torch.tensor([0, 0, 1])))
    assert absent.accuracy()["no_sae"] == pytest.approx(2/3) and absent.per_class()["no_sae"].isna().tolist() == [False, True]
    with pytest.raises(ValueError, match="'macro'"): o.accuracy("weighted")


def test_several_at_once_and_the_batch_size():
    source, how = Source(), dict(n=(1, 4), off=(2,))
    saes = dict(ARCHS, zero=ZeroPredictor(), mean=MeanPredictor(torch.ones(D)))
    together = zero_shot_all(saes, source, batch_size=97, **how)
    for name, sae in saes.items():
        assert same(predictions(together[name]), predictions(zero_shot(sae, source, batch_size=10, **how)))
        assert same(predictions(together[name]), predictions(zero_shot_all({name: sae}, source, batch_size=3, **how)[name]))
    assert list(predictions(together["zero"])) == list(predictions(together["mean"])) == ["no_sae", "on_all"]
    t = zero_shot_table(together)
    assert t.index.names == ["dataset", "arch"] and t.index.get_level_values("arch").tolist() == list(saes) and t.loc[("toy", "zero")].isna().sum() == 3


@pytest.mark.parametrize("oracle", [True, False])
def test_who_is_told_the_label(oracle):
    data, other = Pictures(unknown=False), Pictures(unknown=False)
    other.labels["test"] = other.labels["test"][torch.randperm(len(other.labels["test"]), generator=torch.Generator().manual_seed(0))]
    a, b = (zero_shot(ARCHS["topk"], Source(d), n=(1, 5), off=(1,), oracle=oracle)["toy"] for d in (data, other))
    assert torch.equal(a.indices, b.indices) and not torch.equal(a.labels, b.labels)
    assert same(a.predictions, b.predictions) is not oracle
    assert torch.equal(a.predictions["no_sae"], b.predictions["no_sae"]) and torch.equal(a.predictions["on_all"], b.predictions["on_all"])


def test_own_mask_is_the_oracle_where_clip_is_right():
    source = Source(Pictures(noise=2.5))
    told, own = (zero_shot(ARCHS["topk"], source, n=(1, 5), oracle=o)["toy"] for o in (True, False))
    right = told.predictions["no_sae"] == told.labels
    assert 0 < right.sum() < len(right)
    for k in ("on_1", "on_5"): assert torch.equal(told.predictions[k][right], own.predictions[k][right])


def test_images_to_count_on_are_not_those_to_test_on():
    data = Pictures()
    seen = lambda split: sorted({i for s, ii in data.loads if s == split for i in ii.tolist()})
    zero_shot(Identity(), Source(data), n=(1,), n_count=40, n_test=30)
    assert {s for s, _ in data.loads} == {"count", "test"} and seen("test") == sorted(data.sample("test", 30).tolist())
    assert set(data.sample("count", 40).tolist()) <= set(seen("count"))
    data.loads.clear()
    o = zero_shot(ARCHS["topk"], Source(data), n=(1, 3), same_split=True, n_test=60)["toy"]
    assert {s for s, _ in data.loads} == {"test"} and seen("test") == sorted(data.sample("test", 60).tolist())
    assert set(o.indices.tolist()) == {i for i in data.sample("test", 60).tolist() if data.labels["test"][i] >= 0}
    y, z = data.labels["test"], ARCHS["topk"].eval().encode(Source(data).residual(data.images["test"])).to_dense()
    rows = [data.sample("test", 60)[y[data.sample("test", 60)] == c] for c in range(CLASSES)]
    assert o.counted.tolist() == [int(((z[r] > .2).sum((0, 1)) > 0).sum()) for r in rows]


def test_data_sets():
    source = Source(Mixture())
    assert list(labelled_sources(source)) == ["a", "b"] and list(labelled_sources(source, ["b", Pictures("c")])) == ["b", "c"] and list(labelled_sources(Source(), "x")) == ["x"]
    t = zero_shot(Identity(), source, n=(1,)).table()
    assert t.index.tolist() == ["a", "b", "mean"] and t.loc["mean"].tolist() == pytest.approx(t.iloc[:2].mean().tolist())
    one = zero_shot(Identity(), source, n=(1,), data="b").table()
    assert one.index.tolist() == ["b"] and one.loc["b"].tolist() == t.loc["b"].tolist()
    with pytest.raises(ValueError, match="same name"): labelled_sources(source, ["a", "a"])


def test_what_does_not_apply():
    bare, mute = Source(Mixture()), Source()
    bare.data.parts, mute.has_text = [], False
    for source, why in ((make_source(torch.randn(50, D)), "hands out none"), (bare, "no class labels"), (mute, "no text tower")):
        with pytest.raises(NotApplicable, match=why): zero_shot(Identity(), source, n=(1,))
    result = evaluate(make(), make_source(torch.randn(50, D), device="cpu"), n=20)
    assert "image source" in result.omitted["zero_shot"] and "zs_on_1" not in result


@pytest.mark.parametrize("wrong, message", [(dict(n=(41,)), "41 concepts asked for, but 'sae' has only 40"), (dict(n=(1,), off=(50,)), "leave 50 out"), (dict(n=(-1,)), "whole numbers"),
                                            (dict(n=(True,)), "whole numbers"), (dict(n=(1.5,)), "whole numbers"), (dict(n=(1,), threshold=-.1), "at least 0"),
                                            (dict(n=(1,), threshold=float("nan")), "at least 0"), (dict(n=(1,), n_test=0), "n_test=0"), (dict(n=(1,), batch_size=0), "batch_size=0")])
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message): zero_shot(ARCHS["topk"], Source(), **wrong)


def test_modes_and_gradients_are_left_alone():
    sae = make().train()
    sae.scorer.eval()
    o = zero_shot(sae, Source(), n=(1,))
    assert sae.training and not sae.scorer.training and torch.is_grad_enabled() and all(p.grad is None for p in sae.parameters())
    assert same(predictions(o), predictions(zero_shot(sae.eval(), Source(), n=(1,))))
    unlabelled = Pictures()
    unlabelled.labels["test"][:] = -1
    with pytest.raises(ValueError, match="no labelled image to test on"): zero_shot(sae, Source(unlabelled), n=(1,))


# The metric, and real images

def test_metric():
    metric, source = ZeroShotAccuracy(), Source(Mixture())
    got = metric.measure(ARCHS["topk"], source, 30)
    t = zero_shot(ARCHS["topk"], source, n=(1, 5, 10), n_count=30, n_test=30).table()
    assert set(got) == set(metric.direction) and got["zs_on_50"] != got["zs_on_50"]
    assert {k: got[f"zs_{k}"] for k in t} == pytest.approx(t.loc["mean"].to_dict())
    zero = metric.measure(ZeroPredictor(), source, 30)
    assert zero["zs_no_sae"] == got["zs_no_sae"] and zero["zs_on_all"] == zero["zs_on_all"] and zero["zs_on_1"] != zero["zs_on_1"]


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
def test_a_vision_transformer(tokens, scenes):
    source = scenes if tokens == "all" else make_source("scenes", tokens=tokens, device="cpu")
    torch.manual_seed(0)
    sae, how = make_sae("sparsemax", source.d_in, 96), dict(n_count=24, n_test=24, data=["shapes", "backgrounds"])
    result = zero_shot(sae, source, batch_size=9, **how)
    plain = torch.cat([source.embeddings(source.with_data("shapes").data.load("test", i).images, lambda x: sae.eval().reconstruct(x)[0]) for i in result["shapes"].indices.split(8)])
    data = source.with_data("shapes").data
    assert torch.equal(result["shapes"].predictions["on_all"], (plain @ source.prototypes(data.classes, data.templates).T).argmax(1))
    class Exact(Identity): d_sae = source.d_in
    p = predictions(zero_shot(Exact(), source, n=(1,), **how), "shapes")
    assert torch.equal(p["on_all"], p["no_sae"]) and result.table().index.tolist() == ["shapes", "backgrounds", "mean"]


def test_evaluate_on_the_mixture(scenes):
    sae = make_sae("topk", scenes.d_in, 48, k=4)
    got = evaluate(sae, scenes, n_sequences=4, metrics="zero_shot")
    assert 0 <= got["zs_on_10"] <= 1 and got["zs_on_50"] != got["zs_on_50"]
    assert list(labelled_sources(scenes)) == scenes.data.parts and len(scenes.data.parts) == 8
    assert isinstance(zero_shot_table({"sae": zero_shot(sae, scenes, n=(1,), n_count=4, n_test=4, data="counts")}), pd.DataFrame)


@pytest.mark.parametrize("arch", ["topk", "sparsemax", "release"])
def test_the_metric_that_counts_what_fires(arch):
    "Threshold 0, the same numbers as `zero_shot` gives, under names of its own, only by name, and independent of the scale of the codes."
    source, sae = Source(), ARCHS[arch]
    got = ZeroShotFiring().measure(sae, source, 97)
    expected = zero_shot(sae, source, n=(1, 5, 10), threshold=0, n_count=97, n_test=97)["toy"].accuracy()
    assert list(got) == list(ZeroShotFiring.direction) and not ZeroShotFiring.default and not set(got) & set(ZeroShotAccuracy.direction)
    assert {k.removeprefix("zs0_"): v for k, v in got.items() if v == v} == pytest.approx(expected.to_dict())
    plain = ZeroShotAccuracy().measure(sae, source, 97)
    assert plain["zs_no_sae"] == got["zs0_no_sae"] and plain["zs_on_all"] == got["zs0_on_all"]


def test_the_scale_of_the_codes_does_not_matter_to_what_fires():
    class Weak(Identity):
        def encode(self, x): return Codes.from_dense(x/1000)
        def decode(self, codes, like=None): return codes.to_dense()*1000
    source = Source()
    strong, weak = (ZeroShotFiring().measure(sae, source, 97) for sae in (Identity(), Weak()))
    assert weak == pytest.approx(strong, nan_ok=True)
    assert ZeroShotAccuracy().measure(Weak(), source, 97)["zs_on_5"] < weak["zs0_on_5"]
