"""Files of a folder of images: odd but valid ones, and bad ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 24, 16
NOISE = np.random.default_rng(0).integers(
    0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def encode(picture, form="PNG", **kw) -> bytes:
  if isinstance(picture, np.ndarray):
    picture = Image.fromarray(picture)
  out = io.BytesIO()
  picture.save(out, form, **kw)
  return out.getvalue()


def png(width, height, depth=8, colour=2, rows=b"", chunks=()) -> bytes:
  """A PNG written by hand; in `rows` a byte comes before each row of pixels."""

  def chunk(name, data):
    return (struct.pack(">I", len(data)) + name + data +
            struct.pack(">I", zlib.crc32(name + data)))

  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
      chunk(*c) for c in ((b"IHDR", header), *chunks,
                          (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))


def _rows(array) -> bytes:
  return b"".join(b"\0" + row.tobytes() for row in array)


def _palette() -> Image.Image:
  picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L")
  picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
  return picture


def _rotated() -> Image.Exif:
  exif = Image.Exif()
  exif[0x0112] = 6  # To be rotated by 90 degrees for display.
  return exif


def _gif_of_a_large_frame() -> bytes:
  """A GIF of one pixel with a frame of 65,535 x 65,535."""
  return (b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) +
          b"!\xf9\x04" + struct.pack("<BHBB", 8, 0, 0, 0) +
          b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) +
          b"\x02\x02\x44\x01\x00;")


_JPEG, _PNG = encode(NOISE, "JPEG"), encode(NOISE)
_HALF = len(_JPEG) // 2
_GRAY16 = np.array([[0, 255, 256], [16384, 32768, 65535]], np.uint16)
_GRAY = (_GRAY16 >> 8)[..., None].repeat(3, -1).astype(np.uint8)
_RGB16 = np.array([[[0, 256, 65535], [32768, 511, 1]]], ">u2")
_PIXELS = np.array([[[10, 20, 30], [40, 50, 60], [70, 80, 90]]], np.uint8)
_ALPHA = np.array([[[1, 2, 3, 0], [4, 5, 6, 128]]], np.uint8)
_FRAMES = [Image.new("RGB", (3, 2), c) for c in ("red", "lime", "blue")]
_RED = np.array([[[255, 0, 0]] * 3] * 2, np.uint8)

# Files that can be decoded, and their pixels.
ODD = {
    "rgb png": (_PNG, NOISE),
    "palette": (encode(_palette()), _PIXELS),
    "transparent palette": (encode(_palette(), transparency=1), _PIXELS),
    "palette of transparencies": (
        encode(_palette(), transparency=b"\0\x80\xff"), _PIXELS),
    "rgba": (encode(_ALPHA), _ALPHA[..., :3]),
    "gray and alpha": (encode(_ALPHA[..., 2:]),
                       _ALPHA[..., 2:3].repeat(3, -1)),
    "gray and a transparent value": (
        encode(_GRAY[..., 0], transparency=64), _GRAY),
    "16-bit gray png": (encode(_GRAY16), _GRAY),
    "16-bit gray tiff": (encode(_GRAY16, "TIFF"), _GRAY),
    "16-bit pgm": (b"P5 3 2 65535\n" + _GRAY16.astype(">u2").tobytes(), _GRAY),
    "16-bit rgb png": (png(2, 1, 16, 2, _rows(_RGB16)),
                       (_RGB16 >> 8).astype(np.uint8)),
    "16-bit gray and alpha png": (
        png(2, 1, 16, 4, _rows(_RGB16[..., :2])),
        (_RGB16[..., :1] >> 8).astype(np.uint8).repeat(3, -1)),
    "10-bit pgm": (b"P5 2 1 1023\n" + struct.pack(">HH", 1023, 0),
                   np.array([[[255] * 3, [0] * 3]], np.uint8)),
    "black and white": (encode(Image.new("1", (3, 2), 1)),
                        np.full((2, 3, 3), 255, np.uint8)),
    "1x1": (encode(NOISE[:1, :1]), NOISE[:1, :1]),
    "gif": (encode(_FRAMES[0], "GIF"), _RED),
    "animated gif": (encode(_FRAMES[0], "GIF", save_all=True,
                            append_images=_FRAMES[1:]), _RED),
    "animated png": (encode(_FRAMES[0], save_all=True,
                            append_images=_FRAMES[1:]), _RED),
    "lossless webp": (encode(NOISE, "WEBP", lossless=True), NOISE),
    "bmp": (encode(NOISE, "BMP"), NOISE),
    "lzw tiff": (encode(NOISE, "TIFF", compression="tiff_lzw"), NOISE),
    # Full magenta and yellow, no cyan: red.
    "cmyk jpeg": (encode(Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "JPEG",
                         quality=100), _RED),
    # Pixels as they are stored: not rotated.
    "exif-rotated png": (encode(NOISE, exif=_rotated()), NOISE),
    "exif-rotated jpeg": (encode(NOISE, "JPEG", exif=_rotated()),
                          np.asarray(Image.open(io.BytesIO(_JPEG)))),
}

# 400 million pixels in 50 kB; decoded, they take 400 MB.
BOMB = png(20_000, 20_000, 1, 0, bytes(20_000 * 2_501))

_EXPANDS = zlib.compress(bytes(2**25))


def _metadata(name, data):
  return png(1, 1, rows=bytes(4), chunks=[(name, data)])


# Small files that would take much memory.
BOMBS = {
    "png": BOMB,
    "png, header only": BOMB[:50],
    "gif's frame": _gif_of_a_large_frame(),
    "webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + b"\xff" * 13,
    "iTXt": _metadata(b"iTXt", b"text\0\1\0\0\0" + _EXPANDS),
    "zTXt": _metadata(b"zTXt", b"text\0\0" + _EXPANDS),
    "iCCP": _metadata(b"iCCP", b"profile\0\0" + _EXPANDS),
}

# Files that cannot be used.
BAD = {
    "cut jpeg": _JPEG[:_HALF],
    "cut progressive jpeg": encode(NOISE, "JPEG", progressive=True)[:-9],
    "jpeg, zeros from the middle": _JPEG[:_HALF] + bytes(len(_JPEG) - _HALF),
    "jpeg, ten bytes": _JPEG[:10],
    "cut png": _PNG[:_HALF],
    "cut gif": encode(NOISE, "GIF")[:-30],
    "cut webp": encode(NOISE, "WEBP")[:-9],
    "cut bmp": encode(NOISE, "BMP")[:-9],
    "damaged png": _PNG[:99] + bytes(50) + _PNG[149:],
    "empty": b"",
    "zeros": bytes(5_000),
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "float tiff": encode(np.full((2, 3), 0.5, np.float32), "TIFF"),
    "32-bit tiff": encode(np.full((2, 3), 2**20, np.int32), "TIFF"),
    "float pfm": b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5),
    **{f"bomb: {name}": data for name, data in BOMBS.items()},
}
