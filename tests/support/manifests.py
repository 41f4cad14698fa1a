"""Manifests as earlier versions wrote them."""

import json

from unlearn.data import shards
from unlearn.data.manifest import Manifest
from unlearn.data.storage import Storage

OLDER = "manifest.json"


def as_json(manifest: Manifest) -> bytes:
    optional = ("names", "images", "values", "counts", "labels", "checks")
    tree = {name: value for name, value in vars(manifest).items() if name in ("columns", "classes", *optional)}
    groups = ([dict(vars(group)) for group in shard.row_groups] for shard in manifest.shards)
    tree["shards"] = [vars(s) | {"row_groups": g} for s, g in zip(manifest.shards, groups, strict=True)]
    for part in (tree, *tree["shards"], *(group for shard in tree["shards"] for group in shard["row_groups"])):
        for name in optional:
            if not part.get(name, True):
                del part[name]
    return json.dumps(tree | {"hash": manifest.hash}, indent=1).encode()


def made_older(uri: str) -> Manifest:
    """Write the manifest of a folder as earlier versions did, in place of the one that is there."""
    manifest = shards.load(uri)
    Storage(uri).write(OLDER, as_json(manifest))
    Storage(uri).delete(shards.MANIFEST)
    return manifest
