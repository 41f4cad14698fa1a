"""Let a CUDA build of torchvision be imported beside a CPU build of torch.

The wheels of torchvision on PyPI are CUDA builds. Beside a CPU torch their extension does not load, the schemas of
their operators are never registered, and `import torchvision` fails, and with it timm and torchmetrics. Registering the
two schemas that the import asks for lets it through; models and transforms then work, `torchvision.ops.nms` and
`torchvision.io` do not (nothing here uses them).

Import this module before timm, torchvision, torchmetrics or open_clip. It does nothing where torchvision loads by
itself.
"""

import importlib.util
import sys
from pathlib import Path

import torch

_library = None  # the schemas live as long as this object


def _extension_loads(origin: str) -> bool:
    extension = next(Path(origin).parent.glob("_C*.so"), None)
    if extension is None:
        return False
    try:
        torch.ops.load_library(str(extension))
        return True
    except OSError:
        return False


def _prepare() -> None:
    global _library
    if "torchvision" in sys.modules or torch.version.cuda or torch.version.hip:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.origin or _extension_loads(spec.origin):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_prepare()
