"""The published tables are what the paper prints, and their remarks speak of cells that exist."""
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparsemax_sae.metrics.evaluate import available_metrics
from sparsemax_sae.reproduce.compare import Claim, best_rows, claims, compare, judge
from sparsemax_sae.reproduce.paths import data_dir, root
from sparsemax_sae.reproduce.published import available, odd_cells, published, wide

TEXT = root().parent/"shared"/"seeds"/"sparsemax_sae.txt"


@pytest.mark.parametrize("name", available())
def test_every_number_stands_in_the_paper(name):
    if not TEXT.exists(): pytest.skip("the text of the paper is not at hand")
    printed = [[float(v) for v in re.findall(r"(?<![\w.])-?\d+\.\d+", line)] for line in TEXT.read_text().splitlines() if line.startswith("|")]
    table = pd.read_csv(data_dir("published", f"{name}.csv"))
    if "n_concepts" in table:   # two corpora stand in one line of the paper
        value = table.columns[-1]
        rows = [g[value].tolist() for _, g in table.groupby("arch", sort=False)]
    else: rows = table.select_dtypes("number").drop(columns="k", errors="ignore").values.tolist()
    assert rows and not [r for r in rows if r not in printed]


@pytest.mark.parametrize("name", available())
def test_every_number_has_a_metric_a_direction_and_a_source(name):
    item = published(name)
    ours = {k: d for cls in available_metrics().values() for k, d in cls.direction.items()}
    assert item.source.startswith("arXiv") and set(item.values) <= set(item.table)
    assert all(ours[v["metric"]] == v["direction"] for v in item.values.values())


@pytest.mark.parametrize("name", available())
def test_every_oddity_speaks_of_cells(name):
    item = published(name)
    t, odd = wide(item.table, item.columns, list(item.values)), odd_cells(item)
    assert item.oddities and odd and all(row in t.index and column in t.columns for row, column in odd)
    assert {i for at in odd.values() for i in at} == set(range(len(item.oddities)))


def test_the_remarks_say_what_the_numbers_say():
    t = published("table1_nmse").table
    assert (t[t.arch == "relu"].nmse == .064).sum() == 7
    supplement = published("supplement_zero_shot").table
    relu = supplement[(supplement.arch == "relu") & (supplement.dataset == "imagenet")].iloc[0]
    ablation = published("table3_ablation_imagenet").table.iloc[0]
    assert all(round(relu[c], 2) == pytest.approx(ablation[c], abs=.0051) for c in ("on_1", "on_5", "on_10", "on_50", "on_all"))


def test_the_papers_claims_on_its_own_numbers():
    "Table 1's holds in all eight columns; \"best under most metrics\" of table 5 does not."
    nothing = pd.DataFrame([dict(row="relu", corpus="openwebtext", width=4, nmse=np.nan)])
    assert claims(compare(published("table1_nmse"), nothing), Claim("lowest NMSE", "sparsemax"))["published"].tolist() == ["holds (8/8)"]
    c = compare(published("table5_sparsity"), pd.DataFrame([dict(row="relu")]))
    verdict = claims(c, Claim("best", "sparsemax"))
    assert verdict["published"].tolist() == ["does not hold (2/5)"] and verdict["ours"].tolist() == ["not run"]
    assert best_rows(c.theirs, map(c.direction, c.theirs.columns))[("fvu",)] == ["relu"] if isinstance(c.theirs.columns[0], tuple) else True


def test_a_gap_stays_a_gap():
    "No published number reaches our side, and the seeds are counted."
    item = published("table6_monosemanticity")
    c = compare(item, pd.DataFrame([dict(row="topk", mean_ms=v, max_ms=np.nan) for v in (.1, .3)]))
    assert c.ours.notna().to_numpy().sum() == 1 and c.seeds.loc["topk"].tolist() == [2, 0]
    assert c.ours.loc["topk"].iloc[0] == pytest.approx(.2) and c.spread.loc["topk"].iloc[0] == pytest.approx(np.std([.1, .3], ddof=1))
    assert c.delta.notna().to_numpy().sum() == 1 and c.theirs.loc["topk"].iloc[0] == .0548
    long = c.table()
    assert long["ours"].notna().sum() == 1 and long["published"].notna().sum() == 8


@pytest.mark.parametrize("direction, better, worse", [("lower", .1, .2), ("higher", .2, .1), ("zero", -.1, .2), ("zero", .1, -.2)])
def test_what_is_ahead(direction, better, worse):
    table = pd.DataFrame({"v": [better, worse]}, index=["a", "b"])
    spread = table*0
    ahead = lambda who, than: judge(table, spread, dict(v=direction), Claim("", who, (than,)))
    assert ahead("a", "b")[:2] == (1, 1) and ahead("b", "a")[:2] == (0, 1)
    assert ahead("a", "c").total == 0 and ahead("c", "a").total == 0


def test_within_the_spread():
    table, spread = pd.DataFrame({"v": [1., 1.1]}, index=["a", "b"]), pd.DataFrame({"v": [.2, .0]}, index=["a", "b"])
    assert judge(table, spread, dict(v="lower"), Claim("", "a", ("b",))) == (1, 1, 1)
    assert judge(table, spread/100, dict(v="lower"), Claim("", "a", ("b",))) == (1, 1, 0)


def test_the_page_shows_both_sides_the_marks_and_the_dashes():
    item = published("table1_nmse")
    html = compare(item, pd.DataFrame([dict(row="topk", corpus="openwebtext", width=4, nmse=.02)]), "three seeds")._repr_html_()
    assert all(o["text"].split("'")[0] in html for o in item.oddities) and "three seeds" in html
    assert "0.014" in html and "<b>0.02</b>" in html and "<td>–</td>" in html and "0.567<sup>c</sup>" in html
