"""The site: formulas are MathML, directives are gone, links are checked by name, nothing is fetched from elsewhere, chapters are in reading order."""
import re
from base64 import b64decode
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from sparsemax_sae.reproduce import site

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")   # between myst-nb and sphinx
TOOLS = all(map(find_spec, ("sphinx", "myst_nb", "furo", "latex2mathml")))
needs_tools = pytest.mark.skipif(not TOOLS, reason="needs sphinx, myst-nb, furo and latex2mathml")
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider(value=3)"}


def notebook(path: Path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells), metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))), path)


def said(**data): return new_output("display_data", {k.replace("_", "/"): v for k, v in data.items()})


def project(root: Path, link: str = "../ops/00_first.ipynb") -> Path:
    "A project of four notebooks and a front page."
    notebook(root/"nbs"/"index.ipynb", new_markdown_cell("# Front\n\n[train](nbs/train.ipynb) ![p](../figures/p.png)"),
             new_code_cell("secret_input = 1", outputs=[said(text_markdown="| a | b |\n|---|---|\n| $x^2$ | [first](nbs/ops/00_first.ipynb) |")]))
    notebook(root/"nbs"/"train.ipynb", new_markdown_cell("# Train\n\n> Summary.\n\nSee `ops/00_first`, not `ops/absent`."))
    notebook(root/"nbs"/"ops"/"00_first.ipynb", new_markdown_cell("# First $\\tau$\n\n> Summary.\n\nInline $\\tfrac12\\lVert x\\rVert$ and\n\n$$\\operatorname{f}(s)=\\arg\\min_p p.\\tag{Eq. 4}$$"),
             new_code_cell("#| default_exp ops.first"), new_code_cell("#| hide\nhidden_name = 1"), new_code_cell("#| export\nshown_name = 1"),
             new_code_cell("slider", outputs=[new_output("display_data", WIDGET)]), new_code_cell("picture", outputs=[said(**{"image_png": PNG})]),
             new_code_cell("table", outputs=[said(text_html="<table><tr><td>cell of a table</td></tr></table>")]))
    notebook(root/"nbs"/"ops"/"10_second.ipynb", new_markdown_cell("# Second\n\n> Summary.\n\n## Part\n\n[numbers](../../data/results/x.csv), [part](#part), [out](https://arxiv.org)"))
    notebook(root/"nbs"/"saes"/"relu.ipynb", new_markdown_cell(f"# ReLU\n\n> Summary.\n\n[link]({link})"))
    for name, data in {"figures/p.png": b64decode(PNG), "data/results/x.csv": b"a,b\n1,2\n", "settings.ini": b""}.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(data)
    return root


