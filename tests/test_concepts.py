"""Top-activating lists and statistics of concepts against brute force, whatever the batches; and the pictures made from them."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sparsemax_sae.activations.images import ImageSource
from sparsemax_sae.activations.source import make_source
from sparsemax_sae.activations.text import TextSource
from sparsemax_sae.explore import concept_pictures as pictures
from sparsemax_sae.explore.concepts import (KINDS, Best, Collector, Entries, best, collect, concept_context, entropies, has_cls, heat_map, image_concepts, kinds_of,
                                            load_concepts, passes, patch_box, pieces, run_concepts, save_concepts, text_concepts, top_concepts_of, upsampled)
from sparsemax_sae.ops.codes import Codes, pattern_of
from sparsemax_sae.saes.base import make_sae
from sparsemax_sae.training.config import make_config
from sparsemax_sae.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


def sparse(z, stored_zeros=False):
    "The matrix z (…, M) as sparse codes, on request with zeros among the stored entries."
    flat = z.reshape(-1, z.shape[-1])
    mask = (flat != 0) | (torch.rand(flat.shape) < .1 if stored_zeros else False)
    return Codes(flat[mask], pattern_of(mask), tuple(z.shape))


def made_up(seed, B=23, T=5, M=11, share=.3):
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(B, T, M, generator=g)*2).round()/2 * (torch.rand(B, T, M, generator=g) < share)
    z[..., 4] = 0
    return z


def brute(z, kind, concept, k, order):
    "The k strongest (value, item, position), by sorting everything; `order` is that of the items in the stream."
    found = []
    for place, i in enumerate(order.tolist()):
        active = [(-z[i, t, concept].item(), t) for t in range(z.shape[1]) if z[i, t, concept] != 0]
        if kind == "cls": active = [(v, t) for v, t in active if t == 0]
        if kind == "patch": active = [(v, t) for v, t in active if t > 0]
        if kind in ("item", "patch"): active = sorted(active)[:1]
        found += [(v, place, t, i) for v, t in active]
    return [(-v, i, t) for v, _, t, i in sorted(found)[:k]]


def rows(top): return list(zip(*map(torch.Tensor.tolist, top)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([1, 3, 200]), st.booleans(), st.booleans())
def test_lists_are_exact_for_any_batching(seed, batch, k, dense, zeros):
    "Ties, negative codes, stored zeros, dead concepts, k beyond what there is."
    z, order = made_up(seed), torch.randperm(23, generator=torch.Generator().manual_seed(seed))
    c = Collector(11, k, KINDS)
    for part in order.split(batch): c.update(Codes.from_dense(z[part]) if dense else sparse(z[part], zeros), part)
    found = c.concepts()
    for kind in KINDS:
        for j in range(11): assert rows(found.top(j, kind)) == brute(z, kind, j, k, order), (kind, j)
    assert found.stats.density[4] == 0 and math.isnan(found.stats["max"][4])


def test_the_best_of_groups_are_the_best_of_groups():
    g = torch.Generator().manual_seed(0)
    groups, values = torch.randint(0, 9, (500,), generator=g), torch.randint(-4, 4, (500,), generator=g).float()
    for k in (1, 7, 1000):
        expected = [i for c in range(9) for i in sorted((groups == c).nonzero()[:, 0].tolist(), key=lambda i: (-values[i].item(), i))[:k]]
        assert best(groups, values, k).tolist() == expected


def test_memory_is_bounded_by_concepts_times_k():
    b, g = Best(50, 3), torch.Generator().manual_seed(0)
    for i in range(40):
        b.update(Entries(torch.randint(0, 50, (1000,), generator=g), torch.randn(1000, generator=g), torch.full((1000,), i), torch.arange(1000)))
        assert len(b.kept.values) <= 150
    assert (b.floor > 1).all()   # nearly all of what comes is dropped before it is sorted


def test_statistics_are_their_definitions():
    z, labels = made_up(3), torch.arange(23) % 3 - 1
    c = Collector(11, 2, KINDS, n_classes=2)
    for part in torch.arange(23).split(4): c.update(sparse(z[part]), part, labels[part])
    s, on = c.concepts(classes=["a", "b"]).stats, z != 0
    live = torch.arange(11) != 4
    same = lambda column, expected: np.testing.assert_allclose(s[column].to_numpy()[live], expected.double().numpy()[live], rtol=1e-6, equal_nan=True)
    same("density", on.double().mean((0, 1))); same("item_density", on.any(1).double().mean(0)); same("cls_density", on[:, 0].double().mean(0))
    same("mean", z.double().sum((0, 1))/on.sum((0, 1))); same("max", torch.where(on, z, -torch.inf).amax((0, 1)))
    n = torch.stack([on.any(1)[labels == c].sum(0) for c in range(2)], 1).double()
    p = n/n.sum(1, keepdim=True)
    same("entropy", -(p*p.log().nan_to_num(0, 0, 0)).sum(1)); same("entropy_normalised", -(p*p.log().nan_to_num(0, 0, 0)).sum(1)/math.log(2))
    same("top_class", n.argmax(1)); same("top_class_share", p.amax(1))
    assert s.top_class[4] == -1 and np.isnan(s.entropy[4])


def test_one_class_has_no_entropy():
    c = Collector(3, 1, n_classes=1)
    c.update(Codes.from_dense(torch.ones(4, 2, 3)), torch.arange(4), torch.zeros(4, dtype=torch.long))
    assert (c.concepts(classes=["only"]).stats.entropy_normalised == 0).all()
    assert entropies(torch.tensor([[0, 0]])).isnan().all()


def test_nothing_was_seen():
    c = Collector(5, 2).concepts()
    assert (c.items == -1).all() and c.values.isnan().all() and (c.stats.density == 0).all() and c.facts["n_items"] == 0


@pytest.fixture(scope="module")
def scenes(): return make_source("scenes")


@pytest.fixture(scope="module")
def sae(scenes):
    torch.manual_seed(0)
    return make_sae("sparsemax_release", scenes.d_in, 96, scale=12.).eval()


@pytest.fixture(scope="module")
def found(scenes, sae): return collect(sae, scenes, n=90, k=4)


def test_images_by_brute_force(scenes, sae, found):
    order = scenes.data.sample("test", 90)
    z = torch.cat([sae.encode(x).to_dense() for _, x in scenes.run("test", order)]).detach()
    place = {int(i): n for n, i in enumerate(order)}
    for j in range(0, 96, 5):
        for kind, active in dict(item=z, cls=z[:, :1], patch=z[:, 1:]).items():
            largest = torch.where(active != 0, active, -torch.inf).amax(1)[:, j]
            expected = largest[largest.isfinite()].sort(descending=True).values[:4]
            top = found.top(j, kind)
            torch.testing.assert_close(top.values, expected, rtol=1e-4, atol=1e-5)
            for v, i, t in rows(top): assert z[place[i], t, j] == pytest.approx(v, rel=1e-4, abs=1e-5)
    assert found.facts["n_tokens"] == 90*65 and found.facts["split"] == "test"


def test_batches_and_splits(scenes, sae, found):
    again = collect(sae, scenes, n=90, k=4, batch_size=7)
    torch.testing.assert_close(again.values, found.values, equal_nan=True, rtol=1e-4, atol=1e-5)
    other = collect(sae, scenes, n=20, k=2, split="train", kinds=["item"])
    assert list(other.tops) == ["item"] and other.facts["split"] == "train"
    with pytest.raises(ValueError, match="tests?"): collect(sae, scenes, n=5, split="tset")
    with pytest.raises(ValueError, match="whole number"): collect(sae, scenes, n=0)


@pytest.mark.parametrize("tokens, kinds", [("cls", ("item", "token")), ("patches", ("item", "token")), ("all", tuple(KINDS))])
def test_kinds_by_tokens(scenes, sae, tokens, kinds):
    source = ImageSource("shapes", tokens=tokens)
    assert kinds_of(source) == kinds and has_cls(source) == (tokens == "all")
    c = collect(sae, source, n=12, k=2)
    assert c.positions.max() < source.n_tokens and c.facts["classes"] == source.data.classes
    assert 0 < c.stats.top_class_share.max() <= 1 and set(c.stats.top_class) <= set(range(-1, len(source.data.classes)))
    if tokens != "cls": assert heat_map(image_concepts(sae, source, source.data.image("test", 0)), 0, source.grid).shape == (8, 8)
    else:
        with pytest.raises(ValueError, match="no grid"): heat_map(image_concepts(sae, source, source.data.image("test", 0)), 0, source.grid)
    if tokens != "all":
        with pytest.raises(ValueError, match="CLS token"): collect(sae, source, n=3, kinds="patch")


def test_to_disk_and_back(tmp_path, found):
    back = load_concepts(save_concepts(found, tmp_path/"deep"/"folder"))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for kind in KINDS for a, b in zip(back.tops[kind], found.tops[kind]))
    pd.testing.assert_frame_equal(back.stats, found.stats)
    assert back.facts == json.loads(json.dumps(found.facts)) and repr(back) == repr(found)
    save_concepts(found, tmp_path/"deep"/"folder")   # a second time, over the first
    (tmp_path/"deep"/"folder"/"concepts.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"): load_concepts(tmp_path/"deep"/"folder")
    with pytest.raises(FileNotFoundError, match="save_concepts"): load_concepts(tmp_path)


def test_the_concepts_of_a_run_are_collected_once(monkeypatch):
    config = make_config("topk", "smoke", dataset="synthetic", data_options=dict(n_features=32, d_in=16), d_sae=64, steps=4, options=dict(k=4))
    source = make_source("synthetic", n_features=32, d_in=16)
    run = train(config, source, progress=False)
    first = run_concepts(run, source, n=200, k=3)
    from sparsemax_sae.explore import concepts as module
    monkeypatch.setattr(module, "collect", lambda *a, **k: pytest.fail("collected again"))
    assert torch.equal(run_concepts(run, source, n=200, k=3).items, first.items)
    monkeypatch.undo()
    assert run_concepts(run, source, n=100, k=3).facts["n_items"] == 100


def test_an_sae_in_training_mode_stays_there(scenes, sae):
    sae.train()
    collect(sae, scenes, n=4, k=1); image_concepts(sae, scenes, scenes.data.image("test", 0))
    assert sae.training
    sae.eval()


TEXTS = [f"The mean of array number {i} is the sum of its elements. " * 12 for i in range(60)]


@pytest.mark.parametrize("skip", [0, 3])
def test_contexts_are_where_the_concept_fires(skip):
    source = TextSource(TEXTS, seq_len=32, skip_first=skip, heldout=.5)
    torch.manual_seed(0)
    sae = make_sae("topk", source.d_in, 40, k=4, normalize="standardize").eval()
    c = collect(sae, source, n=20, k=3, batch_size=6)
    tokens = torch.cat(list(source.heldout_tokens(20)))
    z = sae.encode(source.activations(tokens)).to_dense().detach()
    for j in range(0, 40, 3):
        top = c.top(j, "token")
        torch.testing.assert_close(top.values, z[..., j][z[..., j] != 0].sort(descending=True).values[:3], rtol=1e-4, atol=1e-5)
        for context, (v, i, p) in zip(concept_context(c, source, j, 3, width=4), rows(top)):
            assert z[i, p - skip, j] == pytest.approx(v, rel=1e-4)
            assert context.pieces[context.at].strip() in source.tokenizer.decode([int(tokens[i, p])]) and len(context.pieces) <= 9
        for shown, v in zip(pictures.passages(sae, source, c, j, 3, width=4), top.values.tolist()): assert max(shown.values) >= v*(1 - 1e-4)
    words, codes = text_concepts(sae, source, "The mean of an array of numbers, or of none.")
    assert len(words) == len(codes) and codes.shape[1] == 40
    with pytest.raises(ValueError, match="tokens"): text_concepts(sae, source, "a b c "*400)
    assert len(pictures.token_table(words, codes)) == len(words)


def test_pieces_join_to_the_text():
    source = TextSource(TEXTS, seq_len=16)
    for text in ("naïve façade — 東京 🙂 ok", "tabs\tand\n\nlines", "", " leading"):
        ids = source.tokenizer(text)["input_ids"]
        assert "".join(pieces(source.tokenizer, ids)).replace("\ufffd", "") == source.tokenizer.decode(ids).replace("\ufffd", "")


def test_other_sources_have_items_of_one_token():
    source = make_source("synthetic", n_features=32, d_in=16)
    sae = make_sae("relu", 16, 24).eval()
    c = collect(sae, source, n=300, k=5)
    z = sae.encode(torch.cat(list(source.heldout(300)))).to_dense().detach()
    expected = torch.where(z > 0, z, torch.nan).nan_to_num(-1).sort(dim=0, descending=True).values[:5].T
    torch.testing.assert_close(c.values.nan_to_num(-1), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(c.items, c.top and c.tops["token"].items) and (c.positions <= 0).all()
    with pytest.raises(ValueError, match="no pictures"): list(passes(source, 5, "train"))
    with pytest.raises(ValueError, match="no text"): concept_context(c, source, 0)


def test_one_image():
    z = torch.zeros(5, 6); z[0, 2], z[3, 2], z[1, 4], z[2, 5] = 1., 3., 2., -1.
    codes = sparse(z)
    assert top_concepts_of(codes, 9)[0].tolist() == [2, 4, 5] and top_concepts_of(codes, 1, token=0)[0].tolist() == [2]
    assert top_concepts_of(codes, token=4)[0].tolist() == []
    assert heat_map(codes, 2, (2, 2)).tolist() == [[0, 0], [3, 0]] and heat_map(codes.view(5), 0, (1, 5)).sum() == 0
    assert upsampled(heat_map(codes, 2, (2, 2)), (8, 8), "nearest")[4:, :4].eq(3).all()
    for bad in (-1, 6):
        with pytest.raises(IndexError, match="no concept"): heat_map(codes, bad, (2, 2))
    with pytest.raises(ValueError, match="2 × 3"): heat_map(codes, 0, (2, 3))


def test_a_position_is_a_place(scenes):
    boxes = [patch_box(p, scenes) for p in range(65)]
    assert boxes[0] is None and len({b[:2] for b in boxes[1:]}) == 64 and boxes[9][:2] == (0, 1/8)
    assert patch_box(0, ImageSource("scenes", tokens="patches"))[:2] == (0, 0) and patch_box(0, ImageSource("scenes", tokens="cls")) is None


def texts(fig): return [t.get_text() for ax in fig.axes for t in ax.texts]


def test_pictures_of_an_image(scenes, sae, found):
    image, silent = scenes.data.image("test", 0), make_sae("jumprelu", scenes.d_in, 96, theta=1e6).eval()
    none = collect(silent, scenes, n=10, k=2)
    both = pictures.plot_top_concepts(dict(a=sae, b=silent), scenes, [image]*2, dict(a=found, b=none), n_references=3)
    assert sum("no concept is active" in t for t in texts(both)) == 2
    assert sum("no concept is active" in t for t in texts(pictures.plot_levels(silent, scenes, image, none))) == 2
    named = pictures.plot_top_concepts(sae, scenes, image, found, ids=[1, 2, 3, 4])
    assert sum(t.startswith(("1:", "2:", "3:", "4:")) for t in texts(named)) == 4
    pictures.plot_levels(sae, scenes, [image]*2, found, patches=[None, 63], common=1.)
    with pytest.raises(ValueError, match="1 patches for 2"): pictures.plot_levels(sae, scenes, [image]*2, found, patches=[1])
    with pytest.raises(ValueError, match="collected on"): pictures.plot_concepts(sae, scenes.with_data("shapes"), [0], found)
    with pytest.raises(ValueError, match="no concepts to show"): pictures.plot_concepts(sae, scenes, [], found)
    dead = int((found.stats.density == 0).to_numpy().argmax())
    pictures.plot_concepts(sae, scenes, [dead, 0], found)


def test_an_image_of_another_shape(scenes, sae, found):
    from PIL import Image
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8))
    assert pictures.views(scenes, [wide]).shape == (1, 64, 64, 3)
    pictures.plot_top_concepts(sae, scenes, wide, found)
    as_tensor = scenes.data.load("test", [5]).images[0]
    torch.testing.assert_close(image_concepts(sae, scenes, as_tensor).to_dense(), image_concepts(sae, scenes, scenes.data.image("test", 5)).to_dense(), rtol=1e-3, atol=1e-4)


def test_counts_and_failures(scenes, sae, found):
    topk = make_sae("topk", scenes.d_in, 32, k=3).eval()
    counts = pictures.image_counts(dict(sparsemax=sae, topk=topk), scenes, 40)
    fixed = counts[counts.sae == "topk"]
    assert (fixed.cls == 3).all() and (fixed.patches == 3).all() and fixed.distinct.between(3, 32).all() and len(counts) == 80
    assert np.isnan(pictures.correlations(counts).loc["topk", "cls"])
    assert pictures.plot_dynamic_sparsity(counts, scenes).axes and pictures.plot_dynamic_sparsity(counts, scenes, n_examples=0, columns=["cls"]).axes
    scores = torch.rand(96, dtype=torch.float64); scores[::2] = torch.nan
    worst = pictures.failures(found, scores, n=5, least=0., most=1.)
    allowed = found.stats[found.stats.density > 0].index.intersection(range(1, 96, 2))
    assert len(worst) == 5 and set(worst.index) <= set(allowed) and worst.score.is_monotonic_increasing
    assert len(pictures.failures(found, scores*torch.nan)) == 0


def test_similar_masks_are_similar():
    z = torch.zeros(17, 7); z[1:7, 1] = 1.; z[1:7, 3] = .5; z[2:8, 5] = 1.; z[9:17, 6] = 1.; z[1:3, 0] = 1.; z[1:7, 2] = -1.
    ids, cosine = pictures.similar_masks(sparse(z), (4, 4), 3)
    assert sorted(ids) == [1, 3, 5] and cosine == pytest.approx(5/6)
    assert pictures.similar_masks(sparse(z), (4, 4), 9, least=9) == ([], pytest.approx(math.nan, nan_ok=True))


def test_images_with_similar_masks(scenes, sae):
    table = pictures.alike(sae, scenes, 12, 2)
    assert len(table) == 12 and set(map(len, table.concepts)) <= {0, 2} and table.cosine.dropna().is_monotonic_decreasing
    assert pictures.alike(make_sae("jumprelu", scenes.d_in, 8, theta=1e6), scenes, 3).concepts.map(len).sum() == 0


def test_text_pictures():
    shown = pictures.Highlighted(["<b>", " a\n", "c"], [0., 1., -2.])
    assert "&lt;b&gt;" in shown._repr_html_() and "↵" in shown._repr_html_()
    assert pictures.plot_tokens(shown.pieces, shown.values, "title").axes
    assert pictures.token_colors([0, 1, -1])[[0, 2]].tolist() == [[1]*4]*2 and pictures.token_colors([]).shape == (0, 4)
