"""Runs at a wanted L0: the search ends, and near the target; nothing is trained twice; claims are judged by the numbers they name."""
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch

from sparsemax_sae import make_sae, recipes
from sparsemax_sae.activations.source import Source, make_source
from sparsemax_sae.explore.adaptivity import KINDS, columns_for, kind_of, looks, plot_calibration, plot_pareto, plot_zipf, zipf_fits
from sparsemax_sae.metrics.evaluate import evaluate
from sparsemax_sae.reproduce import matching
from sparsemax_sae.reproduce.matching import (CLAIMS, Try, between, beyond, claims, contender_config, distance, family, heldout_l0, judge, knob_of, knob_value, match_l0, measured,
                                              next_value, open_runs, phases, step_times, stored, timed_step, trace, value_at, with_own_k)
from sparsemax_sae.saes.base import SPARSIFIERS
from sparsemax_sae.training import trainer
from sparsemax_sae.training.config import make_config


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(): return make_source("synthetic", n_features=48, d_in=16, k_max=6, block_size=1024, device="cpu")


BASE = dict(preset="smoke", d_sae=64, steps=20, save_every=20, batch_size=64, normalize="none", device="cpu")


class Fake:
    "Stands for training: an L0 for every value of the knob, and a list of what was asked for."
    def __init__(self, monkeypatch, law):
        self.law, self.asked = law, []
        monkeypatch.setattr(matching, "try_value", self)
    def __call__(self, config, value, source, n=0, progress=False):
        self.asked.append(value)
        return Try(value, float(self.law(value)), None)


class Nothing(Source): d_in = 16


def search(target, arch="relu", **given):
    start = {"relu": {"l1": .01}}.get(arch, {})
    return match_l0(make_config(arch, "smoke", d_sae=1024, options=start), target, Nothing(), **given)


LAWS = {"power": lambda v: .3*v**-1., "steep": lambda v: 1e-3*v**-2.2, "flat": lambda v: 20*v**-.15, "saturating": lambda v: 5 + .5/v, "collapsing": lambda v: 40*(.5 - v) if v < .5 else 0,
        "stairs": lambda v: round(.3/v), "exponential": lambda v: 1000*math.exp(-20*v), "dense before": lambda v: 1024/(1 + (v/.02)**3)}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("target", [6, 12, 19])
def test_the_search_converges_on_falling_curves(monkeypatch, law, target):
    fake = Fake(monkeypatch, LAWS[law])
    found = search(target, tries=12)
    assert min(abs(t.l0/target - 1) for t in found) <= .1
    assert len(fake.asked) == len(set(fake.asked)) == len(found)


@pytest.mark.parametrize("law", ["power", "steep", "dense before"])
def test_four_or_five_tries_do_for_well_behaved_curves(monkeypatch, law):
    Fake(monkeypatch, LAWS[law])
    assert all(len(search(target, tries=20)) <= 5 for target in (8, 16, 32))


@pytest.mark.parametrize("law", [lambda v: 0., lambda v: 1024., lambda v: 50., lambda v: 3*v**.5 + 20, lambda v: random.Random(v).uniform(1, 100), lambda v: 1e-9])
def test_a_knob_that_does_nothing_useful_ends_the_search(monkeypatch, law):
    "Saturated, of the wrong direction, or noise: at most so many tries, all different, each at most a factor of 10 beyond those before."
    fake = Fake(monkeypatch, law)
    found = search(8, tries=6, tolerance=.01)
    assert len(found) <= 6 and len(set(fake.asked)) == len(fake.asked) and all(math.isfinite(v) and v > 0 for v in fake.asked)
    for i, v in enumerate(fake.asked[1:], 1): assert min(fake.asked[:i])/10.001 <= v <= max(fake.asked[:i])*10.001


@pytest.mark.parametrize("law, expected", [(lambda k: k, 8), (lambda k: .8*k, 10), (lambda k: k + 3, 5), (lambda k: k**1.2, 6)])
def test_k_is_a_whole_number_and_starts_at_the_target(monkeypatch, law, expected):
    fake = Fake(monkeypatch, law)
    found = search(8, "topk", tries=6, tolerance=.03)
    assert fake.asked[0] == 8 and all(isinstance(v, int) and v >= 1 for v in fake.asked)
    assert min(found, key=lambda t: distance(t.l0, 8)).value == expected


