"""What the tests of releases share: one pair of keys, and a store."""

import pytest

from unlearn import certificate
from unlearn.releases.store import Store


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> str:
    """KEYS.key and KEYS.pub."""
    name = str(tmp_path_factory.mktemp("keys") / "releases")
    certificate.generate(name)
    return name


@pytest.fixture(scope="session")
def signer(keys):
    return certificate.private_key(f"{keys}.key")


@pytest.fixture(scope="session")
def public(keys):
    return certificate.public_key(f"{keys}.pub")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))
