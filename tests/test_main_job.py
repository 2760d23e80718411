"""The main job as people run it: papermill on nbs/train.ipynb, with this parameter and that."""
import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from sparsemax_sae import SAE, recipes
from sparsemax_sae.reproduce.paths import data_dir, root

TRAIN = str(root()/"nbs"/"train.ipynb")


def papermill(*args, timeout=600):
    "(exit status, what it printed, peak memory of the whole process tree in GB)"
    p = psutil.Popen([sys.executable, "-m", "papermill", "--no-progress-bar", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                     env=os.environ | dict(OMP_NUM_THREADS="2", HF_HUB_OFFLINE="1"))
    peak, until = 0, time.time() + timeout
    while p.poll() is None and time.time() < until:
        try: peak = max(peak, sum(q.memory_full_info().uss for q in [p, *p.children(recursive=True)]))
        except psutil.Error: pass
        time.sleep(.2)
    if p.poll() is None: p.kill()
    return p.returncode, p.stdout.read(), peak/1e9


def check_run(folder):
    "The run in `folder` is complete and its SAE works."
    sae = SAE.from_pretrained(folder/"sae")
    x = torch.randn(7, sae.d_in)
    x_hat, codes = sae.reconstruct(x)
    assert x_hat.shape == x.shape and x_hat.isfinite().all()
    metrics = json.loads((folder/"metrics.json").read_text())
    assert {"mean", "zero"} < metrics.keys() and metrics["zero"]["nmse_raw"] == pytest.approx(1)
    assert json.loads((folder/"manifest.json").read_text())["status"] == "finished"
    return sae, metrics


@pytest.mark.parametrize("arch, more", [("sparsemax", []), ("topk", ["-p", "k", 8]), ("jumprelu", ["-p", "options", "theta=0.5 eps=0.2"]), ("sparsemax_release", [])])
def test_papermill_smoke(arch, more, tmp_path):
    status, text, peak = papermill(TRAIN, tmp_path/"out.ipynb", "-p", "arch", arch, "-p", "preset", "smoke", "-p", "out", tmp_path/"run", *more)
    assert status == 0 and "Unable to parse" not in text, text[-3000:]
    sae, metrics = check_run(tmp_path/"run")
    assert sae.config["arch"] == arch and arch in metrics and peak < 3
    if arch == "topk": assert metrics[arch]["l0"] == pytest.approx(8, abs=.01)


@pytest.mark.parametrize("wrong, message", [
    (["-p", "archh", "topk"], "Did you mean 'arch'"), (["-p", "arch", "sparsmax"], "Did you mean 'sparsemax'"), (["-p", "steps", "0"], "steps=0"),
    (["-p", "k", "8"], "takes no option 'k'"), (["-p", "model", "no/such/model/here"], "no/such/model/here")])
def test_wrong_parameters_stop_the_job_with_a_reason(wrong, message, tmp_path):
    status, text, _ = papermill(TRAIN, tmp_path/"out.ipynb", "-p", "preset", "smoke", "-p", "out", tmp_path/"run", *wrong)
    assert status != 0 and message in text, text[-3000:]
    assert not (tmp_path/"run"/"sae").exists()


def test_the_parameters_explain_themselves():
    _, text, _ = papermill("--help-notebook", TRAIN)
    assert "Unable to parse" not in text
    for name in ("arch", "preset", "model", "dataset", "layer", "d_sae", "k", "scale", "steps", "lr", "batch_size", "seq_len", "seed", "device", "out", "options", "data_options"):
        line = next((l for l in text.splitlines() if l.strip().startswith(f"{name}:")), None)
        assert line, name
    assert all(arch in text for arch in recipes())


@pytest.fixture(scope="module")
def gpt2_small(tmp_path_factory):
    "A randomly initialised GPT-2 small (12 layers, width 768) and a text, on local disk."
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    folder = tmp_path_factory.mktemp("gpt2-small")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data_dir("backbones", "tiny-gpt2")).save_pretrained(folder)
    (folder/"text.txt").write_text("\n\n".join(f"Paragraph {i} says that {i} times {i+1} is {i*(i+1)}, and that this has been known for {i} years." for i in range(3000)))
    return folder


@pytest.mark.slow
def test_the_published_dimensions(gpt2_small, tmp_path):
    "d_in=768, d_sae=24576, layer 8 of a 12-layer GPT-2, a few steps: only the weights are stand-ins."
    status, text, peak = papermill(TRAIN, tmp_path/"out.ipynb", "-p", "preset", "smoke", "-p", "model", gpt2_small, "-p", "dataset", gpt2_small/"text.txt", "-p", "layer", 8,
                                   "-p", "hook", "pre", "-p", "d_sae", 24576, "-p", "seq_len", 128, "-p", "steps", 3, "-p", "batch_size", 1024,
                                   "-p", "data_options", "block_size=8 model_batch=8", "-p", "out", tmp_path/"run")
    assert status == 0, text[-3000:]
    sae, _ = check_run(tmp_path/"run")
    assert (sae.d_in, sae.d_sae) == (768, 24576) and tuple(sae.scorer.concepts.shape) == (24576, 768)
    assert peak < 4, peak


def test_papermill_on_pictures(tmp_path):
    "The embedded CLIP's patches, with the zero-shot and monosemanticity numbers in the table."
    status, text, peak = papermill(TRAIN, tmp_path/"out.ipynb", "-p", "preset", "smoke", "-p", "arch", "topk", "-p", "k", 8, "-p", "dataset", "scenes", "-p", "out", tmp_path/"run")
    assert status == 0 and "Unable to parse" not in text, text[-3000:]
    sae, metrics = check_run(tmp_path/"run")
    assert sae.d_in == 128 and peak < 3 and {"zs_no_sae", "zs_on_1", "zs_on_all", "mean_ms", "rho"} <= metrics["topk"].keys()
    assert metrics["topk"]["zs_no_sae"] > .6 and "ce_degradation" not in metrics["topk"]


@pytest.fixture
def two_classes(tmp_path):
    "A folder of 40 noisy pictures in two classes. The scenes, as eight labelled sets of known complexity, would have ViT-B/16 read over 1500 prompts and pictures."
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path/"pictures"/"ab"[i % 2]/f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path/"pictures"


@pytest.mark.slow
def test_the_published_vision_dimensions(two_classes, tmp_path):
    "d_in=768, d_sae=49152, the second-last of 12 blocks of a ViT-B/16 with random weights, CLS and 196 patches, a few steps."
    status, text, peak = papermill(TRAIN, tmp_path/"out.ipynb", "-p", "preset", "smoke", "-p", "dataset", two_classes, "-p", "model", "ViT-B-16", "-p", "d_sae", 49152,
                                   "-p", "steps", 3, "-p", "batch_size", 512, "-p", "data_options", "block_size=4 model_batch=4 templates=a_{}", "-p", "out", tmp_path/"run")
    assert status == 0, text[-3000:]
    sae, metrics = check_run(tmp_path/"run")
    assert (sae.d_in, sae.d_sae) == (768, 49152) and tuple(sae.scorer.concepts.shape) == (49152, 768)
    assert {"zs_no_sae", "zs_on_all", "mean_ms"} <= metrics["sparsemax"].keys()
    assert peak < 6, peak
