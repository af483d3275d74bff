"""Random images: the structure of each format, with wrong and extreme values.

`image(rng)` puts a file together of the parts that its format has, in mostly
the right order and mostly with right lengths and checksums, so that decoders
get far into it. Numbers are extreme, parts are missing or come thousands of
times, and some bytes are changed at the end.
"""

import functools
import io
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Rng = np.random.Generator

# The most bytes of a file.
LARGEST = 2**22


def one(rng: Rng, *values):
  return values[rng.integers(len(values))]


def number(rng: Rng, bits: int = 16) -> int:
  """Small, near a power of two, or any."""
  power = int(rng.integers(bits + 1))
  return int(one(rng, int(rng.integers(5)), (1 << power) - 1,
                 1 << min(power, bits - 1), int(rng.integers(1 << bits)),
                 int(rng.integers(300)))) & ((1 << bits) - 1)


def side(rng: Rng, bits: int = 16) -> int:
  """Mostly one that makes a picture of at most a million pixels."""
  return number(rng, bits) if rng.random() < 0.2 else int(
      one(rng, 1, 2, 17, 40, 100, 900))


def often(rng: Rng) -> int:
  """How many times a part comes: once, mostly."""
  return int(10 ** rng.uniform(0, 4.5)) if rng.random() < 0.1 else 1


def some(rng: Rng, *parts: Callable[[], bytes]) -> bytes:
  """A few of the parts, in any order, some of them repeated."""
  found = b""
  for _ in range(rng.integers(4)):
    part = one(rng, *parts)()
    n = min(often(rng), LARGEST // (len(part) + 1))
    found += part * n
  return found


def noise(rng: Rng, most: int = 400) -> bytes:
  n = int(rng.integers(most))
  return one(rng, rng.bytes(n), bytes(n), b"\xff" * n)


def packed(rng: Rng, n: int) -> bytes:
  """About n bytes, deflated; or a bomb; or damaged."""
  data = zlib.compress(one(rng, bytes(n), rng.bytes(min(n, 9999)),
                           bytes(10 * n + 2**20 * (rng.random() < 0.1))))
  return data[:rng.integers(len(data))] if rng.random() < 0.1 else data


@functools.cache
def _encoded(form: str, mode: str, width: int, height: int, **kw) -> bytes:
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3),
                                             np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(out, form, **kw)
  return out.getvalue()


def encoded(rng: Rng, form: str, modes: Sequence[str], **kw) -> bytes:
  """A file as Pillow writes it."""
  return _encoded(form, one(rng, *modes), *one(rng, (1, 1), (9, 7), (64, 48)),
                  **{k: one(rng, *v) for k, v in kw.items()})


def png(rng: Rng) -> bytes:
  def chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data) ^ int(rng.random() < 0.02)
    n = len(data) if rng.random() < 0.98 else number(rng, 32)
    return struct.pack(">I", n) + name + data + struct.pack(">I", checksum)

  width, height = side(rng, 31), side(rng, 31)
  depth, colour = one(rng, 1, 2, 4, 8, 8, 16), one(rng, 0, 2, 2, 3, 4, 6)
  row = 1 + -(-width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] // 8)
  text = functools.partial(packed, rng, 2**int(rng.integers(21)))

  def ancillary() -> bytes:
    return some(
        rng, lambda: chunk(b"PLTE", noise(rng, 800)),
        lambda: chunk(b"tRNS", noise(rng)),
        lambda: chunk(b"tEXt", b"key\0" + noise(rng)),
        lambda: chunk(b"zTXt", b"key\0\0" + text()),
        lambda: chunk(b"iTXt", b"key\0\1\0\0\0" + text()),
        lambda: chunk(b"iCCP", b"name\0\0" + text()),
        lambda: chunk(b"eXIf", tiff(rng)[:2**16]),
        lambda: chunk(b"gAMA", noise(rng, 9)),
        lambda: chunk(b"acTL", struct.pack(">II", number(rng, 31), 0)),
        lambda: chunk(b"fcTL", struct.pack(
            ">IIIIIHHBB", number(rng, 31), side(rng, 31), side(rng, 31),
            number(rng), number(rng), 1, 100, number(rng, 2), number(rng, 1))),
        lambda: chunk(b"fdAT", struct.pack(">I", number(rng, 31)) + text()),
        lambda: chunk(rng.bytes(4), noise(rng)))

  data = packed(rng, min(row * height, LARGEST))
  cuts = sorted(rng.integers(0, len(data) + 1, rng.integers(4)).tolist())
  idat = b"".join(chunk(b"IDAT", data[a:b]) for a, b in zip(
      [0, *cuts], [*cuts, len(data)]))
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0,
                       number(rng, 1))
  return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), ancillary(),
                   idat, ancillary(), chunk(b"IEND", b"")))