def build(root: Path, monkeypatch, **kwargs):
    monkeypatch.setenv("SPARSEMAX_SAE_ROOT", str(project(root, **kwargs)))
    return site.build(jobs=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A report and the folder it is about, built once."
    if not TOOLS: pytest.skip("needs sphinx, myst-nb, furo and latex2mathml")
    with pytest.MonkeyPatch.context() as m:
        root = tmp_path_factory.mktemp("project")
        return build(root, m), root/"_docs"


def article(built, name: str) -> str:
    "The main part of a page."
    return re.search(r'<article.*?</article>', (built[1]/name).read_text(), re.S)[0]


def test_a_good_site_has_no_problems(built):
    report, out = built
    assert not report.problems() and report.pages >= 5 and not report.tex
    assert report.external and all(l.startswith("http") for l in report.external)
    assert "https://arxiv.org" in report.external


def test_formulas_are_mathml_inline_displayed_in_headings_and_tables(built):
    page = article(built, "nbs/ops/00_first.html")
    assert page.count("<math ") == 3 and "(Eq. 4)" in page and not re.search(r"[$]|\\(tau|tag|arg)", re.sub(r'alttext="[^"]*"', "", page))
    assert re.search(r"<h1>.*<math .*τ.*</h1>", page)
    assert re.search(r"<td>.*<math ", article(built, "index.html"))


def test_directives_and_hidden_cells_are_gone(built):
    page = article(built, "nbs/ops/00_first.html")
    assert "shown_name" in page and "hidden_name" not in page and "default_exp" not in page and not re.search(r"#\s*\|", page)
    assert "secret_input" not in article(built, "index.html")


def test_outputs_are_shown_and_widgets_become_text(built):
    page = article(built, "nbs/ops/00_first.html")
    assert "cell of a table" in page and "IntSlider(value=3)" in page and "<img" in page and "widget-view" not in page


def test_links_lead_to_pages_and_to_files_that_were_copied(built):
    assert 'href="nbs/train.html"' in article(built, "index.html") and 'href="nbs/ops/00_first.html"' in article(built, "index.html")
    assert 'href="../ops/00_first.html"' in article(built, "nbs/saes/relu.html")
    assert 'href="ops/00_first.html"' in article(built, "nbs/train.html") and "absent.html" not in article(built, "nbs/train.html")
    csv = re.search(r'href="([^"]*x\.csv)"', article(built, "nbs/ops/10_second.html"))[1]
    assert (built[1]/"nbs"/"ops"/csv).resolve().read_text().startswith("a,b")


def test_the_sidebar_has_the_reading_order(built):
    sidebar = re.search(r'class="sidebar-tree".*?</div>', (built[1]/"index.html").read_text(), re.S)[0]
    assert re.findall(r'href="nbs/([^"]+)\.html"', sidebar) == ["train", "ops/00_first", "ops/10_second", "saes/relu"]
    captions = re.findall(r'class="caption-text">([^<]+)', sidebar)
    assert captions == ["Start here", site.readme.CHAPTERS["ops"], site.readme.CHAPTERS["saes"]]


def test_no_page_loads_anything_from_another_host(built):
    pages = {p: site.read_page(p) for p in built[1].rglob("*.html")}
    loads = [t for page in pages.values() for t in page.loads]
    assert loads and not [t for t in loads if site.elsewhere(t)]
    scripts = "".join(re.sub(r"/\*.*?\*/", "", p.read_text(), flags=re.S) for p in built[1].rglob("*.html"))
    assert not re.search(r"mathjax|require\.js|cdn\.|unpkg|googleapis", scripts, re.I)


def test_search_is_local(built):
    assert (built[1]/"searchindex.js").is_file() and "searchindex.js" in (built[1]/"search.html").read_text()


@needs_tools
def test_a_broken_link_is_reported_by_name(tmp_path, monkeypatch, capsys):
    report = build(tmp_path, monkeypatch, link="../ops/20_absent.ipynb")
    named = [p for p in report.problems() if "saes/relu" in p and "20_absent" in p]
    assert named and all("saes/relu" in p for p in report.problems())
    assert site.main([str(tmp_path/"_docs")]) == 1 and "20_absent" in capsys.readouterr().out


def test_check_finds_missing_files_missing_anchors_and_foreign_loads(tmp_path):
    (tmp_path/"sub").mkdir()
    (tmp_path/"a.html").write_text('<h1 id="one"></h1><a href="sub/b.html#two">x</a><a href="no.html?q=1">x</a><a href="#one">x</a><a href="mailto:a@b.c">x</a>')
    (tmp_path/"sub"/"b.html").write_text('<a href="../a.html#%6fne">x</a><script src="https://cdn.net/x.js"></script><img srcset="c.png 2x, //cdn.net/d.png 3x">'
                                         '<p style="background: url(\'http://cdn.net/e.png\')"></p><code class="tex-source">\\nosuch</code>')
    (tmp_path/"s.css").write_text('@import "https://fonts.net/f.css"; a { background: url(data:image/png;base64,x) }')
    report = site.check(tmp_path)
    assert report.broken == ["a.html → no.html?q=1", "a.html → sub/b.html#two", "sub/b.html → c.png"]
    assert report.foreign == ["s.css → https://fonts.net/f.css", "sub/b.html → //cdn.net/d.png", "sub/b.html → http://cdn.net/e.png", "sub/b.html → https://cdn.net/x.js"]
    assert report.tex == ["sub/b.html: \\nosuch"] and report.problems()


def test_a_folder_that_is_not_a_site_is_left_alone(tmp_path):
    (tmp_path/"new").mkdir(), (tmp_path/"old").mkdir()
    (tmp_path/"old"/"thesis.tex").touch()
    with pytest.raises(ValueError, match="not a built site"): site.replace(tmp_path/"new", tmp_path/"old")
    assert (tmp_path/"old"/"thesis.tex").exists()


@needs_tools
@pytest.mark.parametrize("tex, has", [
    (r"\mathbb 1[\operatorname{sparsemax}(s)>0]", "𝟙"), (r"\mathbb R^{\mathsf T}", "ℝ"), (r"\mathcal L", "ℒ"), (r"\mathbf 1_S", "𝟏"), (r"\texttt{a\_b}", "𝚊_𝚋"),
    (r"\Big\|\sum_i a_i\Big\|^2", "‖"), (r"\Big\{r\Big\}", "{"), (r"\arg\min_{p}f", "<munder>"), (r"x:=1", "≔"), (r"c\sim U", "∼"), (r"\Delta", 'mathvariant="normal"'),
    (r"\begin{cases}a&b\\c&d\end{cases}", "<mtable"), (r"\begin{aligned}a&=b\\c&=d\end{aligned}", "<mtable"), (r"\begin{pmatrix}a\\b\end{pmatrix}^\top", "<msup><mrow>"),
    (r"\xrightarrow{\text{to}}", 'stretchy="true">→'), (r"49{,}152", "<mtext>,</mtext>"), (r"=-x", 'form="prefix"')])
def test_formulas(tex, has):
    html = site.formula(tex)
    assert has in html and "\\" not in re.sub(r'alttext="[^"]*"', "", html) and "tex-source" not in html


@needs_tools
def test_a_formula_that_is_not_understood_stays_readable():
    assert site.formula(r"\nosuch{x} < 1", block=True) == r'<span class="math-block"><code class="tex-source">\nosuch{x} &lt; 1</code></span>'
    with pytest.raises(ValueError, match="nosuch"): site.to_mathml(r"\nosuch")
