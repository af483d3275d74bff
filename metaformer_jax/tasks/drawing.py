"""Label maps as pictures."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Of an overlay: the part of a pixel's colour that is its class's.
_OPACITY = 0.55

# Classes in a legend; the others are counted.
_LISTED = 20


def palette(n: int = 256) -> np.ndarray:
  """The colours of Pascal VOC: class i -> uint8 [n, 3], black for class 0.

  The bits of i are spread over the three channels, highest bits first, so that
  classes with near numbers have distant colours (VOCcode/VOClabelcolormap.m of
  the VOC development kit).
  """
  colours = np.zeros((n, 3), np.uint8)
  numbers = np.arange(n)
  for bit in range(8):
    for channel in range(3):
      colours[:, channel] |= (
          (numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
  return colours


def colours_of(classes: np.ndarray) -> np.ndarray:
  """Colours of class numbers, none of them black: int [...] -> [..., 3]."""
  return palette(257)[np.asarray(classes, np.int64) + 1]


def labels(label_map: np.ndarray) -> Image.Image:
  """A label map, uint8 [H, W], as a picture with a palette.

  Its values are the classes; viewers show their colours.
  """
  height, width = label_map.shape
  picture = Image.frombytes("P", (width, height), label_map.tobytes())
  picture.putpalette(colours_of(np.arange(256)).ravel().tolist())
  return picture


def overlay(image: np.ndarray, label_map: np.ndarray,
            names: Sequence[str]) -> Image.Image:
  """The colours of the classes on the image, and a legend beside it.

  Args:
    image: uint8 [H, W, 3].
    label_map: uint8 [H, W].
    names: of the classes.

  Returns:
    RGB; the image is at its left. The legend lists the classes with most
    pixels first.
  """
  mixed = (1 - _OPACITY) * image + _OPACITY * colours_of(label_map)
  picture = Image.fromarray(mixed.round().astype(np.uint8))
  counts = np.bincount(label_map.ravel(), minlength=256)
  ranked = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
  lines = [(names[i], tuple(colours_of(i).tolist())) for i in ranked[:_LISTED]]
  if len(ranked) > _LISTED:
    lines.append((f"{len(ranked) - _LISTED} more", (255, 255, 255)))
  return _beside(picture, _legend(lines, picture.height))


def _legend(lines: Sequence[tuple[str, tuple[int, ...]]],
            height: int) -> Image.Image:
  """Names beside squares of their colours, black on white."""
  size = min(max(height // (len(lines) + 1) * 2 // 3, 10), 24)
  font, step = ImageFont.load_default(size), size * 3 // 2
  width = max(font.getlength(name) for name, _ in lines)
  legend = Image.new("RGB", (int(width) + 3 * size, step * len(lines) + size),
                     "white")
  draw = ImageDraw.Draw(legend)
  for i, (name, colour) in enumerate(lines):
    y = size // 2 + i * step
    draw.rectangle((size // 2, y, size // 2 + size, y + size), fill=colour,
                   outline="black")
    draw.text((2 * size, y), name, fill="black", font=font)
  return legend


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
  both = Image.new("RGB", (left.width + right.width,
                           max(left.height, right.height)), "white")
  both.paste(left, (0, 0))
  both.paste(right, (left.width, 0))
  return both
