"""A rank that does not come is named by those who wait for it, and what a hanging process does can be seen."""

import re
import signal

import pytest
from support.runs import tiny_config
from support.workers import together
from torch.multiprocessing import ProcessRaisedException

TWO = [
    "training.engine=deepspeed",
    "cluster.workers=2",
    "training.steps=4",
    "training.checkpoint_every=4",
    "method.name=pretrain",
]


@pytest.mark.parametrize(
    "sign", [pytest.param(signal.SIGSTOP, marks=pytest.mark.slow, id="stopped"), pytest.param(None, id="asleep")]
)
def test_a_missing_rank_is_named(tiny_shards, tiny_model, tmp_path, sign):
    """Rank 1 stops, or hangs, when it has computed step 2: rank 0 says so, and since when."""
    run = tiny_config(tmp_path / "run", tiny_shards, tiny_model, *TWO, "cluster.timeout=20")
    with pytest.raises(ProcessRaisedException) as told:
        together([run], 2, kill_at=2, sign=sign)
    message = str(told.value).strip().splitlines()[-1]
    assert re.search(
        r"ClusterError: rank 0 of 2 was left alone at step 3 \(cluster.timeout is 20 s\): rank 1 \(process \d+ on "
        r"\S+\) is missing: "
        r"at step 2 since \d\d:\d\d:\d\d UTC, last heard of at \d\d:\d\d:\d\d UTC$",
        message,
    ), str(told.value)
