"""Spans as people write them (30d, 4w, 1m, 3y), and the day on which a request is due."""

import calendar
import re
from datetime import UTC, date, datetime, timedelta

from unlearn.errors import LedgerError

MONTH = "1m"  # the term of the GDPR, article 12 (3)


def today() -> date:
    return datetime.now(UTC).date()


def parse(text: str, what: str) -> date:
    """A day as in 2026-12-31. Raises LedgerError for anything else; `what` is what the message calls it."""
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        raise LedgerError(f"{what}: {text!r} is no day; write it as in 2026-12-31") from None


def after(day: date, span: str, what: str, sign: int = 1) -> date:
    """The day `span` after `day`, or before it with sign=-1; a month ends on its own last day. Raises LedgerError."""
    match = re.fullmatch(r"\s*(\d{1,4})\s*([dwmy])\s*", span.lower())
    if not match:
        raise LedgerError(f"{what}: {span!r} is no span of time; write it as 30d, 4w, 1m or 3y")
    number, unit = sign * int(match[1]), match[2]
    try:
        if unit in "dw":
            return day + timedelta(days=number * (7 if unit == "w" else 1))
        year, month = divmod(day.year * 12 + day.month - 1 + number * (12 if unit == "y" else 1), 12)
        return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))
    except (ValueError, OverflowError, calendar.IllegalMonthError):
        raise LedgerError(f"{what}: {span!r} leads out of the calendar") from None


def due(day: str | None, within: str | None) -> str:
    """The day on which a request is due, as text. Raises LedgerError where both are given or one is wrong."""
    if day and within:
        raise LedgerError("--due and --within: give one of them")
    return (parse(day, "due") if day else after(today(), within or MONTH, "within")).isoformat()
