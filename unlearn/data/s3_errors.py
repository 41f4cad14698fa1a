"""What the errors of S3 and its client mean. No text from here contains a credential."""

import re

from unlearn import patience

_HINTS = {
    "InvalidAccessKeyId": "the access key is not known there: check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret does not fit the access key: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired: renew it",
    "AccessDenied": "these credentials may not do this: check the bucket's policy",
    "403": "these credentials are wrong or may not do this: check them and the bucket's policy",
    "NoSuchBucket": "there is no such bucket: check its name, the region and the endpoint (AWS_ENDPOINT_URL)",
    "NoSuchKey": "there is no such object",
    "404": "there is no such object or bucket",
    "PreconditionFailed": "it was replaced while it was read: start again",
    "412": "it was replaced while it was read: start again",
    "InvalidRange": "it was cut short while it was read: start again",
    "416": "it was cut short while it was read: start again",
}
# Codes by which a server refuses keys, among them those that have expired; 400 and 403 are all that HEAD tells.
KEYS = {
    "ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AccessDenied", "400", "403",
}  # fmt: skip
# Codes that may pass by themselves, whatever the status of the response.
_PASSING = {
    "SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BadDigest",
    "IncompleteBody",
}  # fmt: skip


def code(error: BaseException) -> str:
    """The error code of S3's response, or nothing."""
    response = getattr(_inner(error), "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def hint(code: str) -> str:
    """What a code means, where it is known; else the code."""
    return _HINTS.get(code) or code


def fault(error: Exception) -> str | None:
    """What is wrong with the server or the way to it, of an error that may pass by itself; None of any other."""
    inner = _inner(error)
    if not _of_client(inner):
        return None
    from botocore import exceptions

    if isinstance(inner, exceptions.ClientError):
        status = _status(inner)
        if code(inner) in _PASSING or status == 429 or (status >= 500 and status != 501):
            return f"the S3 server fails ({status} {code(inner)})"
        return None
    if isinstance(inner, exceptions.SSLError):
        text = str(inner).lower()
        return None if "certificate" in text or "wrong_version" in text else "the connection to the S3 server breaks"
    if isinstance(inner, exceptions.EndpointConnectionError | exceptions.ConnectTimeoutError):
        return "no S3 server answers: check AWS_ENDPOINT_URL and the network"
    broken = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
    )
    if isinstance(inner, broken):
        return f"the connection to the S3 server breaks ({type(inner).__name__})"
    if type(inner).__name__ == "ResponseParserError":
        return "what answers is no S3 server, or it fails"
    return None


def meaning(error: Exception) -> str | None:
    """What an error of S3 or its client means, and what to do; None where it is of neither."""
    inner = _inner(error)
    if not _of_client(inner):
        return None
    if what := fault(error):
        waited = f"; it was waited for, {patience.seconds():.0f} s (storage.patience)" if patience.seconds() else ""
        return f"{what}{waited}. The data may well be whole: go on when the server is there"
    if 300 <= _status(inner) < 400:
        return f"{_elsewhere(inner)}: give that address in AWS_ENDPOINT_URL, or the bucket's region in AWS_REGION"
    if type(inner).__name__ == "SSLError":
        return (
            "no TLS connection: give the certificates of the server's authority in AWS_CA_BUNDLE, or http:// in "
            "AWS_ENDPOINT_URL for a server without TLS"
        )
    if type(inner).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return (
            "no S3 credentials found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public "
            "bucket UNLEARN_S3_ANONYMOUS"
        )
    return _HINTS.get(code(inner)) or str(inner)[:200]


def _elsewhere(error: BaseException) -> str:
    headers = getattr(error, "response", {})["ResponseMetadata"].get("HTTPHeaders", {})
    target = re.sub(r"//[^/@]*@|\?.*", lambda m: "//" if m[0][0] == "/" else "", headers.get("location", ""))[:120]
    return (
        f"the S3 server sends elsewhere ({_status(error)}{f', to {target}' if target else ''}), which is not followed"
    )


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0


def _of_client(error: BaseException) -> bool:
    # Only S3 calls import botocore, so its errors are recognized by their module.
    return type(error).__module__.startswith(("botocore", "boto3", "s3transfer"))


def _inner(error: BaseException) -> BaseException:
    """The error that a transfer has wrapped, else itself."""
    if type(error).__name__ == "RetriesExceededError":
        return getattr(error, "last_exception", error)
    if type(error).__name__ == "S3UploadFailedError":
        return error.__cause__ or error.__context__ or error
    return error
