"""Shared by all tests: no network, few threads, runs in a temporary folder, GPU tests only where there is a GPU."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if "cuda" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    "Nothing a test trains lands in the checkout."
    monkeypatch.setenv("SPARSEMAX_SAE_RUNS", str(tmp_path/"runs"))


@pytest.fixture(scope="module")
def one_thread():
    "One thread for a whole module, which asks for it by `pytestmark = pytest.mark.usefixtures(\"one_thread\")`."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
