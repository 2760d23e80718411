"""Grids: what is trained is trained once, whoever asks; what diverges leaves a gap; what was measured is kept until its code changes."""
import json
import math
import subprocess
import sys
import warnings

import pytest

from sparsemax_sae.metrics import reconstruction
from sparsemax_sae.reproduce import grid as module
from sparsemax_sae.reproduce.grid import Grid, averages, evaluate, evaluated, fit
from sparsemax_sae.reproduce.publish import publish
from sparsemax_sae.training.checkpoint import checkpoints, read_json

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(preset="smoke", datasets=("synthetic",), settings=dict(smoke=dict(steps=12, save_every=5, d_sae=64)), options=dict(smoke=dict(topk=dict(k=4))))


def test_a_smoke_test_keeps_all_architectures_one_width_one_seed():
    g = Grid(["relu", "topk"], widths=(4, 8), seeds=(3, 4), preset="smoke")
    assert list(g.archs) == ["relu", "topk"] and g.widths == (4,) and g.seeds == (3,)
    g = Grid(["relu", "topk"], widths=(4, 8), seeds=(3, 4), preset="laptop")
    assert g.widths == (4, 8) and g.seeds == (3, 4)


def test_options_and_settings_follow_the_preset_and_names_may_stand_for_recipes():
    g = Grid({"a": dict(arch="topk", k=5), "b": dict(arch="relu", lr=.1)}, preset="smoke", options=dict(smoke=dict(a=dict(k=7)), laptop=dict(a=dict(k=9))), settings=dict(laptop=dict(steps=3)))
    assert g.config("a").arch == "topk" and g.config("a").options == dict(k=7) and g.config("b").lr == .1
    assert g.config("a").steps == 20
    with pytest.raises(ValueError, match="Did you mean 'relu'"): Grid(["rellu"], preset="smoke").config("rellu")


def test_widths_are_multiples_of_the_activations_width():
    g = Grid(["topk"], widths=(2,), **SMALL)
    (cell,) = g.cells(sources := g.sources())
    assert cell.config.d_sae == 2*sources["synthetic"].d_in and cell.name == "topk, 2×, synthetic, seed 0"


def test_nothing_is_trained_twice_and_grids_share_runs(monkeypatch):
    trained = []
    real = module.train
    monkeypatch.setattr(module, "train", lambda config, *a, **k: trained.append(config.arch) or real(config, *a, **k))
    fits = fit(Grid(["topk", "relu"], **SMALL), progress=False)
    assert trained == ["topk", "relu"] and all(r.finished for r in fits.runs.values())
    fit(Grid(["relu", "sparsemax"], **SMALL), progress=False)
    assert trained == ["topk", "relu", "sparsemax"]
    assert set(fits.saes()) == {"topk", "relu"} and "seed 0" in fits.caption


def test_an_interrupted_grid_goes_on(monkeypatch):
    g = Grid(["topk", "relu"], **SMALL)
    real, calls = module.train, []
    def torn(config, data, bar, wait):
        calls.append(config.arch)
        class Stop(Exception): pass
        class Bar:
            n = 0
            def __enter__(self): return self
            def __exit__(self, *e): pass
            def set_postfix(self, **k): pass
            def update(self):
                self.n += 1
                if self.n == 8: raise Stop
        try: return real(config, data, lambda c, step: Bar(), wait)
        except Stop: raise KeyboardInterrupt from None
    monkeypatch.setattr(module, "train", torn)
    with pytest.raises(KeyboardInterrupt): fit(g, progress=False)
    monkeypatch.setattr(module, "train", real)
    half = g.cells(g.sources())[0].run
    assert calls == ["topk"] and not half.finished and checkpoints(half.path/"state")[-1].name.endswith("05")
    assert all(r.finished and r.log()["step"].is_unique for r in fit(g, progress=False).runs.values())


def test_two_processes_share_a_grid(tmp_path):
    "Each run is trained by one of them, and both end with all of it."
    script = ("import torch; torch.set_num_threads(1)\nfrom sparsemax_sae.reproduce.grid import Grid, fit\n"
              "fits = fit(Grid(['topk', 'relu', 'batchtopk', 'sparsemax'], preset='smoke', datasets=('synthetic',), settings=dict(smoke=dict(steps=60)), options=dict(smoke=dict(topk=dict(k=4), batchtopk=dict(k=4)))), progress=False)\n"
              "print(len(fits.runs), all(r.finished for r in fits.runs.values()), [r.log().step.is_unique for r in fits.runs.values()])")
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=240) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert all(out.strip() == "4 True [True, True, True, True]" for out, _ in said), said


