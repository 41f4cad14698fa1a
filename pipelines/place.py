"""What the pods of a pipeline's steps get."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from unlearn.errors import ConfigError

IMAGE = "ghcr.io/example/unlearn:VERSION"
RETRIES = 2


@dataclass(frozen=True)
class Place:
    """What the pods of the steps get. image: theirs, and the RayJob's; gpus, cpus, memory: of the steps that compute;
    secrets: (variable, Secret, key in it) for every step; key: (Secret, key in it) of the private key that signs
    releases, for those alone that need it; retries: of a step."""

    image: str = IMAGE
    gpus: int = 0
    cpus: int = 4
    memory: str = "16Gi"
    secrets: tuple[tuple[str, str, str], ...] = ()
    key: tuple[str, str] | None = None
    retries: int = RETRIES


def memory(text: str) -> str:
    """A size as kfp takes it for a pod. Raises ConfigError."""
    if not re.fullmatch(r"[0-9]+([EPTGMK]i?)?", text):
        raise ConfigError(f"--memory {text}: write a size as Kubernetes does, as in 16Gi")
    return text


def training(to: str) -> str:
    """Where to train, as the pipeline's parameter `to` takes it. Raises ConfigError: a step would find it wrong only
    when it runs."""
    url = urlsplit(to)
    if to not in ("here", "k8s") and not re.fullmatch("k8s:.+", to):
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"--to {to}: give k8s (a RayJob), http://HEAD:8265 (a Ray cluster) or here")
    return to


def secret(text: str) -> tuple[str, str, str]:
    """NAME=SECRET/KEY in its parts. Raises ConfigError."""
    name, _, rest = text.partition("=")
    holder, _, key = rest.partition("/")
    if not (name and holder and key):
        raise ConfigError(f"--secret {name}: write it as NAME=SECRET/KEY, a Secret of the namespace and a key in it")
    return name, holder, key


def key(text: str) -> tuple[str, str]:
    """SECRET/KEY in its parts. Raises ConfigError."""
    holder, _, name = text.partition("/")
    if not (holder and name):
        raise ConfigError(f"--key {holder}: write it as SECRET/KEY, a Secret of the namespace and a key in it")
    return holder, name
