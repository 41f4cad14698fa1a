"""How long a job takes from `unlearn submit` to its first training step, stage by stage.

    python -m jobs.benchmarks.latency [CONFIG] --to http://HEAD:8265 [--set a.b=c] [--rounds 3]

The first round is the warm-up. Each round submits the run into a new folder with `training.log_every=1`, and stops it
after its first step. The run folder must be readable from here; the stages of the workers are measured only where they
run on this machine.
"""

import statistics
import tempfile
import time

from jobs import submit
from jobs.benchmarks import command
from unlearn import config
from unlearn.data.storage import Storage
from unlearn.errors import ClusterError

STAGES = ("accepted", "driver runs", "checks are done", "workers run", "first step")


def measure(run: config.RunConfig, to: str) -> dict[str, float]:
    """Seconds from the call to the end of each stage."""
    began, wall = time.perf_counter(), time.time()
    place, storage, seconds = submit.backend(to), Storage(run.run_dir), {}
    job, _ = submit.submit(place, submit.request(run, elsewhere=to != "local"))
    seconds["accepted"] = time.perf_counter() - began
    while "first step" not in seconds and job.live:
        now, job = time.perf_counter() - began, place.get(job.id)
        if "driver runs" not in seconds:
            if job.state == "running":
                seconds["driver runs"] = now
        elif "checks are done" not in seconds and storage.is_file("config.yaml"):
            seconds["checks are done"] = now
        elif "first step" not in seconds and storage.is_file("metrics.jsonl"):
            seconds["first step"] = now
        time.sleep(0.05)
    if "first step" not in seconds:
        raise ClusterError(f"{job.id} is {job.state} before its first step: {job.message}")
    if started := _workers(wall):
        seconds["workers run"] = started - wall
    place.stop(job.id)
    return seconds


def _workers(since: float) -> float | None:
    """When the last of Ray Train's worker processes on this machine became one, from their age;
    Ray keeps idle processes ready."""
    import psutil

    ages = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
            ages.append(process.info["create_time"])
    return max((age for age in ages if age > since), default=None)


def latency(settings: config.RunConfig, to: str, count: int) -> None:
    """Rounds of a submission, and the median of each stage."""
    rounds = []
    for number in range(count + 1):
        with tempfile.TemporaryDirectory(prefix="unlearn-latency-") as folder:
            seconds = measure(settings.model_copy(update={"run_dir": folder}), to)
        print(
            f"round {number}  " + "  ".join(f"{stage} {seconds[stage]:.1f} s" for stage in STAGES if stage in seconds)
        )
        rounds += [seconds] if number else []
    for stage in STAGES:
        if values := [seconds[stage] for seconds in rounds if stage in seconds]:
            print(
                f"{stage:16} after {statistics.median(values):5.1f} s (median of {len(values)}, {min(values):.1f} to "
                f"{max(values):.1f})"
            )


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--to", default="local")
    options = parser.parse_args()
    command.main(
        "jobs.benchmarks.latency",
        lambda: latency(command.settings(options, ["training.log_every=1"]), options.to, options.rounds),
    )
