"""The report: what it concludes, that it stands alone, and that it can be read by everyone."""

import copy
import io
import json
import re
from html.parser import HTMLParser

import pytest
from support import runs
from support.browser import CHROMIUM, browser

from unlearn import config
from unlearn.data.storage import Storage
from unlearn.evaluation import report
from unlearn.evaluation.verdict import verdict
from unlearn.models import weights

VIEWS = ["centre 0.5", "random 0.5"]


def row(generator, name, view=VIEWS[0], cosine=0.8, psnr=15.0, std=0.1, images=100) -> dict:
    figures = {"cosine": cosine, "psnr": psnr, "ssim": 0.5, "lpips": 0.25, "fid": 120.0, "kid": 0.125, "is": 2.0}
    ends = {f"{key}{end}": 0.9 * value for key, value in figures.items() for end in ("_low", "_high")}
    about = {"generator": generator, "set": name, "view": view, "images": images}
    return about | figures | ends | {"is_std": 0.1, "cosine_std": std}


def make_document(forget=(0.8, 0.5), retain=(0.8, 0.8), oracle=None) -> dict:
    """Figures with these cosines (before, after); the second view says the contrary of the first."""
    rows = [
        row(generator, name, view, values[i] if view == VIEWS[0] else values[1 - i])
        for name, values in (("forget", forget), ("retain", retain)) for view in VIEWS
        for i, generator in enumerate(("original", "unlearned"))
    ]  # fmt: skip
    rows += (
        [] if oracle is None else [row("oracle", name, view, oracle) for name in ("forget", "retain") for view in VIEWS]
    )
    about = {"images": 100, "classes": [1], "manifest": "0" * 64, "split": "held-out", "bad_images": 0}
    return {
        "software": "unlearn 0", "name": "test", "config_hash": "1" * 64, "features": "efficientnet_lite0",
        "resize": "bicubic", "views": VIEWS,
        "generators": ["original", "unlearned"] + ([] if oracle is None else ["oracle"]),
        "sets": {"forget": about, "retain": about}, "weights": {"unlearned": "2" * 64}, "rows": rows,
        "notes": ["A <note> & more."], "seconds": {"total": 1.0},
        "training_seconds": 90.0,
    }  # fmt: skip


def test_the_verdict_follows_the_figures():
    headline, sentences = verdict(make_document())
    assert headline.startswith("The forget set is reconstructed worse than before, the retain set as well")
    assert "of 0.500, before 0.800" in sentences[0] and "forget" in sentences[0]
    assert "of 0.800, before 0.800" in sentences[1] and "retain" in sentences[1]
    assert verdict(make_document(forget=(0.8, 0.81)))[0] == "No forgetting can be seen."
    assert "lost 3.0 times" in verdict(make_document(retain=(0.8, 0.7)))[0]
    assert verdict(make_document(retain=(0.8, 0.4)))[0].startswith("Not selective")


def test_a_change_within_chance_is_no_change():
    # The standard error of the difference is 0.1 * sqrt(2 / 100) = 0.014.
    assert verdict(make_document(forget=(0.8, 0.775)))[0] == "No forgetting can be seen."
    assert verdict(make_document(forget=(0.8, 0.765)))[0] != "No forgetting can be seen."


def test_the_oracle_is_the_measure():
    assert "75% of the way" in verdict(make_document(oracle=0.4))[1][-1]
    assert "gone further" in verdict(make_document(oracle=0.6))[1][-1]
    assert "no measure of forgetting" in verdict(make_document(oracle=0.9))[1][-1]


def test_without_an_unlearned_model_or_an_original_nothing_is_concluded():
    document = make_document()
    before = copy.deepcopy(document) | {"generators": ["original"]}
    assert verdict(before)[0] == "Nothing has been unlearned yet."
    alone = document | {
        "rows": [r for r in document["rows"] if r["generator"] == "unlearned"],
        "generators": ["unlearned"],
    }
    assert verdict(alone)[0] == "There is nothing to compare."


def test_ticks_are_round_and_reach_the_top():
    for high in (0.003, 0.7, 1, 4.2, 9.99, 1234):
        ticks = report._ticks(high)
        assert ticks[0] == 0 and high <= ticks[-1] <= 2 * high and 3 <= len(ticks) <= 6
    assert report._ticks(0) == [0, 1]


def test_the_terminal_table_names_the_network_and_the_differences():
    from rich.console import Console

    def told_in(columns: int, document: dict) -> str:
        console = Console(width=columns, record=True, file=io.StringIO())
        console.print(report.table(document))
        return console.export_text()

    usual = make_document(oracle=0.4)
    usual["rows"] = [{key: value for key, value in row.items() if "lpips" not in key} for row in usual["rows"]]
    assert "…" not in told_in(80, usual), "nothing is cut off in a narrow terminal"
    told = told_in(140, make_document(oracle=0.4))
    assert (
        "feature network: efficientnet_lite0, resize bicubic" in told
        and "0.500 −0.300" in told
        and "A <note> & more." in told
    )
    assert told.count("unlearned") == 4 and told.count("forget") == told.count("retain") == 1


