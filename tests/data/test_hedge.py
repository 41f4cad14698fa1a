"""A read that hangs is made again, and only then."""

import threading
import time

import pytest

from unlearn.data.hedge import MOST, Hedge


def hanging(first: int, log: list[int], go: threading.Event):
    """A read whose first attempts hang until `go`; it tells the number of the attempt."""

    def call() -> int:
        log.append(len(log))
        number = log[-1]
        if number < first:
            go.wait(60)
        return number

    return call


@pytest.mark.parametrize("hang", range(MOST))
def test_the_first_answer_counts_and_a_read_that_hangs_is_made_again(hang):
    log, go = [], threading.Event()
    assert Hedge().first(hanging(hang, log, go), 0.05) == hang and len(log) == hang + 1
    go.set()


def test_a_slow_link_is_not_asked_twice_once_it_is_known():
    hedge, log, go = Hedge(), [], threading.Event()

    def slow() -> None:
        log.append(0)
        go.wait(0.4)

    hedge.first(slow, 0.1)
    first = len(log)
    for _ in range(3):
        hedge.first(slow, 0.1)
    assert first > 1 and len(log) == first + 3
    go.set()


def test_an_error_is_told_at_once_and_one_beside_an_answer_is_not():
    hedge, calls, go = Hedge(), [], threading.Event()
    with pytest.raises(OSError, match="broken"):
        hedge.first(lambda: (_ for _ in ()).throw(OSError("broken")), 5)

    def second_fails() -> str:
        calls.append(len(calls))
        if calls[-1] == 1:
            raise OSError("broken")
        go.wait(0.5)
        return "right"

    assert hedge.first(second_fails, 0.1) == "right" and len(calls) >= 2
    assert Hedge().first(lambda: time.sleep(0.2) or threading.current_thread(), 0) is threading.main_thread()
