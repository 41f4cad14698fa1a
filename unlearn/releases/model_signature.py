"""A second signature of a release's model, in the form of OpenSSF model-signing: whoever serves models checks it with
tools that know nothing of our certificate. Made offline by an elliptic-curve key; no transparency log is asked. Needs
the extra `signing`.

    model_signing verify key RELEASE/model --signature RELEASE/model.sig --public_key model.pub
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from unlearn.certificate import UNREADABLE
from unlearn.errors import CertificateError, MissingExtra
from unlearn.releases.release import CARD, WEIGHTS, File

CURVES = ("secp256r1", "secp384r1", "secp521r1")  # that the format knows; Ed25519 is not among them


def check(path: str) -> None:
    """Raises CertificateError where the file at `path` is no key that can sign so; MissingExtra."""
    try:
        import model_signing  # noqa: F401
    except ImportError:
        raise MissingExtra("model-signing", "signing", "a signature of the model") from None
    try:
        key = load_pem_private_key(Path(path).read_bytes(), None)
    except OSError as e:
        raise CertificateError(f"{path}: {e.strerror}; give the file of a key") from None
    except UNREADABLE:  # never what is in the file, nor what the parser says of it
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise CertificateError(
            f"{path} is no private elliptic-curve key in PEM without a passphrase, as the second signature wants it: "
            "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out model.key"
        )


def sign(files: Mapping[str, File], path: str) -> bytes:
    """The signature of the files below model/ of a release, from their digests, by the key at `path`. Raises as
    `check`."""
    check(path)
    from model_signing import hashing, manifest, signing
    from model_signing._hashing.hashing import Digest  # no public name leads to it

    class Known(hashing.Config):
        """What was hashed while it was copied is not read again."""

        def hash(self, model_path, *, files_to_hash=None):
            form = manifest.SerializationType.from_args(
                {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
            )
            names = {name: PurePosixPath(name).relative_to("model") for name in (WEIGHTS, CARD)}
            digests = {name: Digest("sha256", bytes.fromhex(files[name].sha256)) for name in names}
            items = [manifest.FileManifestItem(path=names[name], digest=digests[name]) for name in names]
            return manifest.Manifest("model", items, form)

    with tempfile.TemporaryDirectory(prefix="unlearn-signature-") as scratch:
        made = Path(scratch, "model.sig")
        config = signing.Config().use_elliptic_key_signer(private_key=Path(path))
        config.set_hashing_config(Known()).sign("model", made)
        return made.read_bytes()
