"""What the audits of a comparison save by sharing their workers, against each with workers of its own.

    python -m jobs.benchmarks.audits [CONFIG] [--set a.b=c] [--runs 4] [--workers 2] [--rounds 1]

The runs' models are the original with a little noise; the audits are transfer, membership and the Streisand check, of
100 images a set. Both ways share what is measured of the original and the oracle, and the verdicts are compared.
Processor time is that of all processes, Ray's own among them.
"""

import tempfile

import torch

from jobs import audit as audits
from jobs.benchmarks import command
from jobs.benchmarks.sweep import Cost, spent
from unlearn import config
from unlearn.audit import settings as audit_settings
from unlearn.data.storage import Storage
from unlearn.models import weights
from unlearn.run import Run, resolve

OPTIONS = {"tests": ["transfer", "membership", "streisand"], "limit": 100, "resamples": 200}


def made(settings: config.RunConfig, folder: str, count: int) -> list[Run]:
    """Runs whose models differ."""
    runs = []
    for number in range(count):
        own = settings.model_copy(update={"run_dir": f"{folder}/{number}", "seed": settings.seed + number})
        model = weights.build(own.model)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(noise, alpha=0.01 * float(parameter.abs().mean()))
        weights.write(model, Storage(own.run_dir).where("model"), {})
        runs.append(resolve(own, measured=True))
    return runs


def audited(runs: list[Run], workers: int, together: bool) -> tuple[Cost, list[dict]]:
    """(the cost, what is in each audit.json but its times), each with its own workers or all on the same ones."""
    options = audit_settings.parse(OPTIONS | {"workers": workers})
    with tempfile.TemporaryDirectory(prefix="unlearn-benchmark-") as kept, spent() as cost:
        if together:
            with audits.workers(runs[0].settings, options) as mapped:
                found = [audits.audit(run, options, kept=kept, shared=lambda: mapped) for run in runs]
        else:
            found = [audits.audit(run, options, kept=kept) for run in runs]
    return cost, [{name: value for name, value in document.items() if name != "seconds"} for document in found]


def benchmark(settings: config.RunConfig, count: int, workers: int, rounds: int) -> None:
    clocks, processors = ([], []), ([], [])
    with tempfile.TemporaryDirectory(prefix="unlearn-benchmark-") as folder:
        runs = made(settings, folder, count)
        for _ in range(rounds):
            (alone, apart), (shared, together) = (audited(runs, workers, way) for way in (False, True))
            assert apart == together, "shared workers change no figure"
            for costs, mine, base in (
                (clocks, shared.clock, alone.clock),
                (processors, shared.processor, alone.processor),
            ):
                costs[0].append(mine / count)
                costs[1].append(base / count)
            told = f"own workers {alone.clock / count:.1f} s, of processors {alone.processor / count:.1f} s"
            told += f"; shared {shared.clock / count:.1f} s, of processors {shared.processor / count:.1f} s"
            print(f"an audit of {count}: {told}", flush=True)
    command.tell_ratio("shared / own, by the clock", *clocks)
    command.tell_ratio("shared / own, of processors", *processors)


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    command.main(
        "jobs.benchmarks.audits",
        lambda: benchmark(command.settings(options), options.runs, options.workers, options.rounds),
    )
