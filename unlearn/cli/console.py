"""What the terminal shows while a job works: a bar where someone watches, plain lines in a log."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from unlearn import log


class _Console(Console):
    """Whatever is printed passes here, the cells of tables too: nothing in it is obeyed by the terminal."""

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(log.visible(text), **options)


err = _Console(stderr=True, highlight=False)
out = _Console(highlight=False, markup=False)  # class names and paths may hold brackets

# Called with (done, total, what to say beside the bar).
Advance = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress(what: str, every: float = 10) -> Iterator[Advance]:
    """A bar on a terminal; elsewhere one line at most every `every` seconds, and one at the end."""
    if log.is_json() or not err.is_terminal:
        last = [time.monotonic()]

        def line(done: int, total: int, note: str) -> None:
            if done >= total or time.monotonic() - last[0] >= every:
                last[0] = time.monotonic()
                say(f"{what} {done}/{total}  {note}".rstrip())

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(what, total=None, note="starting")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


def training(row: dict) -> tuple[int, int, str]:
    """(done, total, note) of one row that a run reports."""
    if "latents" in row:
        return row["latents"], row["of"], "row groups through the frozen first stage"
    return row["step"], row["steps"], training_note(row)


def training_note(row: dict) -> str:
    """What one logged row says beside the bar."""
    parts = [f"{name} {row[name]:.4g}" for name in ("retain", "forget") if name in row]
    parts.append(f"{row['images_per_s']:.0f} images/s")
    parts += [f"{row['bad_images']} bad images"] if row.get("bad_images") else []
    return "  ".join(parts)


def say(text: str, level: int = logging.INFO) -> None:
    """A line for the user on standard error; where the log is JSON, a record of it."""
    if log.is_json():
        logging.getLogger(__name__).log(level, " ".join(text.split()))
    else:
        err.print(text, soft_wrap=True, markup=False)


def warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def error(text: str) -> None:
    """What ends the command."""
    logging.getLogger(__name__).error(text)


class _Sentences(logging.Handler):
    """Shows the project's own log as what it is: sentences for the user."""

    def emit(self, record: logging.LogRecord) -> None:
        colour = "red" if record.levelno > logging.WARNING else "yellow" if record.levelno == logging.WARNING else "dim"
        err.print(f"[{colour}]{record.levelname.lower()}:[/] {escape(record.getMessage())}", soft_wrap=True)


def show_log(verbose: int = 0) -> None:
    """Show the log of library and drivers on standard error, as UNLEARN_LOG says. Raises ConfigError."""
    log.start(_Sentences(), "warning")  # which also shows what is wrong with UNLEARN_LOG
    level, format = log.wanted(verbose)
    if format == "json":
        log.start(log.JsonLines(), level)
        sys.excepthook = lambda kind, e, trace: logging.getLogger("unlearn").error(
            "%s: %s", kind.__name__, e, exc_info=(kind, e, trace)
        )
    else:
        log.start(_Sentences(), level)
