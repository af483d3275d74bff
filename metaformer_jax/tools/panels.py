"""Pictures of tools: cells with captions, in a grid; and whose they are.

The weights of several models are `--weights=A --weights=B`.
"""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from metaformer_jax import errors

# The larger side of a cell, in pixels: smaller pictures are enlarged by whole
# factors, larger ones reduced.
_SMALLEST, _LARGEST = 160, 640

_FONT, _GAP = 13, 6


class Panel(NamedTuple):
  """A picture, and what is written above it, of one line or several."""

  picture: Image.Image
  caption: str = ""


def grid(rows: Sequence[Sequence[Panel]]) -> Image.Image:
  """Panels in rows and columns, on white.

  All pictures are enlarged or reduced by one factor, so that they compare.

  Args:
    rows: at least one panel; rows may have different numbers of them.

  Returns:
    RGB.
  """
  side = max(max(panel.picture.size) for row in rows for panel in row)
  factor = min(_LARGEST / side, 1)
  if side <= _SMALLEST:  # A whole number, so that pixels stay squares.
    factor = _SMALLEST // side
  rows = [[panel._replace(picture=_resized(panel.picture, factor))
           for panel in row] for row in rows]
  widths = [max(row[i].picture.width for row in rows if i < len(row))
            for i in range(max(map(len, rows)))]
  font = ImageFont.load_default(_FONT)
  step = math.ceil(sum(font.getmetrics())) + 2
  texts = [[_fitting(panel.caption, font, width)
            for panel, width in zip(row, widths)] for row in rows]
  heights = [(max(map(len, lines)) * step,
              max(panel.picture.height for panel in row))
             for row, lines in zip(rows, texts)]
  whole = Image.new("RGB", (
      sum(widths) + _GAP * (len(widths) + 1),
      sum(map(sum, heights)) + _GAP * (len(rows) + 1)), "white")
  draw, y = ImageDraw.Draw(whole), _GAP
  for row, lines, (above, height) in zip(rows, texts, heights):
    x = _GAP
    for panel, text, width in zip(row, lines, widths):
      for i, line in enumerate(text):
        draw.text((x, y + i * step), line, fill="black", font=font)
      whole.paste(panel.picture, (x, y + above))
      x += width + _GAP
    y += above + height + _GAP
  return whole


def _resized(picture: Image.Image, factor: float) -> Image.Image:
  picture = picture.convert("RGB")
  if factor == 1:
    return picture
  size = tuple(max(1, round(side * factor)) for side in picture.size)
  return picture.resize(size, Image.Resampling.NEAREST if factor > 1
                        else Image.Resampling.LANCZOS)


def _fitting(caption: str, font: ImageFont.FreeTypeFont,
             width: int) -> list[str]:
  """The lines of a caption, each cut off where it is too wide."""
  lines = []
  for line in caption.split("\n") if caption else []:
    line, end = errors.one_line(line), ""
    while line and font.getlength(line + end) > width:
      line, end = line[:-1], "…"
    lines.append(line + end)
  return lines


def short(weights: str) -> str:
  """What tells weights apart, for a caption: the last part of their path."""
  return pathlib.PurePath(weights).name or weights


def check(output: str) -> None:
  """Raises ConfigError unless --output names a .png file."""
  if pathlib.Path(output).suffix != ".png":
    raise errors.ConfigError(f"--output: {output} does not end with .png")


def save(picture: Image.Image, output: str) -> None:
  """Writes the picture; ConfigError if that is not possible."""
  try:
    picture.save(output, optimize=True)
  except (OSError, ValueError) as e:
    raise errors.ConfigError(f"--output: {output}: {e}") from e


def add_weights(parser: argparse.ArgumentParser,
                required: bool = True) -> None:
  """The arguments --weights, --model and --allow_import of several models."""
  parser.add_argument("--weights", required=required, action="append",
                      default=[], help="the name of a model with published "
                      "weights, a file, or a run's workdir; several by several "
                      "such arguments")
  parser.add_argument("--model", action="append", default=[],
                      help="a name of metaformer_jax.list_models(), for "
                      "weights that do not record it: once, or once for each "
                      "of --weights")
  parser.add_argument("--allow_import", default="", help="modules of your own "
                      "that the weights may name, separated by commas")


def models_of(weights: Sequence[str], models: Sequence[str],
              ) -> list[tuple[str, str | None]]:
  """Pairs of --weights and their --model.

  Raises:
    ConfigError: there are several models, but not one for each of the weights.
  """
  if len(models) not in (0, 1, len(weights)):
    raise errors.ConfigError(
        f"--model: {len(models)} names for {len(weights)} --weights; give one, "
        "or one for each")
  if len(models) < 2:
    models = (list(models) or [None]) * len(weights)
  return list(zip(weights, models))