@pytest.mark.parametrize("law, target", [(lambda k: k + 50., 8), (lambda k: min(k, 5.), 8), (lambda k: 0., 8), (lambda k: 2*k + 1, 8), (lambda k: 1024., 1000)])
def test_the_search_for_k_ends_at_its_limits_and_between_neighbours(monkeypatch, law, target):
    fake = Fake(monkeypatch, law)
    search(target, "topk", tries=100, tolerance=.001)
    assert len(fake.asked) <= 20 and len(set(fake.asked)) == len(fake.asked) and all(1 <= v <= 1024 for v in fake.asked)


def test_what_was_tried_is_not_tried_again(monkeypatch):
    fake = Fake(monkeypatch, LAWS["power"])
    found = search(8)
    n = len(fake.asked)
    assert search(8, tried=found) == found and len(fake.asked) == n
    assert search(16, tried=found, tries=1)[:-1] == found
    assert fake.law(fake.asked[-1]) == pytest.approx(16, rel=.01)   # two points of a power law suffice


def test_further_targets_get_so_many_tries(monkeypatch):
    fake = Fake(monkeypatch, LAWS["exponential"])
    config = make_config("relu", "smoke", d_sae=1024, options=dict(l1=.01))
    found = trace(config, [8, 4, 16], Nothing(), tries=5, further=1)
    assert [target for target, _ in found].count(4) <= 1 and [target for target, _ in found].count(16) <= 1 and found[0][0] == 8
    assert [t.value for _, t in found] == fake.asked


@pytest.mark.parametrize("target", [0, -1, 1025, math.nan, True, "8"])
def test_impossible_targets_are_refused_before_anything_is_trained(monkeypatch, target):
    fake = Fake(monkeypatch, LAWS["power"])
    with pytest.raises(ValueError, match="target"): search(target)
    with pytest.raises(ValueError, match="target"): family({"topk": {}}, BASE | dict(d_sae=1024), [8, target], Nothing())
    assert not fake.asked


def test_less_than_one_concept_is_no_target_for_k(monkeypatch):
    Fake(monkeypatch, LAWS["power"])
    with pytest.raises(ValueError, match="from 1 to"): search(.5, "topk")
    assert search(.5)


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean 'topk'"): knob_of("topkk")
    with pytest.raises(ValueError, match="Did you mean 'relu'"): family({"rellu": {}}, BASE, [8], Nothing())
    with pytest.raises(TypeError, match="no option"): family({"topk": {"l1": 1.}}, BASE, [8], Nothing())
    with pytest.raises(ValueError, match="at least one"): family({"topk": {}}, BASE, [], Nothing())


def test_every_recipe_has_a_knob_that_moves():
    "Its own sparsifier's, with a positive value to start from, and accepted as an option."
    for arch in recipes():
        knob, value = knob_of(arch), knob_value(arch, {}, 16)
        assert value > 0 and make_config(arch, "smoke", options={knob: value})


def test_the_knob_follows_a_replaced_sparsifier():
    assert knob_of("topk", dict(sparsifier="relu")) == "l1" and knob_of("sparsemax", dict(sparsifier="topk")) == "k"
    assert knob_value("sparsemax", dict(scale="learned"), 64) == pytest.approx(1/8)


def test_a_sparsifier_without_a_knob_says_so(monkeypatch):
    monkeypatch.setattr(SPARSIFIERS["relu"], "knob", "")
    with pytest.raises(ValueError, match="'relu'.*names no hyperparameter"): knob_of("relu")


@pytest.mark.parametrize("slope", [-3., -1., -.3])
def test_points_on_a_line_are_found_at_once(slope):
    line = [(x, 5 + slope*x) for x in (0., 1.)]
    for at in (-.8, 1.7): assert beyond(line, 5 + slope*at, -1) == pytest.approx(at)
    assert between(line[1], line[0], 5 + slope*.4) == pytest.approx(.4 if slope > -2.4 else .5)


@pytest.mark.parametrize("tried", [[(1, 5.)], [(1, 0.), (2, 0.)], [(1, 0.), (2, 9.)], [(3, 8.), (4, 8.)], [(1, 9.), (2, 5.), (4, 7.)]])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_next_value_is_always_new_and_positive(tried, sign):
    v = next_value(tried, 8., sign)
    assert v > 0 and math.isfinite(v) and v not in dict(tried)
    w = next_value(tried, 8., sign, most=5)
    assert w is None or (1 <= w <= 5 and w == int(w) and w not in dict(tried))


