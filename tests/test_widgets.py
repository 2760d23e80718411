"""The explorers without a browser: every control shows the right thing, what is missing or wrong is said in the box."""
import html
import re
import shutil

import numpy as np
import pytest
import torch

from sparsemax_sae.explore import exhibits, widgets
from sparsemax_sae.explore.concepts import image_concepts, run_concepts, text_concepts, top_concepts_of
from sparsemax_sae.explore.exhibits import Missing, Opened, cut, finished_runs, l0_curve, mean_l0, named_run, open_for, ranked, samples, scored
from sparsemax_sae.explore.widgets import Still, concept_explorer, image_explorer, sparsity_explorer, text_explorer
from sparsemax_sae.ops.sparsemax import sparsemax_reference
from sparsemax_sae.training.config import make_config
from sparsemax_sae.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread", "in_runs")
ALL = (concept_explorer, image_explorer, sparsity_explorer, text_explorer)
RECIPES = dict(text=("sparsemax_release", "docs", {}, {}), images=("sparsemax_release", "scenes", dict(block_size=96), {}), topk=("topk", "docs", {}, dict(k=9)),
               synthetic=("linear_sparsemax", "synthetic", dict(n_features=32, d_in=16), dict(scale=3.)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with four small finished runs, by name."
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    patch.setenv("SPARSEMAX_SAE_RUNS", str(folder))
    found = {name: train(make_config(arch, "smoke", dataset=data, data_options=d, options=o, seed=i), progress=False) for i, (name, (arch, data, d, o)) in enumerate(RECIPES.items())}
    patch.undo()
    return folder, found


@pytest.fixture
def in_runs(own_runs, runs, monkeypatch):
    monkeypatch.setenv("SPARSEMAX_SAE_RUNS", str(runs[0]))
    for kind, n in dict(images=64, text=16, activations=128).items(): monkeypatch.setitem(exhibits.ITEMS, kind, n)


@pytest.fixture
def ids(runs): return {name: run.path.name for name, run in runs[1].items()}


@pytest.fixture(scope="module")
def opened(runs):
    "Everything opened once."
    with pytest.MonkeyPatch.context() as patch:
        for kind, n in dict(images=64, text=16, activations=128).items(): patch.setitem(exhibits.ITEMS, kind, n)
        out = {name: Opened(run) for name, run in runs[1].items()}
        for name in ("text", "images"): out[name].concepts()
    return out


def bold(text): return re.findall(r"tabular-nums\">([^<]*)</b>", text)
def said(box): return html.unescape(re.sub("<[^>]*>", "", box["message"].value))
def red(box): return "#d55e00" in box["message"].value


# which run

@pytest.mark.parametrize("explorer", ALL)
def test_without_a_run_the_box_says_how_to_make_one(explorer, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMAX_SAE_RUNS", str(tmp_path))
    box = explorer()
    assert said(box).startswith("There is no finished run on ") and "papermill nbs/train.ipynb" in said(box) and len(box.children) == 2
    assert str(tmp_path) not in Still(box).html and "papermill" in Still(box).html and repr(Still(box)) == "Still()"
    assert (explorer is text_explorer) or "-p dataset scenes" in said(box)
    assert (explorer is image_explorer) or "-p dataset docs" in said(box)


@pytest.mark.parametrize("explorer", ALL)
def test_an_unknown_run(explorer, ids):
    assert f"Did you mean '{ids['images']}'?" in said(explorer(ids["images"][:-1] + "x"))
    assert "There is no run '/nowhere/at/all'" in said(explorer("/nowhere/at/all"))


def test_a_run_of_another_kind(ids):
    assert "was trained on text; this explorer is for pictures" in said(image_explorer(ids["text"])) and "-p dataset scenes" in said(image_explorer(ids["text"]))
    assert "was trained on synthetic activations" in said(text_explorer(ids["synthetic"])) and "this explorer is for pictures or text" in said(concept_explorer(ids["synthetic"]))


def test_the_newest_that_can_be_opened(runs, tmp_path, monkeypatch):
    "Unfinished and damaged runs, other versions' and stray files are passed over; a damaged one that was asked for is told."
    folder = tmp_path/"copy"
    shutil.copytree(runs[0], folder)
    monkeypatch.setenv("SPARSEMAX_SAE_RUNS", str(folder))
    started = [r.manifest["started"] for r in finished_runs()]
    assert len(started) == len(runs[1]) and started == sorted(started, reverse=True)
    (folder/"stray").mkdir(); (folder/"stray"/"manifest.json").write_text("{")
    newest = open_for("", ["text"]).run.path
    (newest/"sae"/"model.safetensors").write_bytes(b"no"); other = open_for("", ["text"]).run.path
    assert {newest.name, other.name} == {runs[1][name].path.name for name in ("text", "topk")}
    assert "cannot be opened" in said(text_explorer(newest.name))
    manifest = other/"manifest.json"
    manifest.write_text(manifest.read_text().replace("finished", "started"))
    with pytest.raises(Missing, match="is not finished"): named_run(str(other))
    assert "1 cannot be opened" in said(text_explorer())


def test_concepts_at_hand_are_taken(runs, opened, monkeypatch):
    run, source = runs[1]["images"], opened["images"].source
    more = run_concepts(run, source, 80, exhibits.KEPT, "train", progress=False)
    fresh, told = Opened(run), []
    assert fresh.concepts(say=told.append).facts["n_items"] == 80 == more.facts["n_items"] and not told
    assert fresh.concepts("letters", told.append).facts["classes"] and len(told) == 1 and "happens once" in told[0]
    assert fresh.concepts("letters", told.append).facts["n_items"] == 64 and len(told) == 1
    shutil.rmtree(run.path/"concepts")
    assert Opened(run).concepts().facts["n_items"] == 64


# concepts

def test_concepts_of_images(ids, opened):
    box, found = concept_explorer(ids["images"]), opened["images"].concepts()
    by_density = ranked(found)
    assert not said(box) and box["concept"].value == by_density[0] and box["rank"].max == len(by_density)
    densities = found.stats.density.to_numpy()
    assert (np.diff(densities[by_density]) <= 0).all() and len(by_density) == (densities > 0).sum()
    box["rank"].value = 7
    assert box["concept"].value == by_density[6] and f"rank 7 of {len(by_density)}" in box["place"].value
    s = found.stats.iloc[by_density[6]]
    assert bold(box["facts"].value)[:4] == [str(by_density[6]), f"{s.density:.2%}", f"{s.item_density:.2%}", f"{s.cls_density:.2%}"] and f"{s['max']:.3g}" in box["facts"].value
    before = bytes(box["picture"].value)
    box["next"].click()
    assert box["rank"].value == 8 and box["concept"].value == by_density[7] and box["picture"].value != before and before.startswith(b"\x89PNG")
    box["back"].click()
    assert box["picture"].value == before   # a function of the state
    box["concept"].value = by_density[3]
    assert box["rank"].value == 4
    box["order"].value = "how strongly"
    assert box["concept"].value == int(found.stats["mean"].idxmax()) and box["rank"].value == 1


def shows(im, values): return im.get_array().shape == tuple(values.shape) and np.allclose(im.get_array(), values)
def numbers(fig): return [t.get_text() for t in fig.axes[0].texts]


@pytest.mark.parametrize("kind", ["item", "cls", "patch", "token"])
def test_the_picture_of_a_concept_has_its_list(opened, kind):
    found = opened["images"].concepts()
    concept = next(i for i in ranked(found) if len(found.top(i, kind).items) >= 8)
    top = found.top(concept, kind, 8)
    assert numbers(exhibits.concept_picture(opened["images"], concept, kind)) == [t for v, i in zip(top.values, top.items) for t in (f"{v:.3f}", f"#{i}")]


def test_a_dead_concept_and_none(ids, opened):
    box, found = concept_explorer(ids["images"]), opened["images"].concepts()
    dead = found.stats.index[found.stats.density == 0].tolist()
    if dead:
        box["concept"].value = dead[0]
        assert "it never fired here" in box["facts"].value and not said(box) and "not among" in box["place"].value
    shown = box["picture"].value
    for bad in (-1, 256, 10**6):
        box["concept"].value = bad
        assert said(box) == f"there is no concept {bad}: they are 0…255." and red(box) and box["picture"].value == shown
    box["concept"].value = 0
    assert not said(box)


def test_concepts_by_class(ids, opened):
    box = concept_explorer(ids["images"])
    assert box["class"].disabled and "shapes" in box["data"].options and "how selectively" not in box["order"].options
    box["data"].value = "shapes"
    found = opened["images"].concepts("shapes")
    assert not box["class"].disabled and [o[0] for o in box["class"].options][1:] == found.facts["classes"] and box["order"].value == "how selectively"
    assert found.stats.entropy[box["concept"].value] == found.stats.entropy.min()
    for label in range(len(found.facts["classes"])):
        expected = found.stats[(found.stats.top_class == label) & (found.stats.item_density >= .005)]
        box["class"].value = label
        if len(expected):
            assert not said(box) and found.stats.top_class_share[box["concept"].value] == expected.top_class_share.max() and found.facts["classes"][label] in box["facts"].value
        else: assert "No concept fires most" in said(box)
    box["data"].value = "scenes"
    assert box["class"].value is None and "class entropy" not in box["facts"].value


def test_concepts_of_text(ids, opened):
    box, found = concept_explorer(ids["text"]), opened["text"].concepts()
    assert "data" not in [c.description for r in box.children if hasattr(r, "children") for c in r.children if hasattr(c, "description")]
    for rank in (1, 5, 30):
        box["rank"].value = rank
        concept = ranked(found)[rank - 1]
        assert box["concept"].value == concept
        assert re.findall(r"52px\">([^<]*)</b>", box["contexts"].value) == [f"{v:.3f}" for v in found.top(concept, "token", 8).values]


# an image

def test_a_click_on_a_patch(ids, opened):
    box, one = image_explorer(ids["images"]), opened["images"]
    codes = image_concepts(one.sae, one.source, one.source.data.image("test", box["image"].value))
    first = box["photo"].value
    for patch in (0, 18, 63):
        box["photo_grid"].children[1].children[patch].click()
        token, l0 = patch + 1, int(codes.l0()[patch + 1])
        assert box["token"].value == token and bold(box["facts"].value)[:3] == [f"patch in row {patch//8}, column {patch%8}", str(l0), str(int(codes.l0()[0]))]
        assert [c for _, c in box["concept"].options] == top_concepts_of(codes, 256, token)[0].tolist() and len(box["concept"].options) == l0
        assert [o[0].split(" · ")[1] for o in box["concept"].options] == [f"{v:.3f}" for v in top_concepts_of(codes, 256, token)[1]]
        assert box["concept"].value == exhibits.telling(codes, token, one.concepts())
    assert box["photo"].value != first and len(box["photo_grid"].children[1].children) == 64
    box["cls"].click()
    assert box["token"].value == 0 and "CLS token" in box["facts"].value and bold(box["facts"].value)[1] == str(int(codes.l0()[0]))
    assert bold(box["facts"].value)[3] == f"{codes.l0()[1:].double().mean():.1f}"


def test_the_concept_of_an_image(ids, opened):
    box, one = image_explorer(ids["images"]), opened["images"]
    codes = image_concepts(one.sae, one.source, one.source.data.image("test", box["image"].value))
    before, other = box["picture"].value, box["concept"].options[-1][1]
    box["concept"].value = other
    assert box["picture"].value != before and not said(box)
    fig = exhibits.image_picture(one, box.view, codes, box["token"].value, other)
    assert exhibits.png(fig) == box["picture"].value
    heat = codes.to_dense()[1:, other].view(8, 8)
    assert any(shows(im, heat) for ax in fig.axes for im in ax.images) and f"where {other} fires" in numbers(fig)
    assert any(shows(im, codes.l0()[1:].view(8, 8)) for ax in fig.axes for im in ax.images)
    box["next"].click()
    assert not said(box) and box["picture"].value != before


def test_images_that_are_not_there(ids):
    box = image_explorer(ids["images"])
    for bad in (-1, 4096):
        box["image"].value = bad
        assert said(box) == f"there is no test image {bad}: they are 0…4095." and red(box)
    box["image"].value = 4095
    assert not said(box)
    box["next"].click(); assert "no test image 4096" in said(box)


def test_a_token_without_concepts(opened):
    one = opened["images"]
    codes = image_concepts(one.sae, one.source, one.source.data.image("test", 0))
    empty = codes.keep(codes.rows != 5)
    assert exhibits.telling(empty, 5, one.concepts()) is None and exhibits.active_options(empty, 5, one.concepts()) == []
    assert "no concept is active at this token" in numbers(exhibits.image_picture(one, np.zeros((64, 64, 3)), empty, 5, None))


# the score scale

@pytest.mark.parametrize("name", ["text", "images", "synthetic"])
def test_support_and_threshold_are_those_of_sparsemax(name, ids, opened):
    box, one = sparsity_explorer(ids[name]), opened[name]
    x = samples(one).x
    table = scored(one.sae, x.flatten(0, 1))
    assert not said(box) and torch.equal(cut(table.at(table.trained), "sparsemax")[0].sum(1).view(x.shape[:2]), one.sae.encode(x).l0())
    item, token = 5, min(3, x.shape[1] - 1)
    box["item"].value, box["token"].value = item, token
    for factor in (.2, 1, 7):
        box["scale"].value = scale = table.trained*factor
        s = table.at(scale).view(*x.shape[:2], -1)[item, token]
        p = sparsemax_reference(s)
        shown = bold(box["facts"].value)
        assert shown[1] == f"{int((p > 0).sum())} of {len(s)}" and shown[2] == f"{float((s.double() - p)[p > 0].mean()):.4g}" and float(shown[4]) == pytest.approx(1, abs=2e-3)
        assert shown[5] == f"{mean_l0(box.batch.at(scale), 'sparsemax'):.1f}"
    box["reset"].click()
    assert bold(box["facts"].value)[1].split()[0] == str(int(one.sae.encode(x).l0()[item, token]))


def test_the_condition_ends_where_the_support_does(opened):
    one = opened["text"]
    table = scored(one.sae, samples(one, 2).x.flatten(0, 1)[:40])
    for scale in (table.trained/5, table.trained, table.trained*5):
        s = table.at(scale).sort(1, descending=True).values.double()
        mass = s.cumsum(1) - torch.arange(1, s.shape[1] + 1)*s
        assert torch.equal((mass < 1).sum(1), cut(s, "sparsemax")[0].sum(1))


def test_top_k_on_the_same_scores(ids, opened):
    box, one = sparsity_explorer(ids["topk"]), opened["topk"]
    assert box["rule"].value == "top-k" and box["k"].value == 9 and box["scale"].layout.display == "none"
    codes = one.sae.encode(samples(one).x)
    assert bold(box["facts"].value)[1].split()[0] == str(int(codes.l0()[box["item"].value, box["token"].value]))
    before = box["picture"].value
    box["k"].value = 3
    assert bold(box["facts"].value)[:2] == ["3", "3 of 256"] and box["picture"].value != before
    box["rule"].value = "sparsemax"
    assert box["k"].layout.display == "none" and "threshold τ" in box["facts"].value


def test_the_curve_is_mean_l0(opened):
    one = opened["images"]
    table = scored(one.sae, samples(one, 2).x.flatten(0, 1))
    scales, l0 = l0_curve(table, "sparsemax", 5)
    assert scales[2] == pytest.approx(table.trained) and l0[2] == pytest.approx(float(one.sae.encode(samples(one, 2).x).l0().double().mean())) and l0 == sorted(l0, reverse=True)
    ks, l0 = l0_curve(table, "top-k", 5)
    assert l0 == sorted(l0) and l0[0] == 1


# a text

def test_a_text_of_ones_own(ids, opened):
    box, one = text_explorer(ids["text"]), opened["text"]
    box["text"].value = text = "def mean(x):\n    return sum(x) / len(x)"
    words, codes = text_concepts(one.sae, one.source, text)
    tokens = box["tokens"]
    assert [b.description for b in tokens.flow.children if getattr(b, "description", None)] == [widgets.visible(w) for w in words] and not said(box)
    for token in (1, len(words) - 1):
        tokens.buttons[token].click()
        assert [c for _, c in box["concept"].options] == top_concepts_of(codes, 256, token)[0].tolist()
        assert bold(box["facts"].value)[1] == str(int(codes.l0()[token])) and bold(box["facts"].value)[0].startswith(f"{token}: ")
        concept = box["concept"].options[-1][1]
        box["concept"].value = concept
        assert tokens.values == codes.to_dense()[:, concept].tolist() and box["number"].value == concept
        assert bold(box["facts"].value)[3:5] == [str(concept), f"{float(codes.to_dense()[token, concept]):.3f}"]
        assert len(re.findall("background:rgb", tokens.style_sheet.value)) == int((codes.to_dense()[:, concept] > 0).sum())
    assert [int(l) for l in re.findall(r"<td>(\d+)</td>", box["table"].value)] == codes.l0().tolist()


def test_any_concept_colours_the_text(ids, opened):
    box, found = text_explorer(ids["text"]), opened["text"].concepts()
    box["number"].value = number = ranked(found)[0]
    assert f"Where else {number} fires" in box["contexts"].value
    assert re.findall(r"52px\">([^<]*)</b>", box["contexts"].value) == [f"{v:.3f}" for v in found.top(number, "token", 5).values]
    before = box["tokens"].style_sheet.value
    box["number"].value = 256
    assert said(box) == "there is no concept 256: they are 0…255." and box["tokens"].style_sheet.value == before
    box["number"].value = 0
    assert not said(box)


def test_texts_that_cannot_be_read(ids):
    box = text_explorer(ids["text"])
    box["text"].value = "  "
    assert "There is no text to read" in said(box)
    box["text"].value = "one two three "*300
    assert "takes 1 to" in said(box) and red(box)
    box["passage"].value = box["passage"].options[3][1]
    assert not said(box) and box["text"].value == box["passage"].value


def test_the_button_does_not_lose_the_chosen_token(ids):
    box = text_explorer(ids["text"])
    box["text"].value = "def mean(x):\n    return sum(x) / len(x)"
    box["tokens"].buttons[3].click(); box["read"].click()
    assert bold(box["facts"].value)[0].startswith("3: ")


def test_two_explorers_on_a_page_do_not_share_styles(ids):
    one, two = text_explorer(ids["text"]), text_explorer(ids["text"])
    assert one["tokens"].name != two["tokens"].name and one["tokens"].name not in two["tokens"].style_sheet.value


# the box

def test_any_exception_is_shown_and_the_next_success_clears_it(ids, monkeypatch):
    box = concept_explorer(ids["text"])
    monkeypatch.setattr(widgets, "context_rows", lambda *a: 1/0)
    box["rank"].value = 2
    assert "ZeroDivisionError" in said(box) and red(box)
    monkeypatch.undo()
    box["back"].click()
    assert not said(box)


@pytest.mark.parametrize("explorer, name", [(concept_explorer, "images"), (concept_explorer, "text"), (image_explorer, "images"), (sparsity_explorer, "synthetic"), (text_explorer, "text")])
def test_a_still_shows_the_state(explorer, name, ids):
    box = explorer(ids[name])
    page = Still(box).html
    assert not said(box) and ids[name] in page and box["facts"].value in page and not re.search(r"0x[0-9a-f]{6,}", re.sub(r"base64,[^\"]*", "", page))
    if "picture" in box.parts and box["picture"].value: assert widgets.data_url(box["picture"].value) in page
