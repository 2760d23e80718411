"""The benchmark measures what it says: meters against known answers, contenders at the L0 they claim, failures shown."""
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

from sparsemax_sae import make_sae
from sparsemax_sae.benchmarks import tables
from sparsemax_sae.benchmarks.contenders import CONTENDERS, Released, Step, active, aim, contender, make_step, names, not_installed, quantile_for, sorted_sparsemax, untrained
from sparsemax_sae.benchmarks.tables import breakdown, measure, measure_many, memory_table, op_errors, op_table, settings, settings_from_notebook, targets
from sparsemax_sae.benchmarks.timing import interleave, peak_memory, ratios
from sparsemax_sae.ops.sparsemax import sparsemax_reference
from sparsemax_sae.reproduce.paths import root

FILLER = "sparsemax_sae.benchmarks.timing:Filler"
SIZE = dict(d_in=32, d_sae=512, n=256, l0=16)


@pytest.fixture
def registry():
    "The registry, as it was afterwards."
    before = dict(CONTENDERS)
    yield CONTENDERS
    CONTENDERS.clear(); CONTENDERS.update(before)


@pytest.mark.parametrize("megabytes, trained", [(200, 0), (200, 100), (100, 300)])
def test_the_meter_reads_known_allocations(megabytes, trained):
    "Within a tenth, whatever the gradients: they are made afresh in the place of those that were dropped, and count once."
    assert peak_memory(FILLER, dict(megabytes=megabytes, trained=trained), small=dict(megabytes=1)) == pytest.approx(megabytes*1e6, rel=.1)