def test_runs_are_trained_once(source, monkeypatch):
    trained = []
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self, progress, fit=trainer.Trainer.fit: (trained.append(self.run.path.name), fit(self, progress)))
    contenders = {"topk": {}, "plain": dict(arch="relu", l1=.05), "sparsemax": {}}
    first = family(contenders, BASE, [6, 3], source, tries=2, n=512)
    n = len(trained)
    pd.testing.assert_frame_equal(first, family(contenders, BASE, [6, 3], source, tries=2, n=512))
    assert n == len(trained) == len(first) == first["run"].nunique()
    assert first.groupby("contender")["matched"].sum().eq(1).all() and list(first["contender"].unique()) == list(contenders)
    assert first.loc[first["contender"] == "sparsemax", "own"].tolist()[0] and all(run.finished for run in open_runs(first).values())
    assert first.loc["topk, k=6", "l0"] == 6


def test_l0_is_that_of_evaluation(source):
    "What a batch shares in training is a threshold afterwards."
    config = contender_config("batchtopk", dict(k=5), **BASE)
    run = trainer.train(config, source, progress=False)
    assert heldout_l0(run.sae(), source, 512) == evaluate(run.sae().train(), source, 512, metrics=["l0"])["l0"]


def test_recipes_keep_their_own_normalisation():
    assert contender_config("sparsemax_release", {}, **BASE).sae_options().get("normalize") is None
    assert contender_config("topk", {}, **BASE).normalize == "none"


def test_topk_runs_at_the_k_that_sparsemax_chooses(source):
    table = with_own_k(family({"topk": {}, "sparsemax": {}}, BASE, [6], source, tries=1, n=512), BASE, source, n=512)
    own = table[table["own"] & (table["contender"] == "sparsemax")]["l0"].item()
    assert round(own) in table.loc[table["contender"] == "topk", "value"].tolist() and not table.index.has_duplicates
    assert table.loc[table["contender"] == "topk", "matched"].sum() == 1


def test_a_store_feeds_runs_and_the_source_measures_them(source):
    store = stored(source, 2048)
    assert torch.equal(next(iter(store.heldout(100))), next(iter(source.heldout(100))))
    table = measured(family({"topk": {}}, BASE, [4, 8], store, n=128), source, 1024, metrics=["nmse", "l0", "l0_std"])
    assert table["l0"].tolist() == [4, 8] and table["nmse"].notna().all() and table["l0_std"].eq(0).all()
    assert {"contender", "value", "run", "own", "matched"} <= set(table.columns)


def test_measured_numbers_are_those_of_evaluate(source):
    table = measured(family({"relu": dict(l1=.05)}, BASE, [6], source, tries=1, n=512), source, 1024, metrics=["nmse", "dead_fraction"])
    expected = evaluate(next(iter(open_runs(table).values())).sae(), source, 1024, metrics=["nmse", "dead_fraction"])
    assert table.iloc[0][["nmse", "dead_fraction"]].astype(float).to_dict() == pytest.approx(dict(expected))


def curve(contender, l0, nmse, matched=0, own=None, **more):
    return [dict(contender=contender, l0=float(a), nmse=float(b), matched=i == matched, own=i == own, **more) for i, (a, b) in enumerate(zip(l0, nmse))]


def test_values_are_read_off_a_power_law_exactly():
    l0 = np.array([16., 4., 8.])
    table = pd.DataFrame(curve("topk", l0, 1/l0**.7))
    for at in (4, 5, 11.3, 16): assert value_at(table, "topk", at) == pytest.approx(at**-.7, rel=.02)
    assert math.isnan(value_at(table, "topk", 3)) and math.isnan(value_at(table, "topk", 18)) and math.isnan(value_at(table, "relu", 8))
    assert not math.isnan(value_at(table, "topk", 16.5))
    dead = pd.DataFrame(curve("topk", [4, 16], [0, .2]))
    assert value_at(dead, "topk", 8) == pytest.approx(.1)


@pytest.mark.parametrize("nmse, holds", [(.1, "yes"), (.15, "no"), (.1251, "tie"), (math.nan, "—")])
def test_a_claim_holds_by_its_numbers(nmse, holds):
    table = pd.DataFrame(curve("topk", [4, 8, 16], [.25, .125, .0625], 1) + curve("soft", [8], [nmse]))
    said = judge(table, ("p", "soft", "nmse", "<", "topk"))
    assert said["holds"] == holds and said["theirs"] == pytest.approx(.125)


