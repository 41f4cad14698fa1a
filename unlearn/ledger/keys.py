"""The Ed25519 keys that checkpoints are signed with: PEM files, PKCS8 for the private one."""

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.signer import CryptoSigner, SSlibKey

from unlearn.errors import LedgerError


def signer(path: str) -> CryptoSigner:
    """Raises LedgerError where the file holds no private Ed25519 key that is not encrypted."""
    try:
        key = load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a password
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise LedgerError(f"{path}: not a private Ed25519 key (PEM, PKCS8, without a password)")
    return CryptoSigner(key)


def public(path: str) -> SSlibKey:
    """Raises LedgerError where the file holds no public Ed25519 key."""
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise LedgerError(f"{path}: not a public Ed25519 key (PEM); verifying needs no private one")
    return SSlibKey.from_crypto(key)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read(1 << 16)
    except OSError as e:
        raise LedgerError(f"{path}: {e.strerror}") from None
