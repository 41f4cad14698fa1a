"""What a file of weights is, told by its first bytes: of safetensors, of torch, or something that cannot be loaded."""

import json
import re
import zipfile
from pathlib import Path

from unlearn.errors import WeightsError

HEAD = 512  # bytes that are looked at
_LFS = b"version https://git-lfs"
# How files begin that are no weights, or hold them in a form that is not read, and what to say of them.
_OTHERS = {
    b"<": "it is a web page or XML; the address it was fetched from gave no file",
    b"{": "it is JSON; give the file or the folder of the weights themselves",
    b"\x1f\x8b": "it is compressed by gzip: unpack it first",
    b"\xfd7zXZ": "it is compressed by xz: unpack it first",
    b"BZh": "it is compressed by bzip2: unpack it first",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it first",
    b"7z\xbc\xaf": "it is a 7z archive: unpack it first",
    b"GGUF": "it is of GGUF, whose numbers are quantised: give the weights as safetensors",
    b"\x89HDF": "it is of HDF5 (Keras): save the weights as safetensors",
    b"\x93NUMPY": "it is one array of NumPy: save the dictionary of tensors as safetensors",
}
_GLOBAL = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class) ([\w.]+)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def is_safetensors(path: Path, uri: str) -> bool:
    """Whether a file is of safetensors; otherwise it is one that torch may have written.

    uri: names the file in messages. Raises WeightsError that says what it is where it is neither, or was cut short.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEAD)
            if head[8:9] == b"{":
                length = int.from_bytes(head[:8], "little")
                file.seek(8)
                _check_length(file.read(length) if 8 + length <= size else b"", length, size, uri)
                return True
    except OSError as e:
        raise unreadable(uri, e.strerror or str(e)) from None
    if not head:
        raise unreadable(uri, "it is empty: fetch it again")
    if head.startswith(_LFS):
        raise WeightsError(f"{uri} is a pointer of git-lfs, not the file itself: fetch that with `git lfs pull`")
    if what := next((what for start, what in _OTHERS.items() if head.lstrip().startswith(start)), None):
        raise unreadable(uri, what)
    if path.suffix.lower() == ".safetensors" and head[:1] in (b"P", b"\x80"):  # torch goes by this name too
        raise unreadable(uri, "it is no file of safetensors; if torch wrote it, call it .pth")
    if head.startswith(b"PK"):
        _check_archive(path, uri)
    elif head[257:262] == b"ustar":
        raise unreadable(
            uri, "it is a tar archive: unpack it; if torch before 0.4 wrote it, save it again by a later one"
        )
    elif head[:1] != b"\x80":  # what pickles begin with
        kinds = "neither of safetensors nor of torch"
        raise unreadable(uri, f"it is {kinds}" if size > 8 else f"it is {kinds}: of {size} bytes")
    return False


def unreadable(uri: str, why: str) -> WeightsError:
    return WeightsError(f"{uri} cannot be read as weights (safe formats only): {why}")


def _check_length(header: bytes, length: int, size: int, uri: str) -> None:
    """Raise WeightsError where a file of safetensors is shorter or longer than its header says."""
    if not header:
        raise unreadable(
            uri, f"it is cut short: {size:,} bytes are there, its header alone has {length:,}. Fetch it again"
        )
    try:
        parts = json.loads(header)
        end = max((part["data_offsets"][1] for name, part in parts.items() if name != "__metadata__"), default=0)
        whole = 8 + length + int(end)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise unreadable(uri, "its header is damaged: fetch it again") from None
    if size < whole:
        raise unreadable(uri, f"it is cut short: {size:,} of {whole:,} bytes are there. Fetch it again")
    if size > whole:
        raise unreadable(uri, f"it is damaged: it has {size:,} bytes, its header says {whole:,}. Fetch it again")


def _check_archive(path: Path, uri: str) -> None:
    """Raise WeightsError where a zip file is none of torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        raise unreadable(
            uri, "it is cut short or damaged (the end of its zip archive is missing): fetch it again"
        ) from None
    if any("/code/" in name for name in names):
        raise unreadable(
            uri, "it is a TorchScript program: open it with torch.jit.load(FILE) and save its state_dict() alone"
        )
    if not any(name.endswith("data.pkl") for name in names):
        shown = ", ".join(names[:4])
        raise unreadable(
            uri, f"it is a zip archive of other files ({shown}): unpack it and give the file of the weights"
        )


def why(error: Exception) -> str:
    """Why a file of a library cannot be read, in one line, with the way out where it holds more than plain data."""
    text = _ANSI.sub("", str(error))
    if found := _GLOBAL.search(text):
        return (
            f"it holds {found[1]}, which is no plain data. If you trust it, open it with torch.load(FILE, "
            "weights_only=False) and save its dictionary of tensors alone"
        )
    if "Unsupported operand" in text:
        return (
            "it is a pickle that torch.save did not write, or damaged. If you trust it, open it in Python and save its "
            "dictionary of tensors with torch.save"
        )
    text = text.partition("WeightsUnpickler error: ")[2] or text
    return " ".join(text.split())[:300] or type(error).__name__
