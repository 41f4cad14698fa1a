"""What to give in place of a path where there are no weights: told by what lies there."""

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from unlearn.errors import WeightsError

# How files end that hold tensors.
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_HUB = re.compile(r"(?:hf://)?[\w-][\w.-]*/[\w-][\w.-]*")
_SNAPSHOT = re.compile(r"(?:.*/)?snapshots/[^/]+(?=/)")


def no_weights(uri: str, names: Sequence[str], known: str) -> WeightsError:
    """The error for a folder, or nothing, at `uri`. names: of the files there, relative to it. known: the files of a
    folder of ours, in words."""
    given = os.path.relpath(uri)
    tops = {PurePosixPath(name).parts[0] for name in names if "/" in name}
    files = [name for name in names if name.lower().endswith(SUFFIXES)]
    if os.path.islink(uri) and not os.path.exists(uri):
        hint = f"it is a link to {os.readlink(uri)}, which is not there"
    elif (
        not names
        and not os.path.exists(os.path.dirname(uri))
        and _HUB.fullmatch(given)
        and not given.lower().endswith(SUFFIXES)
    ):
        hint = (
            f"if {given} is the name of a model on a hub: nothing is downloaded here, so fetch it "
            f"(`hf download {given} --local-dir DIR`) and give DIR"
        )
    elif snapshots := {match[0] for name in names if (match := _SNAPSHOT.match(name))}:
        hint = f"this is a hub's cache: give one of its snapshots ({', '.join(sorted(snapshots)[:3])} in it)"
    elif tops & {"unet", "transformer", "vae"}:
        hint = "its parts are there, but not the model_index.json that says which they are: give the whole folder"
    elif len(files) == 1:
        hint = f"without a config.json beside it, give the file itself: {uri.rstrip('/')}/{files[0]}"
    elif files:
        hint = f"without a config.json, give one of the files itself: {', '.join(files[:4])}"
    else:
        hint = f"give a .safetensors or .pth file, or {known}"
    return WeightsError(f"no weights at {uri}: {hint}")
