"""How fast the ledger of deletion requests is, and how much memory it takes: many writers at once, an import, and the
walk over all entries; the last two each in a process of its own.

    python -m jobs.benchmarks.ledger [--ledger URL] [--writers 16] [--requests 1000] [--import 100000]
        [--entries 1000000]

Without --ledger it is a new SQLite file in a temporary folder. The ledger is filled up to --entries, so name one that
may be.
"""

import argparse
import csv
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from unlearn.errors import UnlearnError
from unlearn.ledger import importing, verification
from unlearn.ledger.ledger import Ledger

BATCH = 50_000
SPAWN = multiprocessing.get_context("spawn")


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
        path = Path(folder, "requests.csv")
        write_csv(path, options.imported)
        timed(f"import of {options.imported} requests", load, url, str(path))
        size = fill(url, options.entries)
        print(f"{timed(f'verify of {size} entries', walk, url)} findings")


def write(url: str, writers: int, requests: int) -> None:
    """Each request is a transaction of its own, in one of `writers` processes."""
    start = SPAWN.Barrier(writers + 1)
    processes = [
        SPAWN.Process(target=_add, args=(url, requests // writers + (i < requests % writers), start))
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
        f"{requests} requests from {writers} writers: {seconds:.1f} s, {requests / seconds:.0f} requests/s, "
        f"{lost} lost, {len(report.wrong)} findings",
        flush=True,
    )


def _add(url: str, requests: int, start: Barrier) -> None:
    with Ledger(url) as ledger:
        start.wait()
        for number in range(requests):
            ledger.add([{"forget": {"subjects": [f"subject-{number}"]}}])


def write_csv(path: Path, requests: int) -> None:
    with path.open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["subject", "due", "reason"])
        rows.writerows((f"subject-{number}", "2030-01-01", "benchmark") for number in range(requests))


def load(url: str, path: str) -> int:
    with Ledger(url) as ledger:
        return len(ledger.add(importing.read(path)))


def fill(url: str, entries: int) -> int:
    """Append entries until there are so many; how many there are."""
    with Ledger(url) as ledger:
        size = verification.verify(ledger).walk.tree.size
        while size < entries:
            ledger.add([{"forget": {"subjects": ["subject"]}}] * min(BATCH, entries - size))
            size += min(BATCH, entries - size)
    return size


def walk(url: str) -> int:
    with Ledger(url) as ledger:
        return len(verification.verify(ledger).wrong)


def timed(what: str, call: Callable[..., int], *arguments: Any) -> int:
    """What a call in a new process gives. Tells the seconds of the clock, those of the process on a core, which a busy
    machine does not lengthen, and the most memory it had, Python and its libraries counted."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        value, seconds, busy, peak = pool.submit(_measured, call, arguments).result()
    print(f"{what}: {seconds:.1f} s, of which {busy:.1f} s on a core; {peak / 1024:.0f} MiB", flush=True)
    return value


def _measured(call: Callable[..., int], arguments: tuple) -> tuple[int, float, float, int]:
    began, busy = time.perf_counter(), time.process_time()
    value = call(*arguments)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return value, seconds, busy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    try:
        main()
    except UnlearnError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
