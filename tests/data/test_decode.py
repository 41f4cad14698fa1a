"""What the pixels of every sort of image are: orientation, transparency, depth, size, damage."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps
from support.images import encode

from unlearn.data import packing, selection
from unlearn.data.cache import ImageCache
from unlearn.data.decode import decode
from unlearn.data.images import Images
from unlearn.data.scaling import fit
from unlearn.errors import DataError, ImageError

FLAGS = {
    format: np.random.default_rng(3).integers(0, 256, (24, 40, 3), np.uint8)
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
}


def stored(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return encode(FLAGS[format], format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))


@pytest.mark.parametrize("format", FLAGS)
def test_images_are_upright_as_pil_turns_them_or_as_they_are_stored(format):
    for orientation in range(10):  # 0 and 9 mean nothing
        data = stored(format, orientation)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert np.abs(decode(memoryview(data)).astype(int) - upright).max() <= 1, orientation
        if format != "TIFF":  # PIL turns those whatever is asked
            as_stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert np.abs(decode(data, "ignore").astype(int) - as_stored).max() <= 1


def test_orientation_in_xmp_counts_and_damaged_metadata_does_not():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode(encode(FLAGS["JPEG"], "JPEG", xmp=xmp)).shape == (40, 24, 3)
    whole = stored("JPEG", 6)
    place = whole.index(b"Exif\0\0")
    broken = whole[: place + 6] + bytes(20) + whole[place + 26 :]
    assert np.array_equal(decode(broken), decode(whole, "ignore"))


def test_a_run_can_leave_images_as_they_are_stored(tiny_run, tmp_path):
    packing.write([{"image": stored("JPEG", 6), "label": 0, "id": "a"}], str(tmp_path), ["x"])
    for orientation, shape in (("exif", (40, 24, 3)), ("ignore", (24, 40, 3))):
        data = tiny_run(f"data.train={tmp_path}", "data.forget=null", f"data.orientation={orientation}").data
        rows = selection.sets(data, 0)["retain"]
        assert Images(rows, data, ImageCache(1 << 20))[0].shape == shape
    assert tiny_run().hash() == tiny_run("data.orientation=exif").hash() != tiny_run("data.orientation=ignore").hash()


def png(width: int, depth: int, colour: int, row: bytes, *before: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, for what PIL does not write. colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)),
        *before,
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


HIDDEN = np.array([[[9, 8, 7, 255], [9, 8, 7, 0], [0, 100, 200, 51]]], np.uint8)
SEEN = [[9, 8, 7], [255, 255, 255], [204, 224, 244]]


@pytest.mark.parametrize(
    "data, pixels",
    [
        (encode(HIDDEN), SEEN), (encode(HIDDEN, "TIFF"), SEEN),
        (encode(HIDDEN, "WEBP", lossless=True, exact=True), SEEN),
        (encode(HIDDEN, mode="LA"), [[8] * 3, [255] * 3, [220] * 3]),
        (png(3, 8, 3, b"\0\1\2", (b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255])), (b"tRNS", b"\xff\0\x80")),
            [[255, 0, 0], [255] * 3, [127, 127, 255]]),
        (png(3, 8, 0, b"\5\x09\xc8", (b"tRNS", words(9))), [[5] * 3, [255] * 3, [200] * 3]),
        (png(4, 2, 0, b"\x1b", (b"tRNS", words(1))), [[0] * 3, [255] * 3, [170] * 3, [255] * 3]),
        (png(2, 8, 2, b"\5\x09\xc8\1\2\3", (b"tRNS", words(1, 2, 3))), [[5, 9, 200], [255] * 3]),
        (png(2, 16, 2, words(0, 513, 65535, 300, 700, 900), (b"tRNS", words(300, 700, 900))), [[0, 2, 255], [255] * 3]),
        (png(3, 16, 0, words(0, 1000, 40000), (b"tRNS", words(1000))), [[0] * 3, [255] * 3, [156] * 3]),
        (png(2, 16, 4, words(40000, 65535, 40000, 0)), [[156] * 3, [255] * 3]),
        (encode(np.array([[0, 1]], np.uint8), "GIF", "P", transparency=0), [[255] * 3, [1] * 3]),
    ],
    ids=["rgba", "tiff", "webp", "la", "palette", "grey", "grey-2", "rgb-key", "rgb-16", "grey-16", "la-16", "gif"],
)  # fmt: skip
def test_what_is_transparent_is_white(data, pixels):
    assert decode(data)[0].tolist() == pixels


RAMP = np.linspace(0, 65535, 256).astype(np.uint16)[None]
UNIT = np.linspace(0, 1, 256, dtype=np.float32)[None]


@pytest.mark.parametrize(
    "data",
    [encode(RAMP), encode(RAMP, "TIFF"), encode(RAMP, "TIFF", compression="tiff_lzw"), encode(RAMP, "JPEG2000"),
        encode(RAMP, "PPM"), encode(RAMP.astype(np.int32), "TIFF"),
     *(encode(UNIT * np.float32(scale), "TIFF") for scale in (1, 1.02, 255, 1000, 65535)),
     encode(UNIT * 2 - 1, "TIFF")],
    ids=["png", "tiff", "lzw", "jp2", "pgm", "int32", "unit", "over", "bytes", "own", "words", "signed"],
)  # fmt: skip
def test_deep_grey_is_scaled(data):
    found = decode(data)
    assert found.shape[2] == 3 and np.abs(found[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_values_that_are_not_finite_are_damage_and_a_flat_image_is_none():
    with pytest.raises(ImageError, match="not finite"):
        decode(encode(np.array([[0, np.nan]], np.float32), "TIFF"))
    assert (decode(encode(np.full((3, 3), -7, np.float32), "TIFF")) == 0).all()
    inverted = encode(RAMP, "TIFF", tiffinfo={262: 0})
    assert np.array_equal(decode(inverted), 255 - decode(encode(RAMP, "TIFF")))


def test_every_suffix_that_is_packed_is_decoded():
    formats = Image.registered_extensions()
    for suffix in packing.suffixes():
        assert decode(encode(np.full((5, 9, 3), 90, np.uint8), formats[suffix])).shape == (5, 9, 3), suffix
    frames = [Image.new("RGB", (4, 4), (v, 0, 0)) for v in (200, 10)]
    for format in ("GIF", "TIFF", "PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
        assert decode(buffer.getvalue())[0, 0, 0] > 190, format


def header(data: bytes, at: int, form: str, *values: int) -> bytes:
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def test_size_is_refused_before_anything_is_decoded():
    small = np.zeros((64, 64, 3), np.uint8)
    jpeg, gif, bmp, jp2 = (encode(small, format) for format in ("JPEG", "GIF", "BMP", "JPEG2000"))
    tiled = encode(small, "TIFF", compression="tiff_adobe_deflate")
    for tag, other, value in ((278, 322, 65504), (284, 323, 65504), (273, 324, 8), (279, 325, 35)):  # strips to tiles
        tiled = header(tiled, tiled.index(struct.pack("<H", tag)), "<HHII", other, 4, 1, value)
    ihdr = png(1, 8, 0, b"\0")[16:20]
    vast = [header(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 65500, 65500), header(gif, 6, "<HH", 65535, 65535),
            header(bmp, 18, "<ii", 30000, 30000), header(jp2, jp2.index(b"ihdr") + 4, ">II", 65500, 65500),
            b"P6 65500 65500 255\n" + bytes(99),
            png(1, 8, 0, b"\0").replace(ihdr * 2, struct.pack(">II", 65500, 65500)),
            b"RIFF\x30\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xfb\x3f\0\xfb\x3f\0" + bytes(40), tiled]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in vast:
        with pytest.raises(ImageError):
            decode(data)
    fit(np.zeros((20_000, 1, 3), np.uint8), 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("height, width", [(1000, 20), (20, 1000), (3, 400), (2000, 90)])
def test_a_narrow_image_is_what_cutting_after_scaling_gives(height, width):
    y, x = np.mgrid[:height, :width]
    image = (np.stack([np.sin(y / 7), np.sin(x / 5), np.cos(y / 9)], -1) * 60 + 128).astype(np.uint8)
    scale = 32 / min(height, width)
    wide, high = round(width * scale), round(height * scale)
    whole = np.asarray(Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC))
    middle = whole[(high - 32) // 2 :, (wide - 32) // 2 :][:32, :32].astype(int)
    assert np.abs(fit(image, 32) - middle).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_one_damaged_byte_that_libjpeg_tells_is_damage(mode):
    pixels, rng, told = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), np.random.default_rng(0), 0
    whole = encode(pixels.repeat(4, 0).repeat(4, 1), "JPEG", mode)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            simplejpeg.decode_jpeg(bytes(data), mode)
        except ValueError as e:
            if "Invalid SOS" not in str(e):
                told += 1
                with pytest.raises(ImageError):
                    decode(bytes(data))
    assert told > 30


def test_whole_jpegs_of_rare_kinds_are_taken():
    whole = encode(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8), "JPEG")
    camera, scan = bytearray(whole), whole.index(b"\xff\xda")
    camera[scan + 5 + 2 * whole[scan + 4]] = 1  # the start of the spectrum is no matter in a sequential JPEG
    assert np.array_equal(decode(bytes(camera)), decode(whole))
    camera[scan + 200 : scan + 210] = bytes(10)
    with pytest.raises(ImageError):
        decode(bytes(camera))
    # Three blocks of brightness beside one of colour, all flat: twice in each of two rows.
    plain = bytearray(encode(np.full((16, 48, 3), 128, np.uint8), "JPEG", subsampling=0))
    plain[plain.index(b"\xff\xc0") + 11] = 0x31
    scan = plain.index(b"\xff\xda")
    bits = ("001010" * 3 + "0000" * 2) * 4 + "1" * 8
    coded = int(bits[: len(bits) // 8 * 8], 2).to_bytes(len(bits) // 8, "big")
    odd = bytes(plain[: scan + 2 + plain[scan + 3]]) + coded + b"\xff\xd9"
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(odd, "RGB")
    assert (decode(odd) == 128).all()


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"", b"\xff\xd8", b"GIF89a", b"\0" * 100]
)
def test_what_is_no_image_is_an_error_of_both_kinds(data):
    with pytest.raises(ImageError) as told:
        decode(data)
    assert isinstance(told.value, DataError) and isinstance(told.value, ValueError)


def test_postscript_starts_no_program(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(script)).format == "EPS"
    with pytest.raises(ImageError):
        decode(script)
