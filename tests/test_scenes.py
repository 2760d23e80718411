"""The drawn pictures: the same from the same seed, what they claim to be, and known to the shipped CLIP."""
import json

import pytest
import torch

from sparsemax_sae.activations.pictures import open_pictures
from sparsemax_sae.activations.scenes import (ATTRIBUTES, COLOURS, FIRST_DIGIT, MOST, SHAPES, SIZE, TASKS, captions, draw_layout, glyphs, handwritten, layout_of,
                                              mixture, render, split_digits)
from sparsemax_sae.activations.source import generator
from sparsemax_sae.backbones.contrastive import CONFIG, accuracy_table, captioned, load_clip, object_patches, object_words
from sparsemax_sae.reproduce.paths import data_dir

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pictures_are_a_function_of_the_seed():
    for name in ("scenes", "counts", "digits"):
        a, b = open_pictures(name), open_pictures(name)
        i = torch.tensor([7, 3, 900])
        assert torch.equal(a.load("test", i).images, b.load("test", i).images)
        assert torch.equal(a.load("test", i).images[1:2], a.load("test", [3]).images)     # whatever is drawn beside it
        assert not torch.equal(a.load("test", i).images, a.load("count", i).images)
        assert not torch.equal(a.load("test", i).images, open_pictures(name, seed=1).load("test", i).images)


def test_splits_of_the_digits_are_disjoint_and_kept_apart():
    parts = {s: set(split_digits(s).tolist()) for s in ("train", "count", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 1797
    for name in ("digits", "scenes"):
        for split, mine in parts.items():
            s = open_pictures(name).layout(split)
            g = s.glyph[:, 0]
            used = set((g[g >= FIRST_DIGIT] - FIRST_DIGIT).tolist())
            assert used and used <= mine, (name, split)
    g = captioned("digits", 200, generator("t"))[0].glyph[:, 0] - FIRST_DIGIT
    assert set(g.tolist()) <= parts["train"]


@pytest.mark.parametrize("name", list(TASKS))
def test_labels_are_balanced_and_true(name):
    data = open_pictures(name)
    labels, s = data.labels("test"), data.layout("test")
    counts = torch.bincount(labels, minlength=len(data.classes))
    assert counts.max() - counts.min() <= 1
    truth = dict(shapes=lambda: s.glyph[:, 0], colours=lambda: s.colour[:, 0], textures=lambda: s.texture[:, 0], counts=lambda: s.n - 1, backgrounds=lambda: s.background,
                 letters=lambda: s.glyph[:, 0] - len(SHAPES), digits=lambda: handwritten()[1][s.glyph[:, 0] - FIRST_DIGIT],
                 positions=lambda: (s.centre[:, 0, 1]*3/SIZE).floor()*3 + (s.centre[:, 0, 0]*3/SIZE).floor())
    assert torch.equal(truth[name]().long(), labels)
    assert len(data.templates) >= 3 and all(t.count("{}") == 1 for t in data.templates)


@pytest.mark.parametrize("make", [lambda g: draw_layout(500, g), lambda g: mixture(500, g), lambda g: layout_of("counts", torch.arange(500) % 8, g)])
def test_objects_lie_inside_and_do_not_overlap(make):
    s = make(generator("inside"))
    there = torch.arange(MOST) < s.n[:, None]
    assert s.n.min() >= 1 and s.n.max() <= MOST
    edge = 1.5                                                                             # a glyph's margin; objects of `positions` may lean out so far
    assert ((s.centre - s.radius[..., None] >= -edge) & (s.centre + s.radius[..., None] <= SIZE + edge)).all(-1)[there].all()
    apart = (s.centre[:, :, None] - s.centre[:, None]).abs().amax(-1) - s.radius[:, :, None] - s.radius[:, None]
    both = there[:, :, None] & there[:, None] & ~torch.eye(MOST, dtype=torch.bool)
    assert (apart[both] >= -1e-3).all()


def test_an_object_is_where_and_what_the_layout_says():
    s = layout_of("shapes", torch.zeros(64, dtype=torch.long), generator("where"))         # circles
    s.texture[:], s.colour[:, 0], s.background[:] = 0, list(COLOURS).index("red"), 0
    images = render(s).float()
    x, y = s.centre[:, 0].long().unbind(1)
    at = images[torch.arange(64), :, y, x]
    assert (at[:, 0] > 180).all() and (at[:, 1:] < 80).all()
    corner = images[torch.arange(64), :, (y + 32) % SIZE, (x + 32) % SIZE]
    assert ((corner - corner.mean(1, keepdim=True)).abs() < 20).all()                      # grey wall
    s.n[:] = 0
    assert (render(s).float().std((2, 3)) < 5).all()


def test_attributes_count_what_is_there():
    s = draw_layout(50, generator("attributes"))
    known = open_pictures("scenes").describe("test", range(30))
    assert known.shape == (30, len(ATTRIBUTES)) and torch.equal(known[:, :len(SHAPES) + 36].sum(1), open_pictures("scenes").load("test", range(30)).complexity)
    words = object_words(s, "colour")
    assert len(words) == int(s.n.sum()) and words[0] == f"a {list(COLOURS)[s.colour[0, 0]]} thing"


def test_object_patches_cover_the_object():
    s = draw_layout(40, generator("patches"))
    W = object_patches(s, 8, 8)
    there = torch.arange(MOST) < s.n[:, None]
    c = s.centre[there]
    y, x = torch.meshgrid(*[torch.arange(8)*8 + 4.]*2, indexing="ij")
    mean = torch.stack([W @ x.flatten(), W @ y.flatten()], 1)
    assert (mean - c).abs().max() <= 4.01 and torch.allclose(W.sum(1), torch.ones(len(W)))
    wide = object_patches(s, 4, 16)
    assert torch.allclose(wide.sum(1), torch.ones(len(W)))


def test_captions_fit_the_text_tower():
    import open_clip
    tokens = open_clip.SimpleTokenizer(context_length=77)(captions(draw_layout(400, generator("captions"))))
    assert (tokens != 0).sum(1).max() <= CONFIG["text_cfg"]["context_length"]


def test_distance_fields_have_an_edge():
    G = glyphs()
    assert ((G > 0).flatten(1).any(1) & (G < 0).flatten(1).any(1)).all()


def test_the_shipped_clip_knows_them():
    folder = data_dir("backbones", "tiny-clip")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8e6
    table = accuracy_table(*load_clip(folder), n=160)
    assert table.loc["mean", "accuracy"] > .8 and (table.accuracy > 3*table.chance).all()
    recorded = json.loads((folder/"training.json").read_text())["accuracy"]
    assert all(abs(table.accuracy[k] - recorded[k]) < .12 for k in recorded)
