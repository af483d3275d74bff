"""Label maps, boxes and masks as pictures."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metaformer_jax import errors

# Of an overlay: the part of a pixel's colour that is its class's.
_OPACITY = 0.55

# The same of a mask, whose object is to be seen.
_FILLED = 0.4

# Of an image with boxes: the part that labels may cover, besides the best one.
_COVERED = 0.2

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
  classes = np.asarray(classes, np.int64)
  return palette(classes.max(initial=0) + 2)[classes + 1]


def labels(label_map: np.ndarray) -> Image.Image:
  """A label map, uint8 [H, W], as a picture with a palette.

  Its values are the classes; viewers show their colours.
  """
  height, width = label_map.shape
  picture = Image.frombytes("P", (width, height), label_map.tobytes())
  picture.putpalette(colours_of(np.arange(256)).ravel().tolist())
  return picture


def overlay(image: np.ndarray, label_map: np.ndarray, names: Sequence[str],
            legend: bool = True) -> Image.Image:
  """The colours of the classes on the image, and a legend beside it.

  Args:
    image: uint8 [H, W, 3].
    label_map: uint8 [H, W]; what is no class is not coloured.
    names: of the classes.
    legend: whether there is one.

  Returns:
    RGB; the image is at its left. The legend lists the classes with most
    pixels first.
  """
  mixed = (1 - _OPACITY) * image + _OPACITY * colours_of(label_map)
  mixed = np.where(label_map[..., None] < len(names), mixed, image)
  picture = Image.fromarray(mixed.round().astype(np.uint8))
  counts = np.bincount(label_map.ravel(), minlength=256)[:len(names)]
  if not (legend and counts.any()):
    return picture
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


class _Plate(NamedTuple):
  """The label of a box: a rectangle of its colour with text, in pixels."""

  x: int
  y: int
  width: int
  height: int
  text: str
  colour: tuple[int, int, int]

  def overlaps(self, other: "_Plate") -> bool:
    return (abs(2 * (self.x - other.x) + self.width - other.width)
            < self.width + other.width
            and abs(2 * (self.y - other.y) + self.height - other.height)
            < self.height + other.height)


def boxes(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray,
          scores: np.ndarray | None, names: Sequence[str]) -> Image.Image:
  """Boxes in the colours of their classes, with names and scores.

  Better boxes are drawn over others. Labels lie at the edges of their boxes,
  inside the image. Where there is no place for all, those of the best boxes are
  drawn: labels neither cover each other nor most of the image.

  Args:
    image: uint8 [H, W, 3].
    boxes: float [n, 4], x1, y1, x2 and y2 in pixels.
    labels: int [n], the classes.
    scores: float [n]; None for objects without, the first one then is the best.
    names: of the classes.

  Returns:
    RGB, of the image's size.
  """
  picture = Image.fromarray(image)
  draw = ImageDraw.Draw(picture)
  for i in _ranked(scores, len(boxes))[::-1]:
    _outline(draw, _inside(_pixels(boxes[i], picture.size), picture.size),
             tuple(colours_of(labels[i]).tolist()), _line(picture.size))
  _label(picture, boxes, labels, scores, names)
  return picture


def masks(image: np.ndarray, masks: Sequence[np.ndarray], boxes: np.ndarray,
          labels: np.ndarray, scores: np.ndarray | None,
          names: Sequence[str]) -> Image.Image:
  """Masks in the colours of their classes, with outlines, names and scores.

  The masks of better objects are drawn over others. Labels are those of
  `boxes`, of which nothing else is drawn.

  Args:
    image: uint8 [H, W, 3].
    masks: bool [n, H, W].
    boxes: float [n, 4], x1, y1, x2 and y2 in pixels.
    labels: int [n], the classes.
    scores: float [n], or None.
    names: of the classes.

  Returns:
    RGB, of the image's size.
  """
  drawn = image.copy()
  for i in _ranked(scores, len(boxes))[::-1]:
    _fill(drawn, masks[i], colours_of(labels[i]), _line(image.shape[:2]))
  picture = Image.fromarray(drawn)
  _label(picture, boxes, labels, scores, names)
  return picture


def _fill(image: np.ndarray, mask: np.ndarray, colour: np.ndarray,
          line: int) -> None:
  """Mixes a colour into a mask's pixels; its edge has the colour itself.

  Along the edge there is a thinner line, black or white, as with boxes.
  """
  rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
  if not len(rows):
    return
  part = np.s_[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
  image, mask = image[part], mask[part]
  mixed = (1 - _FILLED) * image[mask] + _FILLED * colour
  image[mask] = mixed.round().astype(np.uint8)
  inner = _eroded(mask, line)
  image[mask & ~inner] = colour
  contrast = 255 * (_legible(tuple(colour.tolist())) == "white")
  image[inner & ~_eroded(inner, max(1, line // 2))] = contrast


def _eroded(mask: np.ndarray, n: int) -> np.ndarray:
  """A mask without the pixels that have n steps or fewer to its outside."""
  for _ in range(n):
    padded = np.pad(mask, 1)
    mask = (mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2]
            & padded[1:-1, 2:])
  return mask


def _line(size: tuple[int, int]) -> int:
  """The width of edges on an image."""
  return max(1, round(min(size) / 200))


def _pixels(box: np.ndarray, size: tuple[int, int]) -> list[int]:
  """A box in whole pixels, inside of an image of (width, height)."""
  return np.clip(np.round(box), 0, size * 2).astype(int).tolist()


def _label(picture: Image.Image, boxes: np.ndarray, labels: np.ndarray,
           scores: np.ndarray | None, names: Sequence[str]) -> None:
  """Writes names and scores beside boxes; the arguments are those of `boxes`.
  """
  draw = ImageDraw.Draw(picture)
  font = ImageFont.load_default(max(min(picture.size) / 35, 10))
  plates, left = [], _COVERED * picture.width * picture.height
  for i in _ranked(scores, len(boxes)):
    if left <= 0:
      break
    text = _text(names[labels[i]], None if scores is None else scores[i], font,
                 picture.width)
    places = _plates(_pixels(boxes[i], picture.size), text,
                     tuple(colours_of(labels[i]).tolist()), font, picture.size)
    free = next((place for place in places
                 if not any(map(place.overlaps, plates))), None)
    if free:
      plates.append(free)
      left -= free.width * free.height
  for plate in plates:
    _write(draw, plate, font)


def _ranked(scores: np.ndarray | None, n: int) -> np.ndarray:
  """The numbers of n objects, the best one first."""
  if scores is None:
    return np.arange(n)
  return np.argsort(-np.asarray(scores), kind="stable")


def _inside(box: Sequence[int], size: tuple[int, int]) -> tuple[int, ...]:
  """The first and the last pixels of a box, of which it has at least one."""
  x1, y1, x2, y2 = box
  x1, y1 = min(x1, size[0] - 1), min(y1, size[1] - 1)
  return x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)


def _outline(draw: ImageDraw.ImageDraw, box: tuple[int, ...],
             colour: tuple[int, int, int], line: int) -> None:
  """The edges of a box, and along them a thinner line, black or white.

  One of the two differs from any background.
  """
  draw.rectangle(box, outline=_legible(colour), width=line + max(1, line // 2))
  draw.rectangle(box, outline=colour, width=line)


def _text(name: str, score: float | None, font: ImageFont.FreeTypeFont,
          width: int) -> str:
  """A name and any score; the end of the name is cut off if it is too wide."""
  name, end = errors.one_line(name), ""
  score = "" if score is None else f" {score:.2f}"
  while name and font.getlength(
      f"{name}{end}{score}") + 2 * _padding(font) > width:
    name, end = name[:-1], "…"
  return f"{name}{end}{score}"


def _plates(box: Sequence[int], text: str, colour: tuple[int, int, int],
            font: ImageFont.FreeTypeFont,
            size: tuple[int, int]) -> Iterator[_Plate]:
  """The label of a box at each place where it may be, the best one first.

  Above the box, inside it, below it; at its left, then at its right.
  """
  width = math.ceil(font.getlength(text)) + 2 * _padding(font)
  height = sum(font.getmetrics()) + 2 * _padding(font)
  x1, y1, x2, y2 = box
  for x in (x1, x2 - width):
    for y in (y1 - height, y1, y2, y2 - height):
      x = min(max(x, 0), size[0] - width)
      if x >= 0 and 0 <= y <= size[1] - height:
        yield _Plate(x, y, width, height, text, colour)


def _padding(font: ImageFont.FreeTypeFont) -> int:
  return max(1, round(font.size / 8))


def _write(draw: ImageDraw.ImageDraw, plate: _Plate,
           font: ImageFont.FreeTypeFont) -> None:
  x, y, pad = plate.x, plate.y, _padding(font)
  draw.rectangle((x, y, x + plate.width - 1, y + plate.height - 1),
                 fill=plate.colour)
  draw.text((x + pad, y + pad), plate.text, font=font,
            fill=_legible(plate.colour))


def _legible(colour: tuple[int, int, int]) -> str:
  """Black or white, whichever has the higher contrast with a colour.

  Both have the same with a relative luminance of 0.179, by the contrast ratio
  of WCAG 2.1.
  """
  linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
            for x in (value / 255 for value in colour)]
  luminance = np.dot(linear, (0.2126, 0.7152, 0.0722))
  return "black" if luminance > 0.179 else "white"
