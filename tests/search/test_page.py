"""The page of a sweep: what it says, that it stands alone, and that a browser draws it and opens its points."""

import json
import re
import time
from dataclasses import replace

import pytest
from support import sweeps
from support.browser import CHROMIUM, browser

from unlearn.data.storage import Storage
from unlearn.search import page
from unlearn.search.records import Trial


def written(sweep, trials: list[Trial], grids=None) -> str:
    page.write(sweep, trials, grids)
    return Storage(sweep.sweep_dir).read(page.NAME).decode()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return sweeps.grid_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def html(sweep) -> str:
    trials = sweeps.grid_trials()
    measured = {"retain.cosine": 0.774, "forget.cosine": 0.62, "forget.cosine.to_oracle": 0.02}
    trials[0] = replace(trials[0], held_out=measured)
    return written(sweep, trials, sweeps.grids([f"p{n:03d}" for n in range(16)]))


def test_it_stands_alone_and_is_light(html):
    assert len(html) < 6_000_000 and html.count("plotly.js v") == 1
    own = html[: html.index("<script>/**")] + html[html.rindex("<script>") :]  # without plotly.js
    assert not re.search(r"https?:|@import|<link|<iframe|srcset|src=.http", own)
    assert "default-src 'none'" in html and "connect-src" not in html


def test_it_says_what_was_found_and_on_which_images(html, sweep):
    assert "points are on the Pareto front." in html and "judge by those" in html
    assert "The front, tuned and held out" in html and "<td>0.774</td>" in html
    assert "retain.cosine.drop &lt;= 0.06" in html and "the loss is not finite at step 12" in html
    assert html.count('<details class="card point') == 16 and "not complete" in html
    assert "unlearn sweep promote p000 RUN_DIR" in html and "alpha: 0.01" in html
    assert "Student&#39;s t" in html or "Student's t" in html
    document = json.loads(Storage(sweep.sweep_dir).read(page.DATA))
    p0 = document["points"][0]
    assert (p0["id"], p0["front"], p0["held_out"]["retain.cosine"]) == ("p000", True, 0.774)
    assert document["trials"] == {"done": 47, "failed": 1} and document["hypervolume"] > 0
    assert not document["points"][5]["complete"] and not document["points"][5]["front"]


def test_pictures_of_the_forget_set_are_only_where_they_are_given(html, tmp_path):
    assert 'alt="forget image' not in html and "this file holds none of them" in html
    pictures = json.loads(re.search(r'id="pictures">(.*?)</script>', html)[1])
    assert len(pictures) == 2 * 16  # the images are there once, and each point's own; p000's are the images themselves
    other = written(sweeps.grid_sweep(tmp_path), sweeps.grid_trials()[:3], sweeps.grids(["p000"], ("retain", "forget")))
    assert 'alt="forget image of class Coat: unlearned model"' in other and "delete it after use" in other


def test_ids_and_subjects_are_counted_and_not_told(tmp_path):
    search = {"data.forget.ids": {"grid": [["img-007"], ["img-007", "img-008"]]}}
    run = {
        "model": {"weights": "embedded:mae-fashion"},
        "data": {"train": "embedded:fashion-train", "forget": {"ids": ["x"]}},
        "training": {"steps": 1},
    }
    sweep = sweeps.grid_sweep(
        tmp_path, search=search, run=run, objectives={"retain.cosine": "maximise", "forget.cosine": "minimise"}
    )
    trials = [
        sweeps.trial(f"p{n:03d}", 0, {"data.forget.ids": ids}, 0.6, 0.7)
        for n, ids in enumerate(search["data.forget.ids"]["grid"])
    ]
    html = written(sweep, trials)
    assert "img-00" not in html and "2 ids, not told here" in html
    assert "img-00" not in Storage(sweep.sweep_dir).read(page.DATA).decode()


def test_one_objective_one_point_or_none(tmp_path):
    alone = sweeps.grid_sweep(tmp_path, objectives={"retain.cosine": "maximise"}, constraints=[])
    assert "p000 is the best of 16 points." in written(alone, sweeps.grid_trials())
    few = sweeps.grid_sweep(tmp_path)
    assert "1 of 1 points is on the Pareto front." in written(few, sweeps.grid_trials()[:3])
    running = [Trial("p000-s0-m0", "p000", 0, None, {"method.alpha": 0.1, "data.forget.per_class": 10})]
    assert "No point is complete yet." in written(few, running) and "No point is complete yet." in written(few, [])


def again(tab, x: float, y: float) -> None:
    """Another click, where the last one has opened nothing within two seconds."""
    end = time.monotonic() + 2
    while not tab.run("document.querySelector('#p000').open"):
        if time.monotonic() > end:
            tab.move(x, y)
            tab.click(x, y)
            return
        time.sleep(0.1)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_it_and_opens_a_point(html, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html)
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 390):
            tab.open(path, width)
            tab.wait("document.querySelectorAll('.chart .main-svg').length > 7")
            assert tab.run("document.documentElement.scrollWidth") == width  # nothing sticks out
            assert tab.complaints == []
            assert not tab.run(
                "document.querySelector('#p000').open || [...document.querySelectorAll('img')].some(i => i.src)"
            )
            # Where the front has p000, as a pointer sees it.
            where = """(() => {
                const place = document.getElementById("front-0");
                const trace = place.data.find(t => t.name === "Pareto front"), at = trace.customdata.indexOf("p000");
                place.scrollIntoView({block: "center"});
                const box = place.getBoundingClientRect(), {xaxis, yaxis} = place._fullLayout;
                return [box.x + xaxis._offset + xaxis.d2p(trace.x[at]), box.y + yaxis._offset + yaxis.d2p(trace.y[at])];
            })()"""  # looked up each time, since a page that is still being laid out moves it
            hovered = "/p000.*alpha 0.01/.test(document.querySelector('#front-0 .hoverlayer')?.textContent)"
            tab.wait(hovered, again=lambda where=where: tab.move(*tab.run(where)))
            tab.click(*tab.run(where))
            # A page that is busy may have missed it.
            tab.wait("document.querySelector('#p000').open", again=lambda where=where: again(tab, *tab.run(where)))
            tab.wait("[...document.querySelectorAll('#p000 img')].every(i => i.complete && i.naturalWidth === 32)")
            assert tab.run("document.activeElement.closest('details').id") == "p000"
        tab.open(path, 1280, dark=True)
        tab.wait("document.querySelectorAll('.chart .main-svg').length > 7")
        assert (
            tab.run("document.getElementById('front-0').data.find(t => t.name === 'Pareto front').marker.color")
            == "#f08a4b"
        )
        # The control: the page's policy stops what is fetched from elsewhere, and the tab hears of it.
        path.write_text(html.replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt=""></main>'))
        tab.open(path, 1280)
        deadline = time.monotonic() + 600
        while not tab.complaints and time.monotonic() < deadline:
            tab.run("1")
        assert any("Content Security Policy" in told for told in tab.complaints)
