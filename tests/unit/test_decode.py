import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from openeva.data import decode as decode_module
from openeva.data.decode import DecodeError, decode, to_rgb


def picture(height=24, width=36):
    """Smooth colours, so that lossy formats stay close."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) * 255 // (height + width)], -1).astype(np.uint8)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 98, "subsampling": 0}, 8),
        ("JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 8),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("GIF", {}, 60),
    ],
)
def test_formats_give_rgb(format, options, tolerance):
    rgb = decode(encoded(Image.fromarray(picture()), format, **options))
    assert rgb.dtype == np.uint8
    assert rgb.shape == (24, 36, 3)
    assert rgb.flags.c_contiguous
    assert rgb.flags.writeable
    assert np.abs(rgb.astype(int) - picture()).max() <= tolerance


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_fast_jpeg_equals_pillow(subsampling):
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", quality=80, subsampling=subsampling)
    pillow = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(decode(data).astype(int) - pillow).max() <= 1


def test_jpeg_without_the_fast_decoder(monkeypatch):
    data = encoded(Image.fromarray(picture()), "JPEG", quality=95)
    fast = decode(data)
    monkeypatch.setattr(decode_module, "simplejpeg", None)
    assert np.abs(decode(data).astype(int) - fast).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "YCbCr", "LAB"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_modes_give_rgb(mode, format):
    image = Image.fromarray(picture())
    image = Image.new("LAB", image.size, (128, 128, 128)) if mode == "LAB" else image.convert(mode)
    try:
        data = encoded(image, format)
    except OSError:
        pytest.skip(f"{format} has no {mode}")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    rgb = decode(data)
    assert rgb.shape == (24, 36, 3)
    assert np.abs(rgb.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(format):
    grey = (np.arange(24 * 36).reshape(24, 36) * 65535 // (24 * 36 - 1)).astype(np.uint16)
    rgb = decode(encoded(Image.fromarray(grey), format))
    assert np.abs(rgb[:, :, 1].astype(int) - np.rint(grey / 257)).max() <= 1
    assert rgb.min() == 0
    assert rgb.max() == 255


def test_32_bit_and_float_images():
    integers = np.array([[0, 65535], [32768, 257]], np.int32)
    assert to_rgb(Image.fromarray(integers))[:, :, 0].tolist() == [[0, 255], [128, 1]]
    assert to_rgb(Image.fromarray(np.array([[0, 1.0], [0.5, np.nan]], np.float32)))[:, :, 0].tolist() == [
        [0, 255],
        [128, 0],
    ]
    assert to_rgb(Image.fromarray(np.array([[0, 254.0]], np.float32)))[:, :, 0].tolist() == [[0, 254]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (0, 0, 2, 2))
    rgb = decode(encoded(image, "GIF") if mode == "P" else encoded(image.convert(mode), "PNG"))
    assert np.abs(rgb[:, :2].astype(int) - 200).max() <= 4
    assert (rgb[:, 2:] == 255).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(picture()), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert upright.shape == ((36, 24, 3) if orientation >= 5 else (24, 36, 3))
    rgb = decode(data)
    assert np.abs(rgb.astype(int) - upright).max() <= 1
    assert rgb.flags.c_contiguous


def test_broken_exif_does_not_hide_the_picture():
    plain = encoded(Image.fromarray(picture()), "JPEG")
    segment = b"Exif\0\0" + b"garbage!"
    data = plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:]
    assert (decode(data) == decode(plain)).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_animations_give_their_first_frame(format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    rgb = decode(data)
    assert rgb.shape == (6, 8, 3)
    assert np.abs(rgb.astype(int) - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7])
def test_truncated_files_are_decode_errors(format, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    with pytest.raises(DecodeError):
        decode(data[: int(share * len(data))])


def test_garbage_is_a_decode_error():
    rng = np.random.default_rng(0)
    for head in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"RIFF\x10\0\0\0WEBP"):
        with pytest.raises(DecodeError):
            decode(head + rng.bytes(300))


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch):
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 500)
    for format in ("JPEG", "PNG"):
        with pytest.raises(DecodeError, match="36 x 24 pixels are more than the limit of 500"):
            decode(encoded(Image.fromarray(picture()), format))


def test_large_images_below_the_limit_are_silent(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # Pillow warns above this, fails above twice this
    assert decode(encoded(Image.fromarray(picture()), "PNG")).shape == (24, 36, 3)
