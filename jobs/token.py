"""The token of a Ray cluster that the user names, read from the places where Ray itself looks. No message holds it."""

import os
import re
from pathlib import Path

from unlearn.errors import ClusterError


def read() -> str | None:
    """The token; None where there is none, or authentication is turned off. Raises ClusterError where it cannot be
    one."""
    where, token = "RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        given = os.environ.get("RAY_AUTH_TOKEN_PATH")
        path = Path(given or "~/.ray/auth_token").expanduser()
        if given and not path.is_file():
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH: there is no file {given}")
        where, token = str(path), path.read_text(errors="replace").strip() if path.is_file() else ""
    if not token or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if not re.fullmatch("[!-~]+", token):
        raise ClusterError(
            f"the token in {where} holds blanks, line ends or characters that are not ASCII: no header can carry it"
        )
    return token
