"""A bearer token: from a variable, or from a file that is read anew at every use, since tokens of pods are replaced
each hour. No message holds it."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from unlearn.errors import ConfigError


def source(variable: str, path: str = "") -> Callable[[], str] | None:
    """What gives the token at each use: the file at `path`, else the one that VARIABLE_FILE names, else the variable.
    None where there is none of them. Raises ConfigError, and so does what is returned."""
    if path := path or os.environ.get(f"{variable}_FILE", ""):

        def read() -> str:
            try:
                return _checked(Path(path).read_text(errors="replace").strip(), f"token file {path}")
            except OSError as e:
                raise ConfigError(f"token file {path}: {e.strerror}") from None

        read()
        return read
    if value := os.environ.get(variable, "").strip():
        _checked(value, variable)
        return lambda: value
    return None


def _checked(token: str, where: str) -> str:
    if not token:
        raise ConfigError(f"{where}: is empty")
    if not re.fullmatch("[!-~]+", token):
        raise ConfigError(f"{where}: holds blanks, line ends or characters that are not ASCII: no header can carry it")
    return token
