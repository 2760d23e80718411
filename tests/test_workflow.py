"""One command for all items, in a little house of its own: what is listed, what runs, what does not run again, and how a failure is told."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from sparsemax_sae.reproduce import workflow
from sparsemax_sae.reproduce.paths import root
from sparsemax_sae.reproduce.workflow import imported, items, read_notebook, times, tree_of, why

SNAKEFILE = root()/"Snakefile"
needs_snakemake = pytest.mark.skipif(importlib.util.find_spec("snakemake") is None, reason="needs snakemake, of the extra [workflow]")
OWN = "import os, sys; sys.path.insert(0, os.environ['SPARSEMAX_SAE_ROOT'])"      # the library of the house, whatever PYTHONPATH says
HEAD = "# {0}\n\n> A test item.\n\n    papermill nbs/paper/{0}.ipynb runs/x.ipynb -p preset laptop -p publish True"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def notebook(house, name, *code, head=HEAD, output=None):
    "A paper notebook: title and command line, parameters, code."
    cells = [nbformat.v4.new_markdown_cell(head.format(name)), nbformat.v4.new_code_cell('preset: str = ""\npublish: bool = False\ndataset: str = ""', metadata=dict(tags=["parameters"]))]
    nb = nbformat.v4.new_notebook(cells=cells + [nbformat.v4.new_code_cell(c) for c in code], metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")))
    if output: nb.cells[-1].outputs = [nbformat.v4.new_output("stream", text=output)]
    (house/"nbs"/"paper").mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, house/"nbs"/"paper"/f"{name}.ipynb")


def build(house, monkeypatch):
    "A library in which `used` is imported by nobody but the item `one`, through `api`; and the items one, and two for two data sets."
    monkeypatch.setenv("SPARSEMAX_SAE_ROOT", str(house)); monkeypatch.setenv("SPARSEMAX_SAE_RUNS", str(house/"runs"))
    library = house/"sparsemax_sae"
    write(library/"__init__.py", ""); write(library/"api.py", "from .parts.used import x"); write(library/"free.py", "y = 1")
    write(library/"parts"/"__init__.py", ""); write(library/"parts"/"used.py", '"A module."\nx = 1'); write(house/"data"/"published"/"table.csv", "a\n1\n")
    notebook(house, "one", OWN, "from sparsemax_sae.api import x\nprint(preset, publish, x)", "print('threads', os.environ['OMP_NUM_THREADS'])")
    line = "\n    papermill nbs/paper/two.ipynb runs/x.ipynb -p preset laptop -p dataset "
    notebook(house, "two", "print(dataset)", head=f"# {{0}}\n\n> Twice.\n{line}docs{line}'other {{{{x}}}}'")
    return house


def snakemake(*args):
    "(exit status, all that was printed)"
    house = os.environ["SPARSEMAX_SAE_ROOT"]
    done = subprocess.run([sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), *args], cwd=house, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def printed(house, name, preset="laptop"):
    nb = read_notebook(house/"runs"/"workflow"/preset/f"{name}.ipynb")
    return "".join("".join(o.get("text", "")) for c in nb["cells"] for o in c.get("outputs", []))


def stamps(house, preset="laptop"): return {json.loads(p.read_text())["item"]: (p.name, p.stat().st_mtime_ns) for p in (house/"runs"/"workflow"/preset).glob("*.json")}


def reasons(preset="laptop"): return {item.name: why(item) for item in items(preset)}


@needs_snakemake
@pytest.mark.slow
def test_the_life_of_a_workflow(tmp_path, monkeypatch):
    house = build(tmp_path, monkeypatch)
    notebook(house, "wrong", "print('so far')", "1/0")
    assert set(reasons().items()) == {(name, "never run") for name in ("one", "two_docs", "two_other_x_", "wrong")}
    status, text = snakemake("-c2")                                     # one of four fails: the others are done, and its notebook is kept
    assert status != 0 and "open runs/workflow/laptop/wrong.ipynb" in text and "ZeroDivisionError: division by zero" in text, text
    assert set(first := stamps(house)) == {"one", "two_docs", "two_other_x_"} == set(times().index) - {"total"}
    assert printed(house, "one") == "laptop True 1\nthreads 1\n" and printed(house, "two_other_x_") == "other {x}\n"
    assert "so far" in printed(house, "wrong") and "ZeroDivisionError" in (house/"runs"/"workflow"/"laptop"/"wrong.ipynb").read_text()
    stamp = json.loads((house/"runs"/"workflow"/"laptop"/first["two_docs"][0]).read_text())
    assert stamp["preset"] == "laptop" and stamp["seconds"] > 0 and stamp["finished"] and stamp["parameters"] == dict(preset="laptop", publish="True", dataset="docs")
    assert reasons()["wrong"] == "failed" and times().seconds["total"] == sum(times().seconds[:-1])

    notebook(house, "wrong", "print('mended')")                        # what changes nothing: dates, prose, outputs, comments, docstrings, other modules; and a lost record
    notebook(house, "one", OWN, "from sparsemax_sae.api import x\nprint(preset, publish,   x)  # said", "print('threads', os.environ['OMP_NUM_THREADS'])", head=HEAD + "\n\nMore prose.", output="old")
    write(house/"sparsemax_sae"/"parts"/"used.py", '"Another docstring."\nx = 1  # one'); write(house/"sparsemax_sae"/"free.py", "y = 2"); (house/"nbs"/"paper"/"two.ipynb").touch()
    subprocess.run(["rm", "-r", str(house/".snakemake")], check=True)
    status, text = snakemake("-c2")
    second = stamps(house)
    assert status == 0 and "wrong" in second and {k: second[k] for k in first} == first, text

    write(house/"sparsemax_sae"/"parts"/"used.py", "x = 2")             # what does
    assert reasons() == dict(one="library changed", two_docs="done", two_other_x_="done", wrong="done")
    notebook(house, "wrong", "print('mended again')")
    assert reasons()["wrong"] == "notebook changed"
    notebook(house, "wrong", "print('mended')")
    status, text = snakemake("-c2")
    third = stamps(house)
    assert status == 0 and {k for k in third if third[k] != second[k]} == {"one"} and printed(house, "one").startswith("laptop True 2"), text
    status, text = snakemake("-c2")
    assert status == 0 and "Nothing to be done" in text and stamps(house) == third


@needs_snakemake
def test_the_graph_and_a_choice_of_items(tmp_path, monkeypatch):
    build(tmp_path, monkeypatch)
    status, text = snakemake("--dag", "--config", "items=two", "preset=gpu")
    assert status == 0 and "digraph" in text and "two_docs" in text and '"one' not in text
    with pytest.raises(ValueError, match="Did you mean 'two'"): items("gpu", ["tow"])


@needs_snakemake
def test_the_repository_lists_every_paper_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMAX_SAE_ROOT", str(root()))
    done = subprocess.run([sys.executable, "-m", "snakemake", "-n", "--directory", str(tmp_path), "--config", "preset=smoke"], cwd=root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = items("smoke")
    assert {i.notebook for i in found} == set((root()/"nbs"/"paper").glob("*.ipynb")) and len({i.name for i in found}) == len(found)
    assert all(f"{i.name}, preset smoke: never run" in done.stdout + done.stderr for i in found)


# ------------------------------------------------------------------ without snakemake

def test_what_an_item_depends_on(tmp_path, monkeypatch):
    house = build(tmp_path, monkeypatch)
    digests = lambda preset="laptop": {i.name: i.digests for i in items(preset)}
    changed = lambda before, after: {(n, k) for n in before for k in before[n] if before[n][k] != after[n][k]}
    all_of = lambda what: {(n, what) for n in ("one", "two_docs", "two_other_x_")}
    start = digests()
    assert changed(start, digests("gpu")) == all_of("parameters")
    write(house/"data"/"published"/"table.csv", "a\n2\n")
    assert changed(start, digests()) == all_of("data")
    write(house/"data"/"published"/"table.csv", "a\n1\n"); write(house/"data"/"results"/"one"/"laptop.csv", "a\n2\n")
    assert digests() == start
    write(house/"sparsemax_sae"/"parts"/"new.py", "z = 1")
    assert digests() == start
    write(house/"sparsemax_sae"/"api.py", 'from .parts.used import x\ndiscover("sparsemax_sae.parts")')                   # now a new module is a use
    one = digests(); write(house/"sparsemax_sae"/"parts"/"newer.py", "z = 2")
    assert changed(one, digests()) == {("one", "library")}


@pytest.mark.parametrize("code", ["%time from sparsemax_sae.api import x", "from sparsemax_sae import api", "import sparsemax_sae.api", "def f():\n    import sparsemax_sae.api as a"])
def test_ways_to_import(code, tmp_path, monkeypatch):
    house = build(tmp_path, monkeypatch)
    notebook(house, "one", code)
    before = items()[0].digests["library"]
    write(house/"sparsemax_sae"/"parts"/"used.py", "x = 3")
    assert (items()[0].digests["library"] == before) == code.startswith("%")


@needs_snakemake
def test_what_took_most_runs_is_begun_first(tmp_path, monkeypatch):
    "With a stand-in for papermill that notes what it is asked for."
    house = build(tmp_path, monkeypatch)
    write(house/"papermill.py", "import sys; from pathlib import Path; open('order.txt', 'a').write(Path(sys.argv[2]).stem + ' ')")
    for name, preset, runs in (("two_other_x_", "gpu", 3), ("one", "laptop", 2)): write(house/"data"/"results"/name/f"{preset}.json", json.dumps(dict(rows=dict.fromkeys(map(str, range(runs)), {}))))
    assert {i.name: i.runs for i in items()} == dict(one=2, two_docs=0, two_other_x_=3)
    status, text = snakemake("-c1")
    assert status == 0 and (house/"order.txt").read_text() == "two_other_x_ one two_docs ", text


def test_smoke_does_not_publish_and_gpus_are_counted(tmp_path, monkeypatch):
    build(tmp_path, monkeypatch)
    assert {i.parameters["publish"] for i in items("smoke")} == {"False"} and {i.parameters["publish"] for p in ("laptop", "gpu", "paper") for i in items(p)} == {"True"}
    assert [items(p)[0].gpus for p in ("smoke", "laptop", "gpu", "paper")] == [0, 0, 1, 1]


@pytest.mark.parametrize("said, runs", [("", 1), ("RuntimeError: Kernel didn't respond in 60 seconds", 3), ("RuntimeError: Kernel died before replying to kernel_info", 3), ("ValueError", 1)])
def test_a_kernel_that_does_not_come_up_is_started_again(said, runs, tmp_path, monkeypatch):
    "With a stand-in for papermill that counts its runs, says something and, if it is not nothing, fails."
    house = build(tmp_path, monkeypatch)
    write(house/"papermill.py", f"import sys; open('runs.txt', 'a').write('x'); print({said!r}); sys.exit({bool(said)})")
    monkeypatch.chdir(house); item = items()[0]
    Path(item.stamp).parent.mkdir(parents=True); old = Path(item.stamp.replace("-", "-0")); old.touch()
    done = subprocess.run(["bash", "-c", "set -euo pipefail; " + item.command], capture_output=True, text=True)
    assert (house/"runs.txt").read_text() == "x"*runs and not old.exists() and Path(item.printed).read_text().strip() == said
    assert Path(item.stamp).exists() == (done.returncode == 0) == (not said) and (f"open {item.executed}" in done.stderr) == bool(said)


@pytest.mark.parametrize("lines, message", [(["-p preset"], "what the workflow understands"), (["-y 1 2"], "what the workflow understands"), (["", ""], "same item")])
def test_command_lines_that_are_wrong(lines, message, tmp_path, monkeypatch):
    house = build(tmp_path, monkeypatch)
    notebook(house, "two", "1", head="# {0}\n" + "".join(f"\n    papermill nbs/paper/two.ipynb out.ipynb {line}" for line in lines))
    with pytest.raises(ValueError, match=message): items()


def test_no_notebook(tmp_path, monkeypatch):
    house = build(tmp_path, monkeypatch)
    write(house/"nbs"/"paper"/"broken.ipynb", "{")
    with pytest.raises(ValueError, match="broken.ipynb cannot be read as a notebook"): items()


def test_a_notebook_that_takes_no_parameters(tmp_path, monkeypatch):
    house = build(tmp_path, monkeypatch)
    path = house/"nbs"/"paper"/"two.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(ValueError, match="two.ipynb has no cell with the tag `parameters`"): items()


def test_the_module_needs_no_snakemake():
    assert not {n for n in imported(tree_of(Path(workflow.__file__).read_text())) if n.startswith("snakemake")}
