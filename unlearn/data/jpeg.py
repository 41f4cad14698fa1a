"""JPEGs by simplejpeg (libjpeg-turbo): twice as fast as PIL, and it tells of damage that PIL takes without a word."""

from collections.abc import Iterator

import numpy as np
import simplejpeg

# Markers: start of the first scan, EXIF or XMP, frame headers (baseline, extended, progressive).
SCAN, METADATA, FRAMES = 0xDA, 0xE1, (0xC0, 0xC1, 0xC2)


def size(data: memoryview | bytes) -> tuple[int, int]:
    """(width, height) by the header; (0, 0) where simplejpeg does not understand the header."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return int(width), int(height)
    except ValueError:
        return 0, 0


def pixels(data: memoryview | bytes) -> np.ndarray | None:
    """(H, W, 3) uint8; None where libjpeg complains of nothing, and only PIL converts these colours or this sampling.

    Raises ValueError for whatever libjpeg complains of: it is damage.
    """
    try:
        if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
            return simplejpeg.decode_jpeg(data, "RGB")
        simplejpeg.decode_jpeg(data, "CMYK")  # for the complaints
    except ValueError as e:
        # Cameras write such scan headers. They mean nothing in sequential JPEGs, but may hide a second complaint.
        if "Invalid SOS parameters" in str(e) and (mended := _plain_scan(data)) != data:
            return pixels(mended)
        if "subsampling" not in str(e) or not _sampled_evenly(data):
            raise
    return None


def has_metadata(data: memoryview | bytes) -> bool:
    """Whether there is EXIF or XMP."""
    return any(marker == METADATA for marker, _ in _segments(data))


def _plain_scan(data: memoryview | bytes) -> bytes:
    """The JPEG with the usual parameters in the header of its first scan."""
    mended = bytearray(data)
    for marker, place in _segments(data):
        if marker == SCAN:
            parameters = place + 5 + 2 * data[place + 4]
            mended[parameters : parameters + 3] = b"\x00\x3f\x00"
    return bytes(mended)


def _sampled_evenly(data: memoryview | bytes) -> bool:
    """Whether the sampling factors divide each other, as those of whole files do."""
    for marker, place in _segments(data):
        if marker in FRAMES:
            factors = data[place + 11 : place + 10 + 3 * data[place + 9] : 3]
            across, down = [byte >> 4 for byte in factors], [byte & 15 for byte in factors]
            return all(value and max(values) % value == 0 for values in (across, down) for value in values)
    return False


def _segments(data: memoryview | bytes) -> Iterator[tuple[int, int]]:
    """(marker, its place) of each segment up to the first scan."""
    place = 2
    while place + 5 < len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        yield marker, place
        if marker == SCAN:
            return
        place += 2 + (data[place + 2] << 8 | data[place + 3])
