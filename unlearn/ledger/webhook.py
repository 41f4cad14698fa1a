"""Tell another service how requests stand, by HTTP: signed as Standard Webhooks has it, and tried again where it is not
taken.

    webhook-id: UUID
    webhook-timestamp: Unix time
    webhook-signature: v1,base64(HMAC-SHA256(secret, "ID.TIMESTAMP.BODY"))

No name and no image id is in it.
"""

import base64
import hashlib
import hmac
import json
import time
import urllib.error
import urllib.request
import uuid
from typing import Any
from urllib.parse import urlsplit

from unlearn.errors import LedgerError
from unlearn.ledger.ledger import Ledger

PAUSES = (1, 2, 4, 8)  # seconds between attempts
TIMEOUT = 10  # seconds of one attempt
LATER = (408, 425, 429)  # beside the errors of the server (5xx): worth another attempt


def event(ledger: Ledger) -> dict[str, Any]:
    """Requests by state, how many are open, and the numbers of those that are overdue."""
    pending = ledger.pending()
    late = [request.id for request in pending if request.is_overdue]
    return {"type": "requests", "states": ledger.counts(), "pending": len(pending), "overdue": late}


def send(url: str, secret: bytes, content: dict[str, Any]) -> int:
    """POST `content` as JSON; the attempts that it took. All bear the same id, so that the receiver can drop what comes
    twice.

    Raises LedgerError where it is refused, or not taken at the last attempt.
    """
    where = urlsplit(url)
    if where.scheme not in ("http", "https") or not where.hostname:
        raise LedgerError("the webhook's URL is not understood: write it as https://HOST/PATH")
    own, body = str(uuid.uuid4()), json.dumps(content).encode()
    for attempt, pause in enumerate((*PAUSES, None), 1):
        trouble, final = _post(url, own, secret, body)
        if trouble is None:
            return attempt
        if final or pause is None:
            tried = f" ({attempt} attempts)" if attempt > 1 else ""
            raise LedgerError(f"the webhook at {where.hostname} was not taken: {trouble}{tried}")
        time.sleep(pause)
    raise AssertionError


def secret(path: str) -> bytes:
    """The key in a file, base64, with or without `whsec_` before it. Raises LedgerError where it is none or short of 16
    bytes."""
    try:
        with open(path, encoding="ascii") as f:
            key = base64.b64decode(f.read().strip().removeprefix("whsec_"), validate=True)
    except OSError as e:
        raise LedgerError(f"{path}: {e.strerror}") from None
    except ValueError:
        key = b""
    if len(key) < 16:
        raise LedgerError(f"{path}: not a secret of 16 bytes or more in base64; `openssl rand -base64 32` makes one")
    return key


def _post(url: str, own: str, key: bytes, body: bytes) -> tuple[str | None, bool]:
    """(what went wrong, whether another attempt is of no use)."""
    moment = str(int(time.time()))
    signed = hmac.new(key, f"{own}.{moment}.".encode() + body, hashlib.sha256).digest()
    headers = {
        "content-type": "application/json", "webhook-id": own, "webhook-timestamp": moment,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }  # fmt: skip
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=TIMEOUT):
            return None, False
    except urllib.error.HTTPError as e:
        return f"HTTP {e.code}", e.code < 500 and e.code not in LATER
    except OSError as e:  # refused, unreachable, too slow
        return " ".join(str(getattr(e, "reason", e)).split())[:200], False
