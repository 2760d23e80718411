"""Training under adversity: kills, full disks, damaged files, wrong parameters."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsemax_sae import recipes
from sparsemax_sae.activations.source import TensorSource
from sparsemax_sae.basics.log import read_log
from sparsemax_sae.training import checkpoint
from sparsemax_sae.training.checkpoint import checkpoints, load_checkpoint
from sparsemax_sae.training.config import make_config
from sparsemax_sae.training.trainer import Run, learning_rate, train

OPTIONS = dict(topk=dict(k=4), batchtopk=dict(k=4), jumprelu=dict(theta=.5, eps=.2))


def activations(n=4000, d=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g)


def config(arch="topk", out=None, **given):
    given = dict(dict(steps=30, d_sae=64, save_every=5, log_every=1, device="cpu"), **given)
    return make_config(arch, "smoke", options=OPTIONS.get(arch, {}), out=str(out) if out else None, **given)


def weights(run): return load_file(run.path/"sae"/"model.safetensors")


def assert_same_run(a, b):
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    for k in wa: assert torch.equal(wa[k], wb[k]), k
    drop = lambda run: [{k: v for k, v in line.items() if k != "samples_per_s"} for line in read_log(run.path/"log.jsonl")]
    assert drop(a) == drop(b)


class Interrupted(TensorSource):
    "A source that fails once, after `after` batches."
    def __init__(self, x, after): super().__init__(x); self.after = after
    def stream(self, *args, **kwargs):
        for i, item in enumerate(super().stream(*args, **kwargs)):
            if i == self.after: raise RuntimeError("interrupted")
            yield item


@pytest.mark.parametrize("arch", sorted(recipes()))
def test_resume_is_bit_exact_for_every_recipe(arch, tmp_path):
    x = activations()
    whole = train(config(arch, tmp_path/"whole"), TensorSource(x), progress=False)
    for after in (12, 7):   # the second run dies twice
        with pytest.raises(RuntimeError, match="interrupted"): train(config(arch, tmp_path/"torn"), Interrupted(x, after), progress=False)
        torch.manual_seed(after)
    assert_same_run(train(config(arch, tmp_path/"torn"), TensorSource(x), progress=False), whole)


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_training import activations, config
from sparsemax_sae.activations.source import TensorSource
from sparsemax_sae.training.trainer import train
torch.set_num_threads(1)
train(config("sparsemax", {out!r}, steps=400, save_every=20), TensorSource(activations()), progress=False)
"""


def start(out): return subprocess.Popen([sys.executable, "-c", KILLED.format(tests=str(Path(__file__).parent), out=str(out))], stderr=subprocess.PIPE, text=True)


def test_sigkill_and_resume(tmp_path):
    "Killed twice at arbitrary moments, a run ends with the parameters and the log of an undisturbed one."
    undisturbed = start(tmp_path/"whole")
    _, err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, err
    kills, log = 0, tmp_path/"torn"/"log.jsonl"
    for wait_for in (30, 230):
        p = start(tmp_path/"torn")
        while p.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < wait_for): time.sleep(.01)
        kills += p.poll() is None
        p.kill(); p.wait()
    assert kills == 2 and not Run(tmp_path/"torn").finished
    p = start(tmp_path/"torn")
    _, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    assert_same_run(Run(tmp_path/"torn"), Run(tmp_path/"whole"))


def test_keyboard_interrupt_saves_and_resumes(tmp_path):
    class Pressed(TensorSource):
        def stream(self, *args, **kwargs):
            for i, item in enumerate(super().stream(*args, **kwargs)):
                if i == 7: os.kill(os.getpid(), signal.SIGINT)
                yield item
    x = activations()
    whole = train(config(out=tmp_path/"whole"), TensorSource(x), progress=False)
    with pytest.raises(KeyboardInterrupt, match="after step 8 of 30"): train(config(out=tmp_path/"torn"), Pressed(x), progress=False)
    assert load_checkpoint(tmp_path/"torn"/"state")[1]["step"] == 8
    assert_same_run(train(config(out=tmp_path/"torn"), TensorSource(x), progress=False), whole)


