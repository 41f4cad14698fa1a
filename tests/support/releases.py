"""Run folders as a finished run leaves them, made without training: small weights, and figures of the test's choice."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from unlearn import config
from unlearn.data.storage import Storage
from unlearn.models import tensor_files


def finished(uri: str, number: int = 0, base: str = "0" * 64, audit: dict | None = None, oracle: float | None = None,
             forget: float = 0.4, retain: float = 0.9, **changes: Any) -> str:  # fmt: skip
    """Write a run to `uri`, with weights of its own for each number; its URI.

    base: sha256 of what it started from. forget, retain: cosine of the unlearned model, the base's being 0.9 on both;
    oracle: that of the oracle on the forget set. changes: of `data.forget` in the configuration.
    """
    folder = Storage(uri)
    tree = {
        "run_dir": uri, "name": f"run-{number}", "seed": number, "model": {"weights": "base"},
        "data": {"train": "shards", "forget": changes or {"classes": ["ant"]}},
        "training": {"steps": 4, "batch_size": 8},
    }  # fmt: skip
    settings = config.parse(copy.deepcopy(tree))
    with folder.writing("model/weights.safetensors") as path:
        sha256 = tensor_files.save({"encoder.w": torch.full((64,), float(number))}, path)
    card = {
        "family": "mae", "options": {}, "sha256": sha256, "software": "unlearn 0.1.0", "run": settings.name,
        "from": "base",
        "config_hash": settings.hash(), "data": {"retain": "1" * 64, "forget": "2" * 64, "weights": base},
    }  # fmt: skip
    figures = {
        ("original", "forget"): 0.9,
        ("original", "retain"): 0.9,
        ("unlearned", "forget"): forget,
        ("unlearned", "retain"): retain,
    }
    figures |= {("oracle", "forget"): oracle} if oracle is not None else {}
    rows = [
        {"generator": generator, "set": name, "view": view, "images": 8, "fid": None, "cosine": value, "psnr": 20.0}
        for (generator, name), value in figures.items()
        for view in ("centre 0.5", "random 0.25")
    ]
    metrics = {
        "config_hash": settings.hash(), "features": "efficientnet_lite0", "resize": "tf1", "guidance_scale": None,
        "views": ["centre 0.5", "random 0.25"], "weights": {"original": base, "unlearned": sha256}, "rows": rows,
        "training_seconds": 1.5,
    }  # fmt: skip
    files = {
        "model/model.json": json.dumps(card),
        "config.yaml": yaml.safe_dump(tree),
        "metrics.json": json.dumps(metrics),
    }
    if audit is not None:
        files["audit.json"] = json.dumps({"weights": {"unlearned": sha256}} | audit)
    for name, text in files.items():
        folder.write(name, text.encode())
    return uri


def elliptic_keys(folder: Path) -> tuple[str, str]:
    """The paths of a new pair of keys for a second signature, private and public."""
    key = ec.generate_private_key(ec.SECP256R1())
    own, handed_out = folder / "model.key", folder / "model.pub"
    own.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    handed_out.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return str(own), str(handed_out)


def weights_of(run: str) -> str:
    """sha256 of the weights of a run."""
    return json.loads(Storage(run).read("model/model.json"))["sha256"]
