"""The private keys that a cycle signs its releases with."""

import os

from securesystemslib.signer import CryptoSigner

from unlearn import certificate
from unlearn.cycles.cycle import KEY, Cycle
from unlearn.errors import CycleError
from unlearn.releases import model_signature


def signer(cycle: Cycle) -> CryptoSigner:
    """The key of the certificates, after a look at that of the second signature, if there is to be one. Raises
    CycleError, CertificateError, MissingExtra."""
    path = cycle.key or os.environ.get(KEY)
    if not path:
        raise CycleError(
            f"no key signs the releases: give its path as `key`, or in {KEY} (a pipeline: --key SECRET/KEY); see "
            "`unlearn release keygen`"
        )
    if cycle.model_key:
        model_signature.check(cycle.model_key)
    return certificate.private_key(path)