def jpeg(rng: Rng) -> bytes:
  def segment(marker: int, data: bytes) -> bytes:
    n = len(data) + 2 if rng.random() < 0.98 else number(rng)
    return b"\xff" + bytes([marker]) + struct.pack(">H", n & 65535) + data

  data = encoded(rng, "JPEG", ("RGB", "L", "CMYK"), quality=(5, 90),
                 progressive=(False, True, True))
  # The headers, and the scans with the tables before each.
  parts, place = [], 2
  while data[place + 1] != 0xD9:
    start, marker = place, data[place + 1]
    place += 2 + struct.unpack_from(">H", data, place + 2)[0]
    while marker == 0xDA and not (data[place] == 0xFF and
                                  data[place + 1] not in (0, *range(208, 216))):
      place += 1
    parts.append((marker, data[start:place]))
  out = b"\xff\xd8"
  for marker, part in parts:
    out += some(
        rng, lambda: segment(0xE1, b"Exif\0\0" + tiff(rng)[:60_000]),
        lambda: segment(0xE2, b"ICC_PROFILE\0\1\1" + noise(rng)),
        lambda: segment(int(rng.integers(0xE0, 0xF0)), noise(rng)),
        lambda: segment(0xFE, noise(rng)), lambda: b"\xff",
        lambda: segment(0xDD, struct.pack(">H", number(rng))),
        lambda: bytes([0xFF, int(rng.integers(0xD0, 0xD8))]))
    if 0xC0 <= marker <= 0xC2 and rng.random() < 0.4:
      part = (part[:5] + struct.pack(">HH", side(rng), side(rng)) + part[9:])
      if rng.random() < 0.3:
        i = int(rng.integers(9, len(part)))
        part = part[:i] + bytes([number(rng, 8)]) + part[i + 1:]
    if rng.random() < 0.03:
      continue
    out += part * min(often(rng), LARGEST // len(part) // 4)
  return out + one(rng, b"\xff\xd9", b"", b"\xff\xd9" + noise(rng))


def gif(rng: Rng) -> bytes:
  def blocks(data: bytes) -> bytes:
    return b"".join(bytes([len(data[i:i + 255])]) + data[i:i + 255]
                    for i in range(0, len(data), 255)) + b"\0"

  def extension() -> bytes:
    return some(
        rng, lambda: b"!\xfe" + blocks(noise(rng, 2000)),
        lambda: b"!\xff\x0bNETSCAPE2.0" + blocks(noise(rng, 9)),
        lambda: b"!\xf9\x04" + rng.bytes(4) + b"\0",
        lambda: b"!" + rng.bytes(1) + blocks(noise(rng)), lambda: b"\0")

  def frame() -> bytes:
    flags = one(rng, 0, 0x40, 0x80, 0x87)
    table = rng.bytes(3 * 2 ** ((flags & 7) + 1)) if flags & 0x80 else b""
    picture = encoded(rng, "GIF", ("P", "L"))
    pixels = picture[picture.rindex(b",") + 11:-1]
    return (b"," + struct.pack("<HHHHB", number(rng), number(rng), side(rng),
                               side(rng), flags) + table
            + one(rng, pixels, bytes([number(rng, 4)]) + blocks(
                noise(rng, 9999))))

  flags = one(rng, 0, 0x80, 0xF7)
  table = rng.bytes(3 * 2 ** ((flags & 7) + 1)) if flags & 0x80 else b""
  return (one(rng, b"GIF89a", b"GIF87a") + struct.pack(
      "<HHBBB", side(rng), side(rng), flags, 0, 0) + table + extension()
          + frame() + some(rng, frame, extension) + one(rng, b";", b""))


def webp(rng: Rng) -> bytes:
  def chunk(name: bytes, data: bytes) -> bytes:
    n = len(data) if rng.random() < 0.95 else number(rng, 32)
    return name + struct.pack("<I", n) + data + b"\0" * (len(data) % 2)

  def three(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFF)[:3]

  def picture() -> bytes:
    data = bytearray(encoded(rng, "WEBP", ("RGB", "RGBA"),
                             lossless=(False, True))[12:])
    if rng.random() < 0.5:  # Of the header, where the size is.
      data[8 + int(rng.integers(min(20, len(data) - 8)))] = number(rng, 8)
    return bytes(data)

  def frame() -> bytes:
    return chunk(b"ANMF", three(number(rng)) + three(number(rng))
                 + three(side(rng) - 1) + three(side(rng) - 1)
                 + three(number(rng)) + bytes([number(rng, 2)]) + picture())

  body = one(rng, picture(), chunk(b"VP8X", bytes([number(rng, 6), 0, 0, 0])
                                   + three(side(rng) - 1)
                                   + three(side(rng) - 1))
             + some(rng, lambda: chunk(b"ICCP", noise(rng)),
                    lambda: chunk(b"ANIM", noise(rng, 7)),
                    lambda: chunk(b"EXIF", tiff(rng)[:2**16]),
                    lambda: chunk(rng.bytes(4), noise(rng)))
             + chunk(b"ANIM", bytes(6)) + frame() + some(rng, frame, picture))
  return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def bmp(rng: Rng) -> bytes:
  bits = one(rng, 1, 4, 8, 8, 16, 24, 32)
  kind = {4: 2, 8: 1, 16: 3, 32: 3}.get(bits, 0) if rng.random() < 0.6 else (
      number(rng, 3))
  n = 1 << bits if bits <= 8 else 0
  header = struct.pack(
      "<IiiHHIIiiII", one(rng, 40, 40, 108, 124), side(rng, 31),
      side(rng, 31) * one(rng, 1, -1), 1, bits, kind, 0, 0, 0,
      n if rng.random() < 0.9 else number(rng, 32), 0)
  body = header + rng.bytes(one(rng, 0, 12, 68, 84)) + rng.bytes(4 * n)
  runs = some(rng, lambda: bytes([number(rng, 8), number(rng, 8)]),
              lambda: b"\0\0", lambda: b"\0\1", lambda: b"\0\2" + rng.bytes(2),
              lambda: b"\0\x09" + rng.bytes(10))
  return (b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(body)) + body + runs
          + noise(rng, 5000))


