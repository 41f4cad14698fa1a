"""What every benchmark's command line shares: the run that is measured, the number of rounds, how a ratio is told."""

import argparse
import os
import statistics
import sys
from collections.abc import Callable

from jobs import demo
from jobs.cluster import WORKER_ENV
from unlearn import config
from unlearn.errors import UnlearnError


def parser(about: str | None) -> argparse.ArgumentParser:
    """A parser that knows CONFIG, --set and --rounds. about: the benchmark's own docstring."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("config", nargs="?", help="a YAML file; default: the demo's configuration")
    found.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    found.add_argument("--rounds", type=int, default=3)
    return found


def settings(options: argparse.Namespace, overrides: list[str] = []) -> config.RunConfig:  # noqa: B006  read only
    """The configuration that is measured; `overrides` come before those of the command line."""
    told = [*overrides, *options.overrides]
    return config.load(options.config, told) if options.config else demo.demo_config(overrides=told)


def main(module: str, call: Callable[[], None]) -> None:
    """Run a benchmark with the environment that Ray's workers are given, or plain torch would be no fair baseline; malloc reads
    it at start. A mistake of the user is told in one line."""
    if not WORKER_ENV.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | WORKER_ENV)
    try:
        call()
    except UnlearnError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def tell_ratio(what: str, mine: list[float], base: list[float]) -> None:
    """Print the median of the ratios of each round, and their range."""
    ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
    print(
        f"{what}: {statistics.median(ratios):.2f} (median of {len(ratios)} rounds, {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
