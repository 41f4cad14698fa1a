"""When a schedule comes due: Kubeflow's six fields, seconds first.

Neither Kubeflow's client nor its server looks at them. What its controller (robfig/cron 1) cannot read never fires,
without a word to the user; and five fields, as crontab has them, it reads as seconds first without a day of the week,
so that `0 3 * * *` fires each hour. Hence they are checked here, by that reader's rules.
"""

import re
from datetime import datetime
from zoneinfo import ZoneInfo

from unlearn.errors import ConfigError

EXAMPLE = "0 0 3 * * * is every day at 3:00:00"
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_DAYS = "sun mon tue wed thu fri sat".split()
# name, least and greatest value, names of values
FIELDS = [
    ("second", 0, 59, {}), ("minute", 0, 59, {}), ("hour", 0, 23, {}), ("day of month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of week", 0, 6, {name: number for number, name in enumerate(_DAYS)}),
]  # fmt: skip


def check(expression: str) -> str:
    """The expression with single spaces. Raises ConfigError where Kubeflow could not read it, or would read it as
    another."""
    fields = expression.split()
    if len(fields) != 6:
        raise ConfigError(
            f"--cron '{expression}': {len(fields)} fields, and Kubeflow wants six: second minute hour day-of-month "
            f"month day-of-week; {EXAMPLE}"
        )
    for text, (name, least, greatest, names) in zip(fields, FIELDS, strict=True):
        for part in text.split(","):
            if why := _wrong(part, least, greatest, names, name.startswith("day")):
                raise ConfigError(f"--cron '{expression}': {name} {text}: {why}; {EXAMPLE}")
    if all(text not in ("*", "?") for text in (fields[3], fields[5])):
        # Schedulers differ: both must hold, or one of them is enough.
        raise ConfigError(
            f"--cron '{expression}': restrict the day of the month or the day of the week, not both; {EXAMPLE}"
        )
    return " ".join(fields)


def _wrong(part: str, least: int, greatest: int, names: dict[str, int], day: bool) -> str | None:
    value = r"\d+" + "".join(f"|{name}" for name in names)
    parsed = re.fullmatch(rf"(?:(\*|\?)|({value})(?:-({value}))?)(?:/(\d+))?", part.lower())
    if not parsed:
        return f"'{part}' is none of *, 5, 1-5, */15" + (f", {next(iter(names))}" if names else "")
    star, low, high, step = parsed.groups()
    if star == "?" and (not day or step):
        return "? stands alone, for a day"
    numbers = [names[text] if text in names else int(text) for text in (low, high) if text is not None]
    if any(not least <= number <= greatest for number in numbers):
        return f"give {least} to {greatest}"
    if numbers != sorted(numbers):
        return f"{part} goes backwards"
    return "a step is 1 or more" if step and int(step) < 1 else None


def upcoming(expression: str, zone: ZoneInfo, count: int = 3, after: datetime | None = None) -> list[datetime]:
    """When it comes due next, `count` times, in that time zone. Raises ConfigError where it never does."""
    from croniter import CroniterBadDateError, croniter

    times = croniter(check(expression), after or datetime.now(zone), ret_type=datetime, second_at_beginning=True)
    try:
        return [times.get_next() for _ in range(count)]
    except CroniterBadDateError:
        raise ConfigError(f"--cron '{expression}': there is no such day; {EXAMPLE}") from None


def zone(name: str) -> ZoneInfo:
    """The time zone of that name. Raises ConfigError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"--timezone {name}: give a name such as UTC or Europe/Berlin") from None
