"""From the bytes of an encoded image to the pixels that a model sees."""

import io
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile

from unlearn.data import grey, jpeg
from unlearn.errors import ImageError

Orientation = Literal["exif", "ignore"]
# Of all formats that PIL knows, those that images are published in; others start programs (PostScript) or match
# anything.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Pixels of one image; more is what PIL calls a decompression bomb. Decoding takes some 16 bytes for each.
LARGEST = 178_956_970
TILE_WIDTH, TILE_HEIGHT = 322, 323  # TIFF tags


def decode(data: memoryview | bytes, orientation: Orientation = "exif") -> np.ndarray:
    """(H, W, 3) uint8 of an encoded image: 8 bits, over white where it is transparent, the first frame of several.

    orientation: turn the image upright as its EXIF says, or leave it as it is stored.
    Raises ImageError where it is damaged, too large, or of another format.
    """
    try:
        if bytes(data[:2]) == b"\xff\xd8":
            _check_size(*jpeg.size(data))
            pixels = jpeg.pixels(data)
            if pixels is None:
                pixels = np.asarray(_open(data).convert("RGB"))
            upright = _orientation(data) if orientation == "exif" and jpeg.has_metadata(data) else 1
        else:
            image = _open(data)
            key = _transparent_value(image)
            image.load()
            upright = _orientation(image) if orientation == "exif" else 1
            pixels = _pixels(image, key)
        return _turned(pixels, upright)
    except ImageError:
        raise
    except Exception as e:  # the libraries raise whatever they meet first: a dozen types, not all of them documented
        raise ImageError(" ".join(f"{e}".split()) or type(e).__name__) from None


def _open(data: memoryview | bytes) -> ImageFile.ImageFile:
    """Reads the header alone."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"more than {LARGEST:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise ImageError("damaged, or of no format that is read here") from None
    tags = getattr(image, "tag_v2", {})
    _check_size(*image.size)
    _check_size(tags.get(TILE_WIDTH, 0), tags.get(TILE_HEIGHT, 0))  # unpacked whole, however small the image is
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > LARGEST:
        raise ImageError(f"{width} x {height} pixels, more than {LARGEST:,}")


def _orientation(image: Image.Image | memoryview | bytes) -> int:
    """EXIF orientation, 1 to 8; 1 where the metadata cannot be read: the pixels may be good all the same."""
    try:
        opened = image if isinstance(image, Image.Image) else _open(image)
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) or (W, H, 3): what is stored with this EXIF orientation, upright."""
    if orientation not in range(2, 9):
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _transparent_value(image: ImageFile.ImageFile) -> object:
    """The value whose pixels are transparent (PNG, GIF), in the depth of the decoded pixels; None where there is none.

    PIL decodes 16 bits of colour, and 2 or 4 of grey, to 8, but not this value.
    """
    key, stored = image.info.get("transparency"), image.tile[0].args if image.format == "PNG" and image.tile else None
    if isinstance(key, tuple) and stored == "RGB;16B":
        return tuple(value >> 8 for value in key)
    if isinstance(key, int) and stored in ("L;2", "L;4"):
        return key * (85 if stored == "L;2" else 17)
    return key


def _pixels(image: Image.Image, key: object) -> np.ndarray:
    """(H, W, 3) uint8 of a loaded image. key: of `_transparent_value`."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = grey.eight_bits(image)
        if isinstance(key, int):
            values[np.asarray(image) == key] = 255
        return np.repeat(values[..., None], 3, axis=2)
    if key is not None:
        image.info["transparency"] = key
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        white.alpha_composite(seen)
        return np.asarray(white.convert("RGB"))
    return np.asarray(image.convert("RGB"))
