"""The page of an audit: what it tells, and that it stands alone and fits a desktop and a phone."""

import re

import numpy as np
import pytest
from support.browser import CHROMIUM, browser

from unlearn.audit import base, page
from unlearn.audit.base import Figure, Rule
from unlearn.audit.relearning import Relearning, RelearningOptions
from unlearn.audit.statistics import Estimate
from unlearn.run import Run


def estimate(value: float) -> Estimate:
    return Estimate(value, np.linspace(value - 0.1, value + 0.1, 50))


def make_document() -> dict:
    """One test with a curve, of an original, an unlearned model and two oracles."""
    names = ("original", "unlearned", "oracle", "oracle 2")
    curves = {name: [(float(x), 10.0 + i + x) for x in (0, 1, 2)] for i, name in enumerate(names)}
    figures = [
        Figure("lead_forget", "trained on <forget>: lead",
            {n: estimate(v) for n, v in zip(names, (5.0, 3.0, 0.0, 1.0), strict=True)},
               Rule("above", 1), 2, curves, note="A note."),
    ]  # fmt: skip
    judgements = [j for figure in figures if (j := base.judge(figure, 0.95))]
    test = base.document(Relearning(RelearningOptions()), figures, judgements, 0.95)
    about = {"images": 7, "classes": ["a"], "manifest": "0" * 64}
    return {
        "software": "unlearn 0", "name": "test", "config_hash": "1" * 64, "weights": dict.fromkeys(names, "2" * 64),
        "verdict": test["verdict"],
        "reasons": ["Relearning: FAIL"], "tests": ["relearning"], "relearning": test, "sets": {"forget": about},
        "seconds": {"total": 1.0},
        "settings": {"confidence": 0.95, "resamples": 100, "seed": 0},
    }  # fmt: skip


@pytest.fixture
def written(tiny_run):
    run = Run(tiny_run(), {}, {}, {}, 1)
    uri = page.write(run, make_document())
    with open(uri) as file:
        yield uri, file.read()


def test_it_tells_verdicts_figures_and_what_is_not_shown(written):
    _, html = written
    assert 'Verdict: <span class="FAIL">FAIL</span>' in html and "It cannot show this:" in html
    assert "<td>3.00 [2.90, 3.10]</td><td>0.50 [" in html, "several oracles are one column"
    assert "trained on &lt;forget&gt;" in html and "A note." in html and html.count("<polyline") == 4
    assert not re.search(r"https?:|@import|url\(|<script|<link|<iframe|srcset|<img", html)


def test_several_oracles_tell_their_mean_and_spread():
    row = make_document()["relearning"]
    assert (
        row["oracle"]["lead_forget"] == 0.5
        and row["oracle 1"]["lead_forget"] == 0
        and row["oracle 2"]["lead_forget"] == 1
    )
    assert row["oracle"]["lead_forget_spread"] == pytest.approx(0.5**0.5, abs=1e-6)


def test_the_terminal_table_names_verdict_and_figures():
    import io

    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(page.table(make_document()))
    told = console.export_text()
    assert "audit: FAIL" in told and "3.00" in told and "beyond the margin" in told


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_it_fits_a_desktop_and_a_phone(written, tmp_path):
    from pathlib import Path

    with browser(tmp_path / "profile") as tab:
        for width in (1280, 360):
            tab.open(Path(written[0]), width)
            assert tab.complaints == [] and tab.run("document.documentElement.scrollWidth <= innerWidth")
            assert tab.run("document.querySelector('h1').getBoundingClientRect().width > 0")