class Page(HTMLParser):
    """Tags, and whether each that was opened is closed in turn."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> config.RunConfig:
    root = tmp_path_factory.mktemp("report")
    for name, seed in (("original", 0), ("run/model", 1)):
        weights.write(weights.build(config.Model(variant="vit_nano_patch4_32"), seed), str(root / name), {})
    same = {"steps": 40, "forget": 0.3, "lr": 1e-4, "images_per_s": 50}
    rows = [json.dumps({"step": step, "retain": 1 / step} | same) for step in (10, 20, 40)]
    Storage(root / "run").write("metrics.jsonl", "".join(f"{row}\n" for row in rows).encode())
    return config.parse({
        "run_dir": str(root / "run"), "model": {"weights": str(root / "original")},
        "data": {"train": "embedded:fashion-test", "forget": {"classes": ["Bag"]}, "retain": {"classes": ["Coat"]}},
        "training": {"engine": "torch", "steps": 40},
        "evaluation": {"pictures": 3, "views": [{"size": 0.5}, {"kind": "random", "size": 0.5}]},
    })  # fmt: skip


def write(run: config.RunConfig, document: dict, show_forget: bool = False) -> str:
    """The report of a run that measured this."""
    Storage(run.run_dir).write("metrics.json", json.dumps(document).encode())
    return runs.report(run, show_forget)


@pytest.fixture(scope="module")
def html(run) -> str:
    uri = write(run, make_document(oracle=0.4))
    assert uri == Storage(run.run_dir).where("report.html")
    return Storage(run.run_dir).read("report.html").decode()


def test_it_is_whole_and_everyone_can_read_it(html):
    page = Page(html)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    assert page.all("img") and all(i["alt"] and i["src"].startswith("data:image/png;base64,") for i in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) == 3
    assert all("scope" in head for head in page.all("th"))
    assert all("aria-label" in drawing for drawing in page.all("svg") if drawing.get("role") == "img")
    assert "A &lt;note&gt; &amp; more." in html and "prefers-color-scheme: dark" in html and "@media print" in html


def test_it_asks_nothing_of_the_network_and_runs_no_script(html):
    assert not re.search(r"https?:|@import|url\(|<script|<link|<iframe|srcset", html)
    assert all(
        attributes[k].startswith("data:")
        for _, attributes in Page(html).tags
        for k in ("src", "href")
        if k in attributes
    )
    assert "default-src 'none'" in html


def test_it_shows_the_network_the_figures_and_the_curves(html):
    assert html.count("feature network efficientnet_lite0, resize bicubic") == 2
    assert "0.500 <small>−0.300</small>" in html and "wanted: lower" in html and "wanted: unchanged" in html
    assert "Retain loss from 0.1 at step 10 to 0.025 at step 40" in html and "Gradient norm" not in html
    assert "40 of 40 steps" in html and "1 worker(s), torch" in html and "90 s" in html


def test_it_says_what_was_asked_and_done_and_what_is_not_claimed(run, html):
    assert "To be forgotten: 100 training images of 1 class (Bag), chosen as whole classes." in html
    assert "trained further with the method encoder_l2: 40 steps of 64 images" in html
    assert f"unlearn audit {run.run_dir}" in html and "measurements, not proof" in html and "Not audited" in html


def test_it_tells_the_audit_of_these_weights_alone(run):
    document = make_document() | {"weights": {"unlearned": "a" * 64}}
    test = {"title": "Probes", "verdict": "FAIL", "shows": "What is <hidden>.", "reasons": ["AUC: beyond the margin."]}
    storage, told = Storage(run.run_dir), {"verdict": "FAIL", "tests": ["probes"], "probes": test}

    def written(weights: str) -> str:
        storage.write("audit.json", json.dumps(told | {"weights": {"unlearned": weights}}).encode())
        write(run, document)
        return storage.read("report.html").decode()

    try:
        html = written("a" * 64)
        assert (
            '<strong class="FAIL">FAIL</strong>' in html
            and "AUC: beyond the margin." in html
            and "&lt;hidden&gt;" in html
            and '<span class="FAIL">Audit: FAIL.</span></h1>' in html
        )
        assert "beyond the margin" not in (other := written("b" * 64)) and "of other weights" in other
        assert "Audit: FAIL" not in other, "nor in the headline"
        storage.write("audit.json", b"{")
        write(run, document)
        assert "audit.json is damaged" in storage.read("report.html").decode()
    finally:
        storage.delete("audit.json")


def test_forgotten_images_are_shown_on_demand_alone(run, html):
    pictured = [image["alt"] for image in Page(html).all("img")]
    assert len(pictured) == 3 * 4 and all(alt.startswith("retain image of class Coat") for alt in pictured)
    assert "The forget set is not shown" in html
    write(run, make_document(), show_forget=True)
    shown = Storage(run.run_dir).read("report.html").decode()
    pictured = [image["alt"] for image in Page(shown).all("img")]
    assert len(pictured) == 2 * 3 * 4 and sum(alt.startswith("forget image of class Bag") for alt in pictured) == 12
    assert "delete it after use" in shown and "is not shown" not in shown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_it_on_a_desktop_and_a_phone_without_a_complaint(html, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html)
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 360):
            tab.open(path, width)
            assert tab.complaints == [] and tab.run("document.documentElement.scrollWidth <= innerWidth")
            assert tab.run("[...document.querySelectorAll('img')].every(i => i.complete && i.naturalWidth === 32)")
            assert tab.run("""[...document.querySelectorAll('caption')].every(told => {
                const text = document.createRange();
                text.selectNodeContents(told);
                return text.getBoundingClientRect().right <= told.closest('.scroll').getBoundingClientRect().right;
            })"""), "no caption is cut off"
            wide = "[...document.querySelectorAll('.scroll')].some(part => part.scrollWidth > part.clientWidth)"
            assert tab.run(wide) == (width < 1280), "on a desktop every figure is seen without scrolling"
        # The control: the page's policy stops what is fetched from elsewhere, and the browser says so.
        path.write_text(html.replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt=""></main>'))
        tab.open(path, 1280)
        tab.wait("document.readyState === 'complete'")
        assert tab.run("1") == 1 and tab.complaints


def test_pictures_are_the_same_for_the_same_seed(run, html):
    write(run, make_document(oracle=0.4))
    assert Storage(run.run_dir).read("report.html").decode() == html
