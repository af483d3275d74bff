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


class Fixed:
  """A generator whose only draw is whether to flip."""

  def __init__(self, flip):
    self._draws = [0.0 if flip else 0.999]

  def random(self):
    return self._draws.pop()


def record(image, boxes=(), labels=None, **more):
  """As `metaformer_jax.data.sources.base` describes it."""
  boxes = np.reshape(np.array(boxes, np.float32), (-1, 4))
  labels = np.zeros(len(boxes), np.int32) if labels is None else labels
  return {"image": image, "boxes": boxes, "labels": np.array(labels, np.int32),
          "size": image.shape[:2], **more}


def picture(case):
  """An image, uint8 [H, W, 3]; boxes, float32 [8, 4], some partly outside."""
  rng = np.random.default_rng(1000 * case.height + case.width)
  size = np.array([case.width, case.height], np.float64)
  image = rng.integers(0, 256, (case.height, case.width, 3), np.uint8)
  start = rng.uniform(-0.2, 0.8, (8, 2)) * size
  end = start + rng.uniform(0.25, 0.6, (8, 2)) * size
  return image, np.concatenate([start, end], 1).astype(np.float32)


def outlines(case):
  """The outlines of four objects: polygons, a pair of them, and two RLEs."""
  rng = np.random.default_rng(2000 * case.height + case.width)
  size = np.array([case.width, case.height], np.float64)

  def polygon(low, high):
    turns = np.sort(rng.uniform(0, 2 * np.pi, 9))
    reach = rng.uniform(0.15, 0.4, (9, 1)) * size
    centre = rng.uniform(low, high, 2) * size
    points = centre + reach * np.stack([np.cos(turns), np.sin(turns)], 1)
    return points.round(2).ravel().tolist()

  mask = rng.random((case.height, case.width)) < 0.7
  mask[:case.height // 3] = mask[:, :case.width // 4] = False
  edges = np.flatnonzero(np.diff(mask.ravel("F"), prepend=False))
  counts = np.diff([0, *edges, mask.size]).tolist()
  if not mask.any():
    counts = [mask.size]
  return [[polygon(0.3, 0.7)], [polygon(0, 0.4), polygon(0.6, 1)],
          {"size": [case.height, case.width], "counts": counts},
          {"size": [case.height, case.width], "counts": text(counts)}]


def text(counts):
  """COCO's text of an RLE's lengths, as maskApi.c's rleToString writes it."""
  characters = []
  for i, length in enumerate(counts):
    value, more = length - (counts[i - 2] if i > 2 else 0), True
    while more:
      bits, value = value & 31, value >> 5
      more = value != (-1 if bits & 16 else 0)
      characters.append(chr((bits | 32 * more) + 48))
  return "".join(characters)