def test_a_finished_run_is_not_trained_again(tmp_path):
    x = activations()
    run = train(config(), TensorSource(x), progress=False)
    before = (run.path/"sae"/"model.safetensors").stat().st_mtime_ns
    assert train(config(), Interrupted(x, 0), progress=False).path == run.path
    assert (run.path/"sae"/"model.safetensors").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path):
    x = activations()
    whole = train(config(out=tmp_path/"whole"), TensorSource(x), progress=False)
    with pytest.raises(RuntimeError): train(config(out=tmp_path/"torn"), Interrupted(x, 22), progress=False)
    newest = checkpoints(tmp_path/"torn"/"state")[-1]
    assert newest.name == "step-00000020"
    (newest/"tensors.safetensors").write_bytes(b"not what it was")
    with pytest.warns(UserWarning, match="step-00000020 is damaged.*falling back to step-00000015"):
        torn = train(config(out=tmp_path/"torn"), TensorSource(x), progress=False)
    assert_same_run(torn, whole)


def test_when_every_checkpoint_is_damaged_training_starts_over_and_keeps_its_new_ones(tmp_path):
    x = activations()
    whole = train(config(out=tmp_path/"whole"), TensorSource(x), progress=False)
    with pytest.raises(RuntimeError): train(config(out=tmp_path/"torn"), Interrupted(x, 22), progress=False)
    for p in checkpoints(tmp_path/"torn"/"state"): (p/"tensors.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="starting from the beginning"), pytest.raises(RuntimeError):
        train(config(out=tmp_path/"torn"), Interrupted(x, 12), progress=False)
    assert [p.name for p in checkpoints(tmp_path/"torn"/"state")] == ["step-00000005", "step-00000010"]
    assert_same_run(train(config(out=tmp_path/"torn"), TensorSource(x), progress=False), whole)


@pytest.mark.parametrize("arch", sorted(recipes()))
def test_two_threads_are_as_deterministic_as_one(arch, tmp_path):
    "At the laptop's sizes sums run in parallel; their order must not."
    threads, x = torch.get_num_threads(), activations(8000, 32)
    torch.set_num_threads(2)
    try:
        big = dict(d_sae=1024, batch_size=2048, steps=6, normalize="none" if arch == "relu" else None)
        runs = [train(make_config(arch, "smoke", device="cpu", out=str(tmp_path/str(i)), options=dict(k=32) if "topk" in arch else {}, **big), TensorSource(x), progress=False) for i in range(3)]
    finally: torch.set_num_threads(threads)
    assert_same_run(runs[0], runs[1]); assert_same_run(runs[0], runs[2])


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path/"thesis").mkdir(); (tmp_path/"thesis"/"config.json").write_text("mine")
    with pytest.raises(ValueError, match="nothing there was touched"): train(config(out=tmp_path/"thesis"), TensorSource(activations()), progress=False)
    assert (tmp_path/"thesis"/"config.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_a_checkpoint_with_a_missing_file_is_damaged(name, tmp_path):
    x = activations()
    with pytest.raises(RuntimeError): train(config(out=tmp_path/"torn"), Interrupted(x, 22), progress=False)
    (checkpoints(tmp_path/"torn"/"state")[-1]/name).unlink()
    with pytest.warns(UserWarning, match="damaged"): assert load_checkpoint(tmp_path/"torn"/"state")[1]["step"] == 15


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    x, real, calls = activations(), checkpoint.save_file, []
    whole = train(config(out=tmp_path/"whole"), TensorSource(x), progress=False)
    def full(tensors, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 3: Path(path).write_bytes(b"half"); raise OSError(28, "No space left on device")
        return real(tensors, path, *args, **kwargs)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="step 15 could not be written.*No space left.*step-00000010 is intact"):
        train(config(out=tmp_path/"torn"), TensorSource(x), progress=False)
    assert [p.name for p in (tmp_path/"torn"/"state").iterdir()] == ["step-00000005", "step-00000010"] or \
           sorted(p.name for p in (tmp_path/"torn"/"state").iterdir()) == ["step-00000005", "step-00000010"]
    assert_same_run(train(config(out=tmp_path/"torn"), TensorSource(x), progress=False), whole)


def test_a_torn_log_line_is_dropped(tmp_path):
    x = activations()
    whole = train(config(out=tmp_path/"whole"), TensorSource(x), progress=False)
    with pytest.raises(RuntimeError): train(config(out=tmp_path/"torn"), Interrupted(x, 12), progress=False)
    with open(tmp_path/"torn"/"log.jsonl", "a") as f: f.write('{"step": 13, "lo')
    assert_same_run(train(config(out=tmp_path/"torn"), TensorSource(x), progress=False), whole)


def test_nothing_is_pickled(tmp_path):
    run = train(config(), TensorSource(activations()), progress=False)
    files = {p.suffix for p in run.path.rglob("*") if p.is_file()}
    assert files == {".json", ".jsonl", ".safetensors"}
    for p in run.path.rglob("*.json"): json.loads(p.read_text())


def test_the_manifest_names_what_made_the_run():
    m = train(config(), TensorSource(activations()), progress=False).manifest
    assert {"id", "status", "started", "python", "packages", "commit", "device", "data", "samples_seen"} <= m.keys()
    assert m["status"] == "finished" and m["samples_seen"] == 30*256 and m["packages"]["torch"]


def test_two_runs_do_not_share_a_folder(tmp_path):
    train(config(out=tmp_path/"a"), TensorSource(activations()), progress=False)
    with pytest.raises(ValueError, match="already holds the run"): train(config(out=tmp_path/"a", seed=1), TensorSource(activations()), progress=False)
    with pytest.raises(ValueError, match="already holds the run"): train(config(out=tmp_path/"a"), TensorSource(activations(d=8)), progress=False)


def test_a_diverging_run_stops_with_advice(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(config("relu", tmp_path/"a", lr=10., steps=300, grad_clip=0., normalize="none"), TensorSource(1e20*activations()), progress=False)


@pytest.mark.parametrize("wrong, message", [
    (dict(arch="sparsmax"), "Did you mean 'sparsemax'"), (dict(steps=0), "steps=0"), (dict(d_sae=0), "d_sae=0"), (dict(d_sae=-4), "d_sae=-4"),
    (dict(batch_size=2.5), "batch_size=2.5"), (dict(lr=-1), "lr=-1"), (dict(lr=0.), "lr=0.0"), (dict(betas=(.9,)), "two numbers"), (dict(seed="x"), "seed='x'"), (dict(preset="lapton"), "laptop"), (dict(hook="middle"), "pre, post"), (dict(stesp=3), "Did you mean 'steps'")])
def test_wrong_parameters_are_refused_before_anything_runs(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message): make_config(**dict(dict(arch="topk"), **wrong))


def test_an_option_the_architecture_lacks_is_refused():
    with pytest.raises(TypeError, match="takes no option 'k'"): make_config("sparsemax", "smoke", options=dict(k=32), device="cpu")


def test_cuda_is_refused_where_there_is_none():
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no CUDA device"): train(config(device="cuda"), TensorSource(activations()), progress=False)


def test_schedule():
    c = make_config("topk", "laptop")
    rates = [learning_rate(s, c) for s in range(c.steps)]
    assert rates[0] == pytest.approx(c.lr/c.warmup) and max(rates) == c.lr and rates[-1] < c.lr/100
    assert all(b >= a for a, b in zip(rates[:c.warmup], rates[1:c.warmup])) and all(b <= a for a, b in zip(rates[c.warmup:], rates[c.warmup+1:]))


def test_run_ids_are_functions_of_what_matters():
    a = config()
    assert a.id({}) == config(log_every=7, save_every=9).id({}) and len({config(seed=s).id({}) for s in range(5)}) == 5
    assert a.id({}) != a.id(dict(data="x"))


@pytest.mark.cuda
def test_mixed_precision_trains(tmp_path):
    for arch in sorted(recipes()):
        run = train(config(arch, tmp_path/arch, device="cuda", amp="bf16", steps=60), TensorSource(activations(), device="cuda"), progress=False)
        assert run.log().loss.iloc[-1] < run.log().loss.iloc[0]
