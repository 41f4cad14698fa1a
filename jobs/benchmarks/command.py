"""What every benchmark's command line shares: the run that is measured, the number of rounds, how a ratio is
printed."""

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
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file; default: the demo's configuration")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def settings(options: argparse.Namespace, overrides: list[str] = []) -> config.RunConfig:  # noqa: B006  read only
    """The configuration that is measured; `overrides` come before those of the command line."""
    changes = [*overrides, *options.overrides]
    return config.load(options.config, changes) if options.config else demo.demo_config(overrides=changes)


def main(module: str, call: Callable[[], None]) -> None:
    """Run a benchmark with the environment that Ray's workers are given, so that plain torch is a fair baseline; malloc
    reads it at start. A mistake of the user is reported in one line."""
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
        f"{what}: {statistics.median(ratios):.3g} (median of {len(ratios)} rounds, {ratios[0]:.3g} to {ratios[-1]:.3g})"
    )
