"""`unlearn models`: the catalogue says of every named shape what its model says, and is read without building one."""

import json
import subprocess
import sys
import textwrap

import pytest

from unlearn.models import catalogue
from unlearn.registry import MODELS


@pytest.mark.parametrize("family", MODELS)
def test_the_file_says_what_the_models_say(family):
    """After a change of the variants: python -m unlearn.models.catalogue"""
    assert [shape for shape in catalogue.shapes() if shape.family == family] == catalogue.counted(family)


def test_every_row_is_of_a_registered_family():
    assert {row["family"] for row in json.loads(catalogue.FILE.read_text())} == set(MODELS)


def test_the_list_takes_little_time_and_no_torch():
    program = """
        import resource, sys
        from unlearn.cli.app import main
        try:
            main(["models"])
        except SystemExit:
            pass
        used = resource.getrusage(resource.RUSAGE_SELF)
        assert used.ru_utime + used.ru_stime < 2, used
        assert not {"torch", "diffusers", "numpy"} & set(sys.modules)
        """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "sdxl_inpaint_1024" in run.stdout and "1,236.1 M" in run.stdout


def test_a_family_that_is_not_in_the_file_is_counted(tmp_path, monkeypatch, told):
    (tmp_path / "late_family.py").write_text(
        textwrap.dedent("""
        from torch import nn
        from unlearn.models import base

        class Late(base.Adapter):
            family = "late"
            variants = {"small": {"image_size": 16}}

            def __init__(self, options):
                super().__init__(options)
                self.encoder, self.decoder = nn.Linear(3, 5), nn.Linear(5, 3)
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(MODELS, "entries", {**MODELS.entries, "late": "late_family:Late"})
    code, out, _ = told("models", "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == len(catalogue.shapes())
    assert rows[-1] == {
        "family": "late",
        "variant": "small",
        "image_size": 16,
        "encoder": 20,
        "decoder": 18,
        "first_stage": 0,
    }