def ppm(rng: Rng) -> bytes:
  def gap() -> bytes:
    return some(rng, lambda: b" ", lambda: b"\n",
                lambda: b"#" + noise(rng) + b"\n") or b" "

  kind = one(rng, *b"123456fF")
  values = [b"P" + bytes([kind]), gap(), str(side(rng, 31)).encode(), gap(),
            str(side(rng, 31)).encode()]
  if kind not in b"14":
    values += [gap(), str(one(rng, 1, 254, 255, 1023, 65535,
                              number(rng))).encode()]
  body = one(rng, noise(rng, 2**20), b"1 " * number(rng, 19),
             b"99999999 " * number(rng, 12))
  return b"".join([*values, b"\n", body])


def tiff(rng: Rng) -> bytes:
  order, big = one(rng, "<", ">"), rng.random() < 0.2
  n = 8 if big else 4
  word = "Q" if big else "I"
  width, height = side(rng), side(rng)
  rows = one(rng, height, 1, number(rng))
  count = int(one(rng, 1, -(-height // max(rows, 1)), number(rng, 18)))
  body = noise(rng, 2**16)
  entries = {
      256: (4, [width]), 257: (4, [height]), 258: (3, one(
          rng, [8], [8, 8, 8], [1], [16], [8] * 4)),
      259: (3, [one(rng, 1, 1, 5, 7, 8, 32773, 2, 3, 4, 6, 34925, 50000,
                    number(rng))]),
      262: (3, [one(rng, 0, 1, 2, 3, 6)]), 273: (4, [8] * count),
      277: (3, [one(rng, 1, 3, 4)]), 278: (4, [rows]),
      279: (4, [one(rng, 10, len(body), number(rng, 32))] * count),
      320: (3, [number(rng)] * 768), 34675: (7, list(noise(rng))),
      274: (3, [number(rng, 4)]), 282: (5, [number(rng, 32), 0])}
  if rng.random() < 0.3:
    entries |= {322: (4, [side(rng)]), 323: (4, [side(rng)]),
                324: (4, [8] * count), 325: (4, [100] * count)}
  for _ in range(often(rng)):
    entries[number(rng)] = (int(rng.integers(19)), number(rng, 28))
  for tag in list(entries):
    if rng.random() < 0.03:
      del entries[tag]
  codes = {1: "B", 3: "H", 4: "I", 5: "I", 7: "B"}
  rows, data = b"", body
  for tag, (kind, values) in sorted(entries.items()):
    if isinstance(values, int):  # Their number; they are somewhere.
      rows += struct.pack(order + "HH" + 2 * word, tag, kind, values,
                          int(rng.integers(8, 99)))
      continue
    packed_ = struct.pack(f"{order}{len(values)}{codes[kind]}", *values)
    length = len(values) // 2 if kind == 5 else len(values)
    place = packed_.ljust(n, b"\0")
    if len(packed_) > n:
      place = struct.pack(order + word, 16 + len(data))
      data += packed_
    rows += struct.pack(order + "HH" + word, tag, kind, length) + place
  magic = b"II" if order == "<" else b"MM"
  start = 16 + len(data)
  head = magic + (struct.pack(order + "HHHQ", 43, 8, 0, start) if big else
                  struct.pack(order + "HI", 42, start) + bytes(8))
  following = struct.pack(order + word, one(rng, 0, 0, start, 8))
  counted = struct.pack(order + ("Q" if big else "H"), len(entries) & 65535)
  return head + data + counted + rows + following


FORMATS = {"png": png, "jpeg": jpeg, "gif": gif, "webp": webp, "bmp": bmp,
           "ppm": ppm, "tiff": tiff}


def image(rng: Rng) -> tuple[str, bytes]:
  """A format, and a file of it."""
  form = one(rng, *FORMATS)
  data = bytearray(FORMATS[form](rng)[:LARGEST])
  if data and rng.random() < 0.3:
    for _ in range(rng.integers(1, 9)):
      data[int(len(data) * rng.random() ** 3)] = number(rng, 8)
  if rng.random() < 0.1:
    del data[int(rng.integers(len(data) + 1)):]
  return form, bytes(data)