def test_equal_l0_means_equal():
    "A contender with more concepts is not favoured by them."
    table = pd.DataFrame(curve("topk", [4, 8, 16], [.25, .125, .0625], 1) + curve("soft", [10], [.11]))
    assert judge(table, ("p", "soft", "nmse", "<", "topk"))["holds"] == "no"


def test_claims_without_contenders_or_columns_are_open():
    table = pd.DataFrame(curve("topk", [4, 8], [.25, .125]))
    assert claims(table)["holds"].eq("—").all() and len(claims(table)) == len(CLAIMS)
    far = pd.DataFrame(curve("topk", [4, 8], [.25, .125]) + curve("sparsemax", [60, 8], [.01, .1], 1, own=0, rho=.4))
    said = claims(far).set_index("claim")["holds"]
    assert said["sparsemax: nmse < that of topk at equal L0"] == "yes" and said["sparsemax, own K: nmse < that of topk at equal L0"] == "—"
    assert said["sparsemax: rho > 0.0"] == "yes"


def test_every_claim_is_about_something_that_exists():
    names = {who.removesuffix(", own K").split(",")[0] for _, who, *_ in CLAIMS} | {o for *_, o in CLAIMS if isinstance(o, str)}
    assert names <= set(recipes())


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "relu", "sparsemax", "sparsemax_release"])
def test_timing_leaves_the_sae_as_it_was(arch, source):
    sae = make_sae(arch, 16, 64).eval()
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    step = timed_step(sae, next(iter(source.heldout(64))), 2)
    step(); step()
    assert not sae.training and all(torch.equal(v, before[k]) for k, v in sae.state_dict().items()) and all(p.grad is None for p in sae.parameters())


def test_times_are_relative_to_the_floor(source):
    saes = {"topk": make_sae("topk", 16, 64, k=4), "relu": make_sae("relu", 16, 64)}
    times = step_times(saes, source, 64, repeats=2)
    assert list(times.index) == ["topk", "relu"] and times.loc["topk", "median"] == 1 and (times["min"] <= times["max"]).all()
    with pytest.raises(ValueError, match="relative to 'soft'"): step_times(saes, source, floor="soft")


def test_an_sae_with_two_phases_counts_twice():
    sae = make_sae("topk", 16, 64)
    assert phases("x", sae) == {"x": 2}
    sae.config["sparsifier"]["name"] = "soft_topk"
    assert list(phases("soft", sae)) == ["soft, soft phase", "soft, hard phase"]


# --- pictures ---

def test_every_recipe_has_a_kind_and_a_look_of_its_own():
    assert {kind_of(name) for name in recipes()} <= set(KINDS)
    styles = looks([*recipes(), "topk, aux_zipf"])
    assert len({(s["color"], s["ls"], s["marker"]) for s in styles.values()}) == len(styles)


@pytest.mark.parametrize("n", range(1, 16))
def test_a_grid_has_room_for_all_and_few_empty_places(n):
    c = columns_for(n)
    assert 1 <= c <= 5 and -n % c <= 2


@pytest.mark.parametrize("draw", [lambda: plot_calibration({}), lambda: plot_zipf({}), lambda: plot_zipf({"a": []}), lambda: plot_zipf({"a": [math.nan]}),
                                  lambda: plot_calibration({"a": pd.DataFrame(dict(complexity=[], l0=[], l0_std=[]))}), lambda: plot_pareto(pd.DataFrame(dict(contender=[], l0=[], nmse=[])))])
def test_empty_pictures_are_refused(draw):
    with pytest.raises(ValueError): draw()


def test_dead_dictionaries_are_drawn():
    "Nothing fires: no curve and no fit, but a panel that counts."
    dead = {"topk": torch.zeros(32), "relu": torch.full((32,), .1)}
    assert list(zipf_fits(dead).index) == ["relu"]
    fig = plot_zipf(dead, zipf_fits(dead))
    assert "32 of 32 dead" in fig.axes[0].texts[0].get_text()
    assert plot_zipf({"topk": torch.zeros(32)})


def test_a_constant_l0_has_no_rho():
    one = pd.DataFrame(dict(complexity=[1., 2.], l0=[4., 4.], l0_std=[0., 0.]))
    titles = [ax.get_title() for ax in plot_calibration({"topk": one, "relu": one}, {"topk": math.nan, "relu": .5}).axes]
    assert titles == ["topk\nL0 is constant", "relu\nρ = 0.50"]
