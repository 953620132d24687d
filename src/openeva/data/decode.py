"""Encoded images to RGB arrays, whatever the format.

bytes -> JPEG decoder (simplejpeg) or Pillow -> orientation applied -> uint8 `[Y, X, 3]`.

Differences to the official reader (Pillow's `convert("RGB")`), all deliberate: EXIF orientation is applied, transparent
pixels show white instead of whatever colour lies below them, 16-bit greys are scaled to 8 bits instead of clipped.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow reads the same files, at 0.6 of the speed
    simplejpeg = None

RGB = npt.NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs (Pillow's own limit for an error)."""

_ORIENTATION = 0x0112


class DecodeError(OSError):
    """The bytes are not a complete image of a known format."""


def decode(data: bytes) -> RGB:
    """RGB pixels of an encoded image (its first frame), upright according to its EXIF orientation.

    Raises:
        DecodeError: Truncated, corrupt, of an unknown format, or of more than `MAX_PIXELS` pixels.
    """
    if simplejpeg is not None and data[:3] == b"\xff\xd8\xff":
        try:
            height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
            if height * width > MAX_PIXELS:
                raise DecodeError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
            if colour_space not in {"CMYK", "YCCK"}:
                return _upright(simplejpeg.decode_jpeg(data), _jpeg_orientation(data))
        except ValueError:
            pass  # odd or broken: Pillow reads more, and says what is wrong with the rest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bomb warnings below the limit, odd metadata
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DecodeError(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS}")
                return to_rgb(image)
        except DecodeError:
            raise
        except UnidentifiedImageError:  # its text is the address of the buffer
            raise DecodeError("not an image, or of an unknown format" if data else "the file is empty") from None
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... for broken files
            raise DecodeError(str(error) or type(error).__name__) from None


def to_rgb(image: Image.Image) -> RGB:
    """RGB pixels of a Pillow image of any mode: alpha over white, integers of more than 8 bits scaled to 8.

    32-bit integer images whose values fit 16 bits count as 16-bit; floating point images count as 0..1 where all their
    values lie there, else as 0..255.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image).astype(np.float64))
        full = (
            (1.0 if grey.max() <= 1 else 255.0)
            if image.mode == "F"
            else (65535.0 if grey.max() <= 65535 else 2**31 - 1)
        )
        grey = np.rint(grey.clip(0, full) * (255 / full)).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation, 1 (upright) where there is none."""
    start = 2
    while data[start] == 0xFF and (0xE0 <= data[start + 1] <= 0xEF or data[start + 1] == 0xFE):  # APPn and comments
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        if data[start + 1] == 0xE1 and data[start + 4 : start + 10] == b"Exif\0\0":
            exif = Image.Exif()
            try:
                exif.load(data[start + 4 : start + 2 + length])
                return int(exif.get(_ORIENTATION, 1))
            except Exception:  # broken metadata do not make the picture unreadable
                return 1
        start += 2 + length
    return 1


def _upright(image_YXC: RGB, orientation: int) -> RGB:
    """Undo the orientation that a camera wrote down, as `PIL.ImageOps.exif_transpose` does."""
    if orientation not in range(2, 9):
        return image_YXC
    if orientation >= 5:
        image_YXC = image_YXC.transpose(1, 0, 2)
    if orientation in {2, 3, 6, 7}:
        image_YXC = image_YXC[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        image_YXC = image_YXC[::-1]
    return np.ascontiguousarray(image_YXC)
