"""How fast the ledger of deletion requests is: many writers at once, an import, and the walk over all entries.

    python -m jobs.benchmarks.ledger [--ledger URL] [--writers 16] [--requests 1000] [--import 100000] [--entries 1000000]

Without --ledger it is a new SQLite file in a temporary folder. The ledger is filled up to --entries, so name one that may be.
"""

import argparse
import csv
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TypeVar

from unlearn.errors import UnlearnError
from unlearn.ledger import importing, verification
from unlearn.ledger.ledger import Ledger

BATCH = 50_000
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", metavar="URL")
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--import", dest="imported", type=int, default=100_000)
    parser.add_argument("--entries", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.ledger or f"{folder}/ledger.sqlite"
        Ledger(url, create=True).database.close()
        write(url, options.writers, options.requests)
        with Ledger(url) as ledger:
            fill(ledger, Path(folder, "requests.csv"), options.imported)
            walk(ledger, options.entries)


def write(url: str, writers: int, requests: int) -> None:
    """Each request is a transaction of its own, in one of `writers` processes."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(writers + 1)
    processes = [
        context.Process(target=_add, args=(url, requests // writers + (i < requests % writers), start))
        for i in range(writers)
    ]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - began
    with Ledger(url) as ledger:
        report = verification.verify(ledger)
    lost = requests - report.walk.last
    print(
        f"{requests} requests from {writers} writers: {seconds:.1f} s, {requests / seconds:.0f} requests/s, {lost} lost, "
        f"{len(report.wrong)} findings",
        flush=True,
    )


def _add(url: str, requests: int, start: Barrier) -> None:
    with Ledger(url) as ledger:
        start.wait()
        for number in range(requests):
            ledger.add([{"forget": {"subjects": [f"subject-{number}"]}}])


def fill(ledger: Ledger, path: Path, requests: int) -> None:
    with path.open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["subject", "due", "reason"])
        rows.writerows((f"subject-{number}", "2030-01-01", "benchmark") for number in range(requests))
    timed(f"import of {requests} requests", lambda: ledger.add(importing.read(str(path))))


def walk(ledger: Ledger, entries: int) -> None:
    size = verification.verify(ledger).walk.tree.size
    while size < entries:
        ledger.add([{"forget": {"subjects": ["subject"]}}] * min(BATCH, entries - size))
        size += min(BATCH, entries - size)
    report = timed(f"verify of {size} entries", lambda: verification.verify(ledger))
    print(f"{len(report.wrong)} findings")


def timed(what: str, call: Callable[[], T]) -> T:
    """Tell the seconds of the clock, and those of this process on a core, which a busy machine does not lengthen."""
    began, busy = time.perf_counter(), time.process_time()
    value = call()
    print(
        f"{what}: {time.perf_counter() - began:.1f} s, of which {time.process_time() - busy:.1f} s on a core",
        flush=True,
    )
    return value


if __name__ == "__main__":
    try:
        main()
    except UnlearnError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