def test_memory_that_fits_into_the_dropped_gradients_is_free(tmp_path, monkeypatch):
    "max(F − G, B): a forward pass that holds less than the gradients adds nothing."
    (tmp_path/"a_case.py").write_text("import torch\nclass Forward:\n    def __init__(s): s.parameters = [torch.ones(75_000_000)]\n"
                                      "    def __call__(s):\n        torch.ones(25_000_000)\n        s.parameters[0].grad = torch.ones(75_000_000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert peak_memory("a_case:Forward") < 20e6


def test_the_meter_of_last_resort():
    "Where the high-water mark cannot be restarted, the highest size since the start is a lower bound."
    code = ("from sparsemax_sae.benchmarks import timing as t; t._restart_high_water = lambda: False; t._status = lambda key: None; "
            "step = t.Filler(200); print(t.peak_of(step))")
    small = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"   # a child's highest size starts at its parent's, and this one may be large
    peak = int(subprocess.run([sys.executable, "-c", small], capture_output=True, text=True, check=True).stdout)
    assert 150e6 < peak < 220e6


@pytest.mark.parametrize("path, kwargs, reason", [("no_such_module:f", {}, "no_such_module"), (FILLER, dict(gigabytes=1), "gigabytes")])
def test_a_case_that_cannot_be_made_says_why(path, kwargs, reason):
    with pytest.raises(RuntimeError, match=reason): peak_memory(path, kwargs)


def test_cases_run_in_turn_and_are_paired_with_their_own_floor():
    order = []
    times = interleave({c: (lambda c=c: order.append(c)) for c in "abc"}, repeats=3, warmup=2)
    assert "".join(order) == "abc"*5 and times.shape == (3, 3)
    slowed = pd.DataFrame(dict(product=[1., 7., 3.], case=[2., 14., 6.]))
    assert (ratios(slowed).loc["case", ["min", "median", "max"]] == 2).all()
    for wrong in ({}, dict(a=print)):
        with pytest.raises(ValueError, match="at least one"): interleave(wrong, repeats=0 if wrong else 1)


@pytest.mark.parametrize("name", names("ours", "ours, more", "ours, dense", "released", "other libraries"))
def test_every_contender_trains_and_has_the_l0_it_is_compared_at(name):
    step = make_step(name, **SIZE)
    assert untrained(step) == []
    step()
    assert all(p.grad is None for p in step.parameters)
    if "as initialised" not in name and name != "released algorithm": assert step.l0() == pytest.approx(SIZE["l0"], rel=.05)


@pytest.mark.parametrize("arch", ["sparsemax", "sparsemax_release", "linear_sparsemax", "linear_entmax15", "jumprelu", "gated", "relu"])
@pytest.mark.parametrize("l0", [4, 40])
def test_aim(arch, l0):
    torch.manual_seed(0)
    x = torch.randn(512, 48)
    assert active(aim(make_sae(arch, 48, 1024).train(), x, l0).encode(x)) == pytest.approx(l0, rel=.15)


def test_a_quantile_is_exceeded_by_as_many_as_asked():
    s = torch.randn(64, 100)
    for l0 in (1, 7, 99): assert (s > quantile_for(s, l0)).sum() == 64*l0


@pytest.mark.parametrize("std", [.01, .3, 3.])
def test_the_sorted_sparsemax_is_sparsemax(std):
    s = torch.randn(20, 700, dtype=torch.float64)*std
    torch.testing.assert_close(sorted_sparsemax(s), sparsemax_reference(s), atol=1e-10, rtol=0)


def test_the_released_algorithm_is_our_release_recipe():
    "Same loss, codes and gradients in float64, in the second step too, when concepts that fired too often are masked."
    torch.manual_seed(0)
    model, sae, x = Released(24, 300).double(), make_sae("sparsemax_release", 24, 300).double().train(), torch.randn(128, 24, dtype=torch.float64) + .3
    sae.scorer.load_state_dict(dict(concepts=model.C, W_k=model.W_k, W_v=model.W_v), strict=False)
    for _ in range(2):
        model.zero_grad(); sae.zero_grad()
        a, out = model(x), sae(x)
        a.backward(); out.loss.backward()
        torch.testing.assert_close(a, out.loss)
        for mine, theirs in ((sae.scorer.concepts, model.C), (sae.scorer.W_k, model.W_k), (sae.scorer.W_v, model.W_v)): torch.testing.assert_close(mine.grad, theirs.grad)
    assert (model.frequency > .1).any()


def test_paths_give_the_same_loss():
    for arch in ("sparsemax", "topk", "batchtopk", "jumprelu", "gated"):
        sparse, dense = (make_step(name, **SIZE) for name in (arch, f"{arch}, dense path"))
        dense.sae.load_state_dict(sparse.sae.state_dict()); dense.sae.scorer.scale = sparse.sae.scorer.scale
        torch.testing.assert_close(sparse.sae(sparse.x).loss, dense.sae(sparse.x).loss, rtol=1e-4, atol=1e-6)


def test_dead_concepts_stay_dead_and_cost_something():
    "Those that fired are buried again before the next step, so that every step pays for AuxK."
    step = make_step("topk, 10 % dead", **SIZE)
    aux, losses, dead, paid = step.sae.aux, step.sae.aux.losses, [], []
    def spy(*args):
        parts = losses(*args)
        dead.append(aux.dead_fraction()); paid.append(parts["aux_k"].item())
        return parts
    aux.losses = spy
    for _ in range(3): step()
    assert len(set(dead)) == 1 and dead[0] == pytest.approx(.1, abs=.05) and min(paid) > 0


def test_a_failing_library_is_shown_and_a_failure_of_ours_is_not_hidden(registry):
    def fails(*args): return Step(lambda: torch.zeros(2) @ torch.zeros(3))
    contender("theirs", "other libraries", "torch")(fails); contender("mine", "ours")(fails)
    table = measure(["theirs", "topk"], **SIZE, repeats=1)
    assert table.loc["theirs", "note"].startswith("failed: RuntimeError") and pd.isna(table.loc["theirs", "median"]) and table.loc["topk", "median"] > 0
    with pytest.raises(RuntimeError): measure(["mine"], **SIZE, repeats=1)


def test_a_missing_library_is_left_out_and_said_to_be(registry):
    contender("theirs", "other libraries", "no_such_package")(lambda *args: None)
    assert "theirs" not in names("other libraries") and "theirs" in names(installed=False)
    assert "no_such_package" in not_installed()
    with pytest.raises(ValueError, match="Did you mean 'topk'"): make_step("topkk", **SIZE)


def test_handfuls_have_floors_of_their_own():
    table = measure_many(["topk", "relu", "gated"], **SIZE, repeats=1, together=1)
    assert list(table.index) == ["product", "topk", "relu", "gated"] and table["median"].notna().all()


def test_memory_in_score_matrices():
    table = memory_table(["product", "released algorithm"], d_in=64, d_sae=32768, n=512, l0=32)
    assert table.loc["product", "score_matrices"] == pytest.approx(1, abs=.1)
    assert table.loc["released algorithm", "score_matrices"] > 2


def test_the_parts_are_parts():
    table = breakdown("sparsemax", **SIZE, repeats=2)
    assert (table.drop("rest")["median"] > 0).all() and table.loc["whole step", "median"] > table.loc["decode", "median"]
    inside = [p for p in table.index if p not in ("product", "whole step", "rest") and not p.startswith("of which")]
    assert table.loc[inside, "ms"].sum() + table.loc["rest", "ms"] == pytest.approx(table.loc["whole step", "ms"])
    with pytest.raises(ValueError, match="dense"): breakdown("relu as initialised", **SIZE)


def test_sparsemax_alone():
    table = op_table(32, 1024, [.05, 1.], repeats=1, d_in=32)
    assert {"ours", "sort"} <= set(table.index) and (table.loc["ours", ["std 0.05", "std 1"]] > 0).all()
    errors = op_errors(16, 16384, .01)
    assert errors["ours"] < .01 < errors["sort"]


def test_aims_that_were_not_measured_are_left_out_and_missed_ones_stay():
    every = names("ours", "ours, more", "ours, dense", "released")
    fast, slow = pd.DataFrame(dict(median=1.1), index=every), pd.DataFrame(dict(median=9.), index=every)
    memory, op = pd.DataFrame(dict(score_matrices=[.1, 4.]), index=["topk", "sparsemax"]), pd.DataFrame({"std 1": [.5, 5.]}, index=["ours", "sort"])
    seen = targets({tables.LARGE: fast, tables.SMALL: slow}, memory, op).reset_index()
    met = lambda aim, size: seen[(seen["aim"] == aim) & (seen["size"] == size)]["met"].item()
    assert met("topk, fp32 screening: products", tables.LARGE) and not met("topk: products", tables.LARGE) and not met("topk, fp32 screening: products", tables.SMALL)
    assert not seen["size"].eq(tables.WIDE).any() and not seen["aim"].str.contains("sparsify").any()
    assert met("topk: peak memory, in score matrices", "") and not met("sparsemax: peak memory, in score matrices", "")


@pytest.mark.parametrize("wrong, message", [(dict(preset="big"), "accepted are"), (dict(preset="smoke", shapes=[3]), "pairs"), (dict(preset="smoke", shapes=[[1, 2, 3]]), "pairs")])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): settings(**wrong)


