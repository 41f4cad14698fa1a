"""The project's log, the loggers "unlearn" and "jobs": sentences for a reader, or one JSON object a line for a
collector.

    UNLEARN_LOG=info,json      a level (debug, info, warning) and a format (text, json), in any order, each may be left
                               out

By default sentences from `warning` on, with `--verbose` from `info` on; in a submitted job JSON from `info` on. The
workers of a Ray cluster write JSON whatever the format, since what they write ends in Ray's own log files; the level is
the driver's. No message holds the id of an image or a secret: logs are shipped to places that data is not.
"""

import json
import logging
import os
import re
import sys
import traceback
from datetime import UTC, datetime

from unlearn import signals
from unlearn.errors import ConfigError

VARIABLE = "UNLEARN_LOG"
LOGGERS = ("unlearn", "jobs")
# Characters that a terminal obeys and does not show: control characters but for tab and line end, changes of the
# direction of writing, lone surrogates (names of files that are not UTF-8).
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LEVELS, FORMATS = ("debug", "info", "warning"), ("text", "json")


def wanted(verbose: int = 0) -> tuple[str, str]:
    """(level, format) by UNLEARN_LOG, else by what this process is. verbose: how often --verbose was given, which only
    adds.

    Raises ConfigError where UNLEARN_LOG is not understood.
    """
    level, format = ("info", "json") if signals.JOB in os.environ else ("warning", "text")
    for word in filter(None, (word.strip().lower() for word in os.environ.get(VARIABLE, "").split(","))):
        if word in LEVELS:
            level = word
        elif word in FORMATS:
            format = word
        else:
            raise ConfigError(
                f"{VARIABLE}: {word!r} is neither a level ({', '.join(LEVELS)}) nor a format ({', '.join(FORMATS)}); "
                f"write it as in {VARIABLE}=info,json"
            )
    return LEVELS[min(LEVELS.index(level), max(0, 2 - verbose))], format


def start(handler: logging.Handler, level: str) -> None:
    """Send the project's log to this handler alone, from `level` on."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


def start_worker(level: str, **context: object) -> None:
    """The same in a worker of a Ray cluster. context: what tells it from the others, as in rank=1."""
    start(JsonLines(**context), level)


def level() -> str:
    """From what on this process logs, to be handed to its workers."""
    return logging.getLevelName(logging.getLogger(LOGGERS[0]).getEffectiveLevel()).lower()


def is_json() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(handler, JsonLines) for handler in logging.getLogger(LOGGERS[0]).handlers)


def visible(text: str) -> str:
    r"""The text with what a terminal would obey written out, as in \x1b: names of classes and files come from
    strangers."""
    return _UNSEEN.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


class JsonLines(logging.Handler):
    """Writes {"time": UTC, "level": ..., "logger": ..., "message": ..., **context} to standard error, one object a
    line."""

    def __init__(self, **context: object):
        super().__init__()
        job = os.environ.get(signals.JOB)
        self.context = ({"job": job} if job else {}) | context

    def emit(self, record: logging.LogRecord) -> None:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name, "message": record.getMessage(), **self.context,
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        # JSON escapes every control character but the last.
        print(json.dumps(line).replace("\x7f", "\\u007f"), file=sys.stderr, flush=True)


def message(line: str) -> tuple[str, str] | None:
    """(level, message) of a line that `JsonLines` wrote, None for any other line."""
    try:
        record = json.loads(line) if line.startswith('{"time"') else {}
        return record["level"], record["message"]
    except (ValueError, KeyError):
        return None
