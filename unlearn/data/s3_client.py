"""The client of S3, by which everything is read and written.

Endpoint, region, credentials, certificates and addressing come from the usual AWS variables and files, in the order of
every AWS program: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, a profile's `services` section and `endpoint_url`;
AWS_CA_BUNDLE or `ca_bundle`; pod identity ... These variables are this program's own, since AWS has none for them:

    UNLEARN_S3_ADDRESSING      path | virtual | auto (default: the profile's, else path where an endpoint is given)
    UNLEARN_S3_ANONYMOUS       names of buckets that are read without keys, by commas; * for all
    UNLEARN_S3_REQUESTER_PAYS  names of buckets whose reader pays, by commas; * for all
    UNLEARN_S3_SSE             how what is written is encrypted there: AES256, aws:kms, aws:kms:dsse, or aws:kms=KEY
    UNLEARN_S3_HEDGE           seconds after which a read that hangs is made again beside the first, at the earliest
    UNLEARN_S3_TIMEOUT         seconds without a byte after which a connection is given up

Keys that expire are renewed: those of a role, of a pod or of a `credential_process` by botocore, before they expire,
and those of a file when the server refuses them and the file holds others by then.
"""

import functools
import math
import os
import re
import threading
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from unlearn.errors import ConfigError, StorageError

ADDRESSING, ANONYMOUS = "UNLEARN_S3_ADDRESSING", "UNLEARN_S3_ANONYMOUS"
REQUESTER_PAYS, SSE = "UNLEARN_S3_REQUESTER_PAYS", "UNLEARN_S3_SSE"
HEDGE, TIMEOUT = "UNLEARN_S3_HEDGE", "UNLEARN_S3_TIMEOUT"
STYLES, ENCRYPTIONS = ("path", "virtual", "auto"), ("AES256", "aws:kms", "aws:kms:dsse")
# A small object is stored at once, so its answer is waited for a shorter time: this part of the time-out.
SMALL, SOONER = 1 << 20, 4
making = threading.RLock()  # boto3 makes one client at a time
requests: Counter[str] = Counter()  # requests that this process has sent, by method; those that were repeated too


def of(bucket: str) -> Any:
    """The client for a bucket. Raises StorageError and ConfigError where what is configured is wrong."""
    with making:
        return client(_named(ANONYMOUS, bucket))


def renewed(bucket: str, used: Any) -> bool:
    """Whether there are other keys than those of the client `used`, which the server has refused; `of` takes them."""
    import boto3

    with making:
        if of(bucket) is not used:  # another thread has renewed it
            return True
        before, session = _keys(boto3.DEFAULT_SESSION), boto3.Session()
        if before is None or _keys(session) in (None, before):
            return False
        boto3.DEFAULT_SESSION = session
        client.cache_clear()
        return True


def hedge() -> float:
    """Seconds after which a read that hangs is made again at the earliest; 0: never. Raises ConfigError."""
    return _seconds(HEDGE, 2)


def told() -> str:
    """How many requests this process has sent, in words; nothing where it has sent none."""
    with making:
        parts = ", ".join(f"{method} {count}" for method, count in sorted(requests.items()))
        return f"{requests.total()} requests to S3 ({parts})" if parts else ""


@functools.cache
def client(anonymous: bool = False) -> Any:
    """Made once in a process."""
    import boto3
    import botocore
    from botocore.config import Config

    if boto3.DEFAULT_SESSION is None:
        boto3.setup_default_session()
    session, timeout = boto3.DEFAULT_SESSION, _seconds(TIMEOUT, 60)
    common: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": 2},  # what comes twice is waited out by patience.py
        "connect_timeout": 10, "read_timeout": timeout or None, "max_pool_connections": 64,
    }  # fmt: skip
    _check_keys()
    extra = _encryption()
    if anonymous:
        common["signature_version"] = botocore.UNSIGNED

    def made(**options) -> Any:
        try:
            found = session.client(
                "s3", region_name=os.environ.get("AWS_REGION") or None, config=Config(**common, **options)
            )
        except ValueError as e:
            what = re.sub(r"[^/@\s]*@", "", str(e))[:120]
            raise StorageError(
                f"the S3 endpoint cannot be used ({what}): write it as http://HOST:PORT or https://HOST, in "
                "AWS_ENDPOINT_URL or a profile's endpoint_url"
            ) from None
        found.meta.events.register("provide-client-params.s3", functools.partial(_completed, extra, timeout))
        found.meta.events.register("before-send.s3", _count)
        return found

    if style := _style():
        return made(s3={"addressing_style": style})
    found = made()
    if found.meta.config.s3 and found.meta.config.s3.get("addressing_style") or _of_aws(found.meta.endpoint_url):
        return found
    return made(s3={"addressing_style": "path"})


def _style() -> str:
    style = os.environ.get(ADDRESSING, "")
    if style and style not in STYLES:
        raise ConfigError(f"{ADDRESSING}={style[:40]!r}: give {', '.join(STYLES)}")
    return style


def _completed(extra: dict[str, str], timeout: float, params: dict, model: Any, context: dict, **_) -> dict:
    """The parameters of a request, with what every request of its kind is to carry."""
    known = model.input_shape.members
    if "RequestPayer" in known and _named(REQUESTER_PAYS, params.get("Bucket", "")):
        params = params | {"RequestPayer": "requester"}
    if model.name == "PutObject" and len(params["Body"]) <= SMALL and timeout:
        context["read_timeout"] = timeout / SOONER
    return {name: value for name, value in extra.items() if name in known} | params


def _count(request: Any, **_) -> None:
    with making:
        requests[request.method] += 1


def _check_keys() -> None:
    """Keys that cannot be sent fail like a broken connection. Raises ConfigError, which names the variable alone."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if re.search(r"[^!-~]", os.environ.get(name, "")):
            raise ConfigError(f"{name} holds a line end, a space or a letter that no key has: set it without")


def _encryption() -> dict[str, str]:
    """The parameters by which what is written is encrypted at the server. Raises ConfigError."""
    given, _, key = os.environ.get(SSE, "").partition("=")
    if given and given not in ENCRYPTIONS:
        raise ConfigError(f"{SSE}={given[:40]!r}: give {', '.join(ENCRYPTIONS)}, or aws:kms=KEY")
    return ({"ServerSideEncryption": given} if given else {}) | ({"SSEKMSKeyId": key} if key else {})


def _keys(session: Any) -> tuple | None:
    """The keys of a session; None where it has none."""
    from botocore.exceptions import BotoCoreError

    try:
        found = session.get_credentials()
        return None if found is None else tuple(found.get_frozen_credentials())
    except BotoCoreError:
        return None


def _named(variable: str, bucket: str) -> bool:
    """Whether a variable that lists buckets names this one."""
    return bool({name.strip() for name in os.environ.get(variable, "").split(",")} & {"*", bucket} - {""})


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        given = float(text) if text else default
    except ValueError:
        given = math.nan
    if not 0 <= given < math.inf:
        raise ConfigError(f"{variable}={text[:40]!r}: give seconds, a number from 0 on")
    return given


def _of_aws(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