def test_settings_of_a_notebook():
    s = settings_from_notebook(dict(preset="laptop", shapes=[[64, 32]], third_parties=False, l0=8, d_in=16, something_else=1))
    assert s.sizes == [[64, 32]] and not s.others and s.base["l0"] == 8 and s.base["d_in"] == 16 and s.repeats == 5
    with pytest.raises(TypeError, match="Did you mean 'shapes'"): settings_from_notebook(dict(In=["shapes: list = []", "# Parameters\nshape = []"]))
    assert all(name in CONTENDERS for preset in tables.SETTINGS.values() for name in [*preset["memory"], *preset["main"]])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"): settings("gpu")


@pytest.mark.slow
def test_the_benchmark_runs_under_papermill(tmp_path):
    run = lambda *args: subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(root()/"nbs"/"benchmarks"/"sparse_engine.ipynb"), str(tmp_path/"out.ipynb"),
                                        "-p", "preset", "smoke", *args], capture_output=True, text=True, timeout=600, env=os.environ | dict(OMP_NUM_THREADS="1"))
    done = run("-p", "third_parties", "False")
    assert done.returncode == 0 and "Unable to parse" not in done.stderr, done.stderr[-3000:]
    assert "sparsemax, 10 % dead" in (tmp_path/"out.ipynb").read_text()
    wrong = run("-p", "shape", "3")
    assert wrong.returncode and "Did you mean 'shapes'" in wrong.stderr, wrong.stderr[-3000:]


@pytest.mark.cuda
def test_on_a_gpu():
    options = dict(d_in=256, d_sae=16384, n=1024, l0=32, device="cuda", dtype="bfloat16")
    table = measure(["sparsemax", "topk", "released algorithm"], **options, repeats=2)
    assert (table["median"] > 0).all() and table.loc["topk", "l0"] == pytest.approx(32, rel=.1)
    memory = memory_table(["product"], **options)
    assert memory.loc["product", "score_matrices"] == pytest.approx(.5, abs=.1)   # bf16: half of a float32 score matrix
    with pytest.raises(ValueError, match="accepted are"): settings("big", device="cuda")
