"""The explorers in a real JupyterLab, in Chromium: every notebook runs, and its controls change what is shown.

Screenshots go to $SPARSEMAX_SAE_ARTEFACTS, or to the system's folder for temporary files."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from sparsemax_sae.reproduce.paths import root
from sparsemax_sae.training.config import make_config
from sparsemax_sae.training.trainer import train

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, (os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))), None)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
SETTINGS = {"@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
            "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with a small finished run on images and one on text."
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    patch.setenv("SPARSEMAX_SAE_RUNS", str(folder))
    for dataset, options in (("scenes", dict(block_size=96)), ("docs", {})):
        train(make_config("sparsemax_release", "smoke", dataset=dataset, data_options=options), progress=False)
    patch.undo()
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(runs, tmp_path_factory):
    "The address of a JupyterLab over copies of the explorers' notebooks, with folders of its own for everything it writes."
    home, port = tmp_path_factory.mktemp("lab"), free_port()
    shutil.copytree(root()/"nbs"/"explorers", home/"notebooks")
    for path in (home/"notebooks").glob("*.ipynb"):
        content = json.loads(path.read_text())
        for cell in content["cells"]:
            if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
        path.write_text(json.dumps(content))
    for name, value in SETTINGS.items():
        (file := home/"settings"/name).parent.mkdir(parents=True, exist_ok=True); file.write_text(json.dumps(value))
    own = dict(JUPYTER_CONFIG_DIR=home/"config", JUPYTER_DATA_DIR=home/"data", JUPYTER_RUNTIME_DIR=home/"runtime", IPYTHONDIR=home/"ipython", JUPYTERLAB_SETTINGS_DIR=home/"settings",
               JUPYTERLAB_WORKSPACES_DIR=home/"workspaces", MPLCONFIGDIR=home/"mpl", SPARSEMAX_SAE_RUNS=runs, SPARSEMAX_SAE_ROOT=root(), OMP_NUM_THREADS=1, HF_HUB_OFFLINE=1)
    log = open(home/"log.txt", "w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=", "--allow-root",
                               f"--ServerApp.root_dir={home/'notebooks'}", "--ServerApp.disable_check_xsrf=True"], env=os.environ | {k: str(v) for k, v in own.items()}, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server, home/"log.txt")
        yield address
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


def wait_for(address, server, log, seconds=60):
    for _ in range(seconds*5):
        if server.poll() is not None: raise RuntimeError(f"JupyterLab ended: {log.read_text()[-2000:]}")
        try: return urllib.request.urlopen(f"{address}/api/status", timeout=2).read()
        except OSError: time.sleep(.2)
    raise RuntimeError(f"JupyterLab did not start within {seconds} s: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        one = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield one
        one.close()


def artefacts_folder():
    "Where screenshots go."
    folder = Path(os.environ.get("SPARSEMAX_SAE_ARTEFACTS") or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Notebook:
    "A notebook in a page of JupyterLab, all of its cells run."
    def __init__(self, page, address, name):
        self.page, self.name = page, name
        page.goto(f"{address}/lab/workspaces/{name}/tree/{name}.ipynb?reset")
        page.locator(".jp-NotebookPanel .jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=120_000)
        self.until(self.run_all)
        self.box = page.locator(".jp-OutputArea-output .widget-vbox").first
        try: self.box.wait_for(timeout=120_000)
        except playwright.TimeoutError as e:
            self.keep(artefacts_folder(), "_failed")
            raise AssertionError(f"{name}: no widgets came; the page says {page.locator('.jp-NotebookPanel').first.inner_text()[-1500:]!r}") from e
        self.idle()
        self.box.scroll_into_view_if_needed()

    def run_all(self):
        "Run all cells; True once they do. Before the kernel has connected, JupyterLab ignores the command."
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_timeout(500)
        return any(p.strip("[]: ") for p in self.page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts())

    def idle(self): self.page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(timeout=120_000)

    def until(self, probe, seconds=60):
        "The value of `probe()` once it is true."
        for _ in range(seconds*20):
            if value := probe(): return value
            self.page.wait_for_timeout(50)
        self.keep(artefacts_folder(), "_failed")
        raise AssertionError(f"{self.name}: it never came; the page says {self.page.locator('.jp-NotebookPanel').first.inner_text()[-1500:]!r}")

    def changed(self, before, i=-1):
        "Whether the picture number `i` is another than `before`."
        return (now := self.source(i)) is not None and now != before

    def fact(self, name):
        "The number in the table of the box below `name`."
        cell = self.box.locator("td", has=self.page.get_by_text(name, exact=True)).first
        return cell.locator("b").inner_text() if cell.count() else None

    def source(self, i=-1):
        "What the picture number `i` of the box is."
        pictures = self.box.locator("img.widget-image")
        return self.page.evaluate("""async (url) => { try { const b = new Uint8Array(await (await fetch(url)).arrayBuffer()); let h = 0; for (const x of b) h = (31*h + x) >>> 0; return b.length + ":" + h } catch (e) { return null } }""",   # null: it has just been replaced
                                 
                                  pictures.nth(i if i >= 0 else pictures.count() + i).get_attribute("src"))

    def contexts(self):
        "The texts below the table of the box."
        return self.box.locator(".widget-html-content", has=self.page.locator("div > b")).last.inner_text()

    def number(self, label, value):
        "Type `value` into the number field `label`."
        field = self.box.locator(".widget-text", has_text=label).locator("input")
        field.fill(str(value)); field.press("Enter"); field.press("Tab")

    def slide(self, label, key, times=1):
        "Press `key` on the slider `label`."
        handle = self.box.locator(".widget-hslider", has=self.page.get_by_text(label, exact=True)).locator(".noUi-handle")
        handle.focus()
        for _ in range(times): handle.press(key)

    def keep(self, folder, what=""):
        self.page.screenshot(path=str(folder/f"{self.name}{what}.png"))


@pytest.fixture
def artefacts(): return artefacts_folder()


@pytest.fixture
def open_notebook(browser, lab):
    pages = []
    def open_one(name):
        pages.append(browser.new_page(viewport=dict(width=1280, height=1500)))
        return Notebook(pages[-1], lab, name)
    yield open_one
    for page in pages: page.close()


def test_concepts(open_notebook, artefacts):
    n = open_notebook("concepts")
    first, shown = n.until(lambda: n.fact("concept")), n.contexts()
    n.slide("Rank", "ArrowRight", 3)
    n.until(lambda: n.box.get_by_text(re.compile("^rank 4 of ")).count())
    assert n.fact("concept") != first and n.contexts() != shown
    n.number("Concept", 9999)
    n.until(lambda: "there is no concept 9999: they are 0…255." in n.box.inner_text())
    n.keep(artefacts)
    n.number("Concept", 12)
    n.until(lambda: n.fact("concept") == "12")
    assert "there is no concept" not in n.box.inner_text()


def test_images(open_notebook, artefacts):
    n = open_notebook("images")
    n.until(lambda: n.fact("token"))
    photo, maps = n.until(lambda: n.source(0)), n.until(n.source)
    buttons = n.box.locator(".widget-gridbox button")
    assert buttons.count() == 64
    buttons.nth(18).click()
    n.until(lambda: n.fact("token") == "patch in row 2, column 2")
    n.until(lambda: n.changed(photo, 0) and n.changed(maps))
    l0, options = int(n.fact("its active concepts (L0)")), n.box.locator("select[size] option")
    n.until(lambda: options.count() == l0)
    maps = n.until(n.source)
    n.box.locator("select[size]").first.select_option(index=min(3, l0 - 1))
    n.until(lambda: n.changed(maps))
    n.keep(artefacts)
    n.box.get_by_role("button", name="CLS").click()
    n.until(lambda: n.fact("token") == "CLS token")
    n.number("Test image", 5000)
    n.until(lambda: "there is no test image 5000" in n.box.inner_text())


def test_sparsity(open_notebook, artefacts):
    n = open_notebook("sparsity")
    l0 = lambda: int(n.until(lambda: n.fact("active concepts (L0)")).split()[0])
    before, picture, scale = l0(), n.until(n.source), n.fact("score scale")
    n.slide("Score scale", "ArrowRight", 30)
    n.until(lambda: n.fact("score scale") == f"{float(scale)*10**.3:.4g}")
    n.until(lambda: n.changed(picture))
    assert l0() < before and float(n.fact("sum of the codes")) == pytest.approx(1, abs=2e-3)
    n.keep(artefacts)
    n.box.get_by_role("button", name="top-k").click()
    n.until(lambda: n.fact("k-th score"))
    n.slide("k", "ArrowLeft", 5)
    n.until(lambda: n.fact("k") and l0() == 27)
    n.keep(artefacts, "_topk")


def test_text(open_notebook, artefacts):
    n = open_notebook("text")
    n.until(lambda: n.fact("token"))
    tokens = n.box.locator("[class*=sae-tokens] > button")
    colour = lambda i: tokens.nth(i).evaluate("e => getComputedStyle(e).backgroundColor")
    n.box.locator("textarea").fill("def mean(x):\n    return sum(x) / len(x)")
    n.box.get_by_role("button", name="Read").click()
    n.until(lambda: any("return" in t for t in tokens.all_inner_texts()) and tokens.count() < 40)
    at = next(i for i, t in enumerate(tokens.all_inner_texts()) if "return" in t)
    tokens.nth(at).click()
    n.until(lambda: (n.fact("token") or "").startswith(f"{at}: "))
    options = n.box.locator("select[size] option")
    n.until(lambda: options.count() == int(n.fact("its active concepts (L0)")))
    label = options.nth(2).inner_text().replace("\xa0", " ").split(" · ")
    n.box.locator("select[size]").first.select_option(index=2)
    n.until(lambda: n.fact("concept") == label[0] and n.fact("its activation here") == label[1])
    n.until(lambda: f"Where else {label[0]} fires most" in n.box.inner_text())
    coloured = sum(colour(i) != "rgb(255, 255, 255)" for i in range(tokens.count()))
    assert colour(at) != "rgb(255, 255, 255)" and n.fact("it fires on") == f"{coloured} of {tokens.count()} tokens"
    n.keep(artefacts)
