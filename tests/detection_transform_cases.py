"""Cases in which the detection transforms are compared with mmdetection's."""

import dataclasses

import numpy as np

SCALE = (96, 60)


@dataclasses.dataclass(frozen=True)
class Case:
  height: int
  width: int
  flip: bool = False


CASES = {
    "landscape": Case(48, 64), "landscape, flipped": Case(48, 64, True),
    "portrait": Case(131, 97), "portrait, flipped": Case(131, 97, True),
    "square": Case(50, 50), "square, flipped": Case(50, 50, True),
    "same size": Case(60, 80, True), "halved": Case(120, 160),
    "halved, flipped": Case(120, 160, True), "wide": Case(20, 200, True),
    "high": Case(211, 17), "odd": Case(427, 640), "one row": Case(1, 40),
    "one column": Case(40, 1, True), "one pixel": Case(1, 1),
    "rounded": Case(333, 500, True)}


def picture(case):
  """An image, uint8 [H, W, 3]; boxes, float32 [8, 4], some partly outside."""
  rng = np.random.default_rng(1000 * case.height + case.width)
  size = np.array([case.width, case.height], np.float64)
  image = rng.integers(0, 256, (case.height, case.width, 3), np.uint8)
  start = rng.uniform(-0.2, 0.8, (8, 2)) * size
  end = start + rng.uniform(0.25, 0.6, (8, 2)) * size
  return image, np.concatenate([start, end], 1).astype(np.float32)
