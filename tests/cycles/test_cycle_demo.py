"""`unlearn demo --cycle`, shortened, and the page that it leaves."""

import re
from pathlib import Path

import pytest
import yaml
from support.browser import CHROMIUM, browser

from jobs.demo_cycle import demo_cycle
from unlearn.cli.app import main
from unlearn.cycles import cycle_file

ROOT = Path(__file__).parents[2]
SHORT = (
    "run.training.steps=2", "run.training.batch_size=8", "run.training.warmup_steps=0", "run.evaluation.limit=1",
    "ladder=[]",
    "gate={metrics.unlearned.forget_old.cosine: {max: 2, optional: true}, metrics.unlearned.retain.cosine: {min: -1}}",
)  # fmt: skip


def demo(folder: Path, *changes: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "demo",
                "--cycle",
                "--run-dir",
                str(folder),
                *[a for change in (*SHORT, *changes) for a in ("--set", change)],
            ]
        )
    return stopped.value.code or 0


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, str]:
    """(its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("demo") / "cycles"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("unlearn.cli.console.out.print", lambda *what, **how: printed.append(" ".join(map(str, what))))
        assert demo(folder) == 0
    return folder, "\n".join(printed)


def test_the_story_is_told_in_order(told):
    folder, text = told
    parts = [
        "Two requests come in: forget every image of Sneaker and of Bag.", "Cycle 1 starts from the base",
        "beside no earlier release",
        "v1 is released and current; request(s) 1, 2 are served", "verified offline",
        "Another request comes in: forget every image of Sandal.",
        "Cycle 2", "beside v1", "asked before", "v2 is released and current; request(s) 3 are served",
        "Your request no. 1", "release: v1",
        "The ledger is whole: 16 entries", f"The whole history on one page: {folder}/cycles/history.html",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places), dict(zip(parts, places, strict=True))


def test_started_again_it_does_nothing_twice(told, capsys):
    assert demo(told[0]) == 0
    out, err = capsys.readouterr()
    assert "v2 is released and current" in out and "training" not in err
    assert len(list((told[0] / "cycles").glob("*/selection.json"))) == 2


def test_it_has_its_own_data(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--cycle", "--forget", "Bag"])
    assert "--cycle has its own data and requests" in capsys.readouterr().err


def test_the_page_stands_alone_and_tells_all_but_names(told):
    html = (told[0] / "cycles/history.html").read_text()
    assert not re.search(r"https?:|<link|<script|<iframe|src=", html) and len(html) < 100_000
    assert (
        "3 of 3 requests served; v2 is current." in html
        and "Serves request 3 (500 images), and forgets 1, 2 again." in html
    )
    assert html.count("is as it was signed with the key") == 2 and "that nothing of the forgotten images" in html
    assert not re.search(r"Sneaker|Bag\b|Sandal", html)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_draws_it(told, tmp_path):
    with browser(tmp_path / "profile") as tab:
        for width in (1200, 390):
            tab.open(told[0] / "cycles/history.html", width)
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "only tables scroll"
            assert tab.run("document.querySelectorAll('polyline').length") == 6
        assert not tab.complaints


def test_the_ready_cycle_and_that_of_the_docs_are_valid(tmp_path):
    ready = cycle_file.load(str(ROOT / "jobs/configs/cycle_fashion.yaml"))
    assert ready.rungs == 3 and demo_cycle(str(tmp_path)).identity() == ready.identity()
    text = re.findall(r"```yaml\n(.*?)```", (ROOT / "infra/docs/cycles.md").read_text(), re.S)[0]
    tree = yaml.safe_load(text) | {
        "audit": None,
        "run": yaml.safe_load((ROOT / "jobs/configs/demo_fashion.yaml").read_text()),
    }
    assert cycle_file.parse(tree).rules.keys() == tree["gate"].keys()
