"""The client of S3, by which everything is read and written.

Endpoint, region, credentials, certificates and addressing come from the usual AWS variables and files, in the order of
every AWS program: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, a profile's `services` section and `endpoint_url`;
AWS_CA_BUNDLE or `ca_bundle`; pod identity ... Two variables are this program's own, since AWS has none for them:

    UNLEARN_S3_ADDRESSING   path | virtual | auto (default: the profile's, else path where an endpoint is given)
    UNLEARN_S3_ANONYMOUS    names of buckets that are read without keys, by commas; * for all
"""

import functools
import os
import re
import threading
from typing import Any
from urllib.parse import urlsplit

from unlearn.errors import ConfigError, StorageError

ADDRESSING, ANONYMOUS = "UNLEARN_S3_ADDRESSING", "UNLEARN_S3_ANONYMOUS"
STYLES = ("path", "virtual", "auto")
_lock = threading.Lock()  # boto3 makes one client at a time


def of(bucket: str) -> Any:
    """The client for a bucket. Raises StorageError and ConfigError where what is configured is wrong."""
    named = {name.strip() for name in os.environ.get(ANONYMOUS, "").split(",")}
    with _lock:
        return client(bool(named & {"*", bucket}))


@functools.cache
def client(anonymous: bool = False) -> Any:
    """Made once in a process."""
    import boto3
    import botocore
    from botocore.config import Config

    session = boto3.Session() if boto3.DEFAULT_SESSION is None else boto3.DEFAULT_SESSION
    common: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": 2},  # what comes twice is waited out by patience.py
        "connect_timeout": 10, "max_pool_connections": 32,
    }  # fmt: skip
    if anonymous:
        common["signature_version"] = botocore.UNSIGNED

    def made(**options) -> Any:
        try:
            return session.client(
                "s3", region_name=os.environ.get("AWS_REGION") or None, config=Config(**common, **options)
            )
        except ValueError as e:
            what = re.sub(r"[^/@\s]*@", "", str(e))[:120]
            raise StorageError(
                f"the S3 endpoint cannot be used ({what}): write it as http://HOST:PORT or https://HOST, in AWS_ENDPOINT_URL or a profile's "
                "endpoint_url"
            ) from None

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


def _of_aws(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
