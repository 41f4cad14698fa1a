"""The webhook, against a real server on loopback: signed, tried again, and given up."""

import base64
import hashlib
import hmac
import json

import pytest
from support.command import refused
from support.webhooks import receiving

from unlearn.ledger import webhook
from unlearn.ledger.ledger import Ledger

KEY = bytes(range(32))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(webhook, "PAUSES", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with receiving() as (url, statuses, came):
        yield url, statuses, came


def test_it_is_signed_and_tried_again(told, server, sqlite, tmp_path):
    url, statuses, came = server
    with Ledger(str(sqlite), create=True) as ledger:
        ledger.add([{"forget": {"subjects": ["alice"]}, "due": "2020-01-01"}, {"forget": {"classes": [1]}}])
    (tmp_path / "secret").write_text(f"whsec_{base64.b64encode(KEY).decode()}\n")
    command = ["request", "notify", url, "--secret-file", tmp_path / "secret", "--ledger", sqlite]
    statuses += [503, 429]
    assert told(*command) == (0, "sent at attempt 3\n", "")
    assert len({headers["webhook-id"] for headers, _ in came}) == 1
    headers, body = came[-1]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    content = json.loads(body)
    assert content["pending"] == 2 and content["overdue"] == [1] and content["states"]["received"] == 2
    assert b"alice" not in body
    statuses += [503] * 3
    assert "was not taken: HTTP 503 (3 attempts)" in refused(told, *command)
    statuses += [403]
    assert "was not taken: HTTP 403" in refused(told, *command) and not statuses  # once: it will not change
    (tmp_path / "secret").write_text("short")
    assert "not a secret of 16 bytes or more" in refused(told, *command)
    (tmp_path / "secret").write_text(base64.b64encode(KEY).decode())
    command[2] = "file:///etc/passwd"
    assert "the webhook's URL is not understood" in refused(told, *command)
