"""Certificates: an in-toto Statement v1 in a DSSE envelope, signed with Ed25519. Other tools can check them too.

    https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
    https://github.com/secure-systems-lab/dsse/blob/master/envelope.md

Keys are PEM files: PKCS #8 without a passphrase, and SubjectPublicKeyInfo. Their id is the sha256 that TUF and in-toto
give a key.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from unlearn import documents
from unlearn.errors import CertificateError

# What cryptography raises for a file that is no key, one with a passphrase, and one of a kind that it does not know.
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)
# What securesystemslib raises for a document that is no envelope: a part is missing, of another type, or no base64.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError)
STATEMENT, PAYLOAD = "https://in-toto.io/Statement/v1", "application/vnd.in-toto+json"


@dataclass(frozen=True)
class Statement:
    """subject: {name: sha256} of what is spoken of. predicate: what is said of it, in the form that predicate_type
    names."""

    subject: dict[str, str]
    predicate_type: str
    predicate: dict[str, Any]

    def tree(self) -> dict[str, Any]:
        """As in-toto writes it."""
        subject = [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(self.subject.items())]
        return {
            "_type": STATEMENT,
            "subject": subject,
            "predicateType": self.predicate_type,
            "predicate": self.predicate,
        }


def generate(name: str) -> tuple[str, SSlibKey]:
    """Write a new pair of keys, NAME.key (for its owner alone) and NAME.pub; (path of NAME.pub, the public key).

    Raises CertificateError where one of the files is there, which is never overwritten.
    """
    signer = CryptoSigner.generate_ed25519()
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer.public_key.keyval["public"]))
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        if os.path.exists(f"{name}.pub"):
            raise FileExistsError(None, None, f"{name}.pub")
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        for path, mode, content in ((f"{name}.key", 0o600, signer.private_bytes), (f"{name}.pub", 0o644, pem)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    except FileExistsError as e:
        raise CertificateError(
            f"{e.filename} is there already, and a key is never overwritten: give another name"
        ) from None
    except OSError as e:
        raise CertificateError(f"{name}.key: {e.strerror}") from None
    return f"{name}.pub", signer.public_key


def private_key(path: str) -> CryptoSigner:
    """The key that signs. Raises CertificateError."""
    data = _bytes(path)
    try:
        key = load_pem_private_key(data, None)
    except UNREADABLE:
        key = None  # never what is in the file, nor what the parser says of it
    if not isinstance(key, Ed25519PrivateKey):
        raise CertificateError(
            f"{path} is no private Ed25519 key in PEM without a passphrase: make one with `unlearn release keygen`"
        )
    return CryptoSigner(key)


def public_key(path: str) -> SSlibKey:
    """The key that checks. Raises CertificateError."""
    data = _bytes(path)
    try:
        key = load_pem_public_key(data)
    except UNREADABLE:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise CertificateError(
            f"{path} is no public Ed25519 key in PEM: give the .pub file that `unlearn release keygen` wrote"
        )
    return SSlibKey.from_crypto(key)


def sign(statement: Statement, signer: CryptoSigner) -> bytes:
    """The envelope, as it is stored. Raises ValueError where JSON cannot hold a value of the statement exactly."""
    envelope = Envelope(rfc8785.dumps(statement.tree()), PAYLOAD, {})
    envelope.sign(signer)
    return _stored(envelope)


def verify(data: bytes, key: SSlibKey, where: str) -> Statement:
    """The statement of an envelope that this key has signed. where: names the file in messages. Raises
    CertificateError."""
    envelope = _envelope(data, where)
    (signer,) = envelope.signatures
    if signer != key.keyid:
        raise CertificateError(
            f"{where}: signed with another key (id {signer[:16]}), not with this one (id {key.keyid[:16]})"
        )
    try:
        envelope.verify([key], 1)
    except VerificationError:
        raise CertificateError(f"{where}: the signature does not fit: what was signed has been changed") from None
    return _statement(envelope, where)


def read(data: bytes, where: str) -> tuple[Statement, str]:
    """(what an envelope states, the id of the key that it names); the signature is not checked. Raises
    CertificateError."""
    envelope = _envelope(data, where)
    return _statement(envelope, where), next(iter(envelope.signatures))


def _envelope(data: bytes, where: str) -> Envelope:
    try:
        envelope = Envelope.from_dict(documents.from_json(data))
        # A signature covers the payload alone; that nothing else was changed is seen by writing the envelope again.
        if len(envelope.signatures) != 1 or _stored(envelope) != data or envelope.payload_type != PAYLOAD:
            raise ValueError
        return envelope
    except DAMAGE:
        raise CertificateError(f"{where} is damaged: it is no certificate as it was written") from None


def _statement(envelope: Envelope, where: str) -> Statement:
    try:
        tree = documents.from_json(envelope.payload)
        subject = {part["name"]: part["digest"]["sha256"] for part in tree["subject"]}
        statement = Statement(subject, tree["predicateType"], dict(tree["predicate"]))
        if tree["_type"] != STATEMENT or statement.tree() != tree:
            raise ValueError
        return statement
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CertificateError(f"{where}: what is signed is no in-toto statement of this program") from None


def _stored(envelope: Envelope) -> bytes:
    return json.dumps(envelope.to_dict(), indent=1).encode() + b"\n"


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise CertificateError(f"{path}: {e.strerror}; give the file of a key") from None