def test_a_run_that_diverges_leaves_a_gap():
    g = Grid({"topk": {}, "wild": dict(arch="relu", lr=9., grad_clip=0., betas=(0., .01))}, preset="smoke", datasets=("synthetic",), options=SMALL["options"], settings=dict(smoke=dict(normalize="none", steps=80, warmup=0)))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        fits = fit(g, progress=False)
    if not fits.failed: pytest.skip("this one did not diverge")
    assert any("has no result" in str(x.message) for x in w)
    assert list(fits.failed) == ["wild, synthetic, seed 0"] and evaluate(fits, ["nmse"], progress=False)["row"].tolist() == ["topk"]


def test_what_was_measured_is_kept_until_its_code_changes(monkeypatch):
    fits = fit(Grid(["topk"], **SMALL), progress=False)
    (run,), source = fits.runs.values(), fits.sources["synthetic"]
    numbers = evaluated(run, source, ["nmse", "recovery"], 300, 2)
    (path,) = (run.path/"evaluations").iterdir()
    path.write_text(json.dumps(read_json(path) | dict(nmse=-1.)))
    assert evaluated(run, source, ["nmse", "recovery"], 300, 2)["nmse"] == -1.
    assert evaluated(run, source, ["nmse", "recovery"], 301, 2)["nmse"] == pytest.approx(numbers["nmse"], rel=.1)
    monkeypatch.setattr(module, "code_of", lambda metrics: {"reconstruction": "changed"})
    assert evaluated(run, source, ["nmse", "recovery"], 300, 2) == numbers


def test_numbers_that_do_not_exist_survive_the_cache():
    fits = fit(Grid(["topk"], **SMALL), progress=False)
    (run,), source = fits.runs.values(), fits.sources["synthetic"]
    first = evaluated(run, source, ["rho"], 300, 2)
    again = evaluated(run, source, ["rho"], 300, 2)
    assert first.keys() == again.keys() and all(a == b or math.isnan(a) and math.isnan(b) for a, b in zip(first.values(), again.values()))


def test_rows_of_predictors_that_learned_nothing():
    fits = fit(Grid(["topk"], widths=(2,), **SMALL), progress=False)
    t = evaluate(fits, ["nmse"], on={"a": fits.sources["synthetic"]}, by="corpus", trivial=True, progress=False)
    assert t["row"].tolist() == ["topk", "mean", "zero"] and t["width"].tolist() == [2, 2, 2] and set(t["corpus"]) == {"a"}
    assert averages(t, ["nmse"], "corpus").loc["zero"].iloc[0] == pytest.approx(t[t.row == "zero"].nmse.item())


def test_the_record_keeps_claims_and_headline(tmp_path, monkeypatch):
    import pandas as pd
    for k in ("IN_TEST", "PYTEST_CURRENT_TEST"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("SPARSEMAX_SAE_ROOT", str(tmp_path))
    said = pd.DataFrame(dict(claim=["a"], ours=["holds (1/1)"])).set_index("claim")
    publish("x", "laptop", pd.DataFrame(dict(v=[1.])), None, {}, claims=said, headline="in a line")
    record = read_json(tmp_path/"data"/"results"/"x"/"laptop.json")
    assert record["headline"] == "in a line" and record["claims"] == [dict(claim="a", ours="holds (1/1)")]


def test_a_metric_defined_in_a_notebook_is_measured_and_told_from_another(monkeypatch):
    "A notebook has no file: the digest is that of the compiled methods. Its class may have taken the place of the library's, as under nbdev_test."
    class Own(reconstruction.METRICS["reconstruction"]):
        def compute(self): return super().compute()
    Own.__module__ = "nowhere"
    library = module.code_of(["nmse"])
    monkeypatch.setitem(reconstruction.METRICS, "reconstruction", Own)
    own = module.code_of(["nmse"])
    Own.compute = lambda self: {}
    assert len({str(d) for d in (library, own, module.code_of(["nmse"]))}) == 3
