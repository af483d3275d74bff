"""Small detectors, and variables for them."""

import types

import detector_cases
import jax
import numpy as np
import segmenters

import metaformer_jax
from metaformer_jax.heads import detector
from metaformer_jax.ops import anchors

# As in `config.tasks.Detection`.
SCALE, OCTAVES, RATIOS = 4.0, 3, (0.5, 1.0, 2.0)


def section(**overrides):
  """What `detector.create` reads of the task's section."""
  return types.SimpleNamespace(**{
      "head": "retinanet", "num_classes": 3, "fpn_dim": 12, "head_dim": 8,
      "head_depth": 1, "anchor_octaves": OCTAVES, "anchor_ratios": RATIOS,
      "frozen_batch_norm": False, **overrides})


def build(case):
  """The model of a case, its family, and its variables' shapes."""
  cases = detector_cases
  backbone = metaformer_jax.create_model(case.model, num_classes=0,
                                         **case.overrides)
  model = detector.create(backbone, section(
      num_classes=cases.NUM_CLASSES, fpn_dim=cases.FPN_DIM,
      head_dim=cases.HEAD_DIM, head_depth=cases.HEAD_DEPTH,
      frozen_batch_norm=case.frozen_batch_norm),
      feature_norm=case.feature_norm)
  family = f"retinanet/{metaformer_jax.get_spec(case.model).family}"
  return model, family, segmenters.shapes_of(model, case.image_size)


def shapes(height, width):
  """Height and width of each level, of images of this size."""
  return [(-(-height // stride), -(-width // stride))
          for stride in detector.Detector.strides]


def anchors_of(height, width) -> list[np.ndarray]:
  """Those of each level."""
  return [anchors.grid(shape, stride,
                       anchors.base(stride, SCALE, OCTAVES, RATIOS))
          for shape, stride in zip(shapes(height, width),
                                   detector.Detector.strides)]


def alone(found, image, canvas):
  """What is inside an image, at the top left of a canvas, of one level each.

  Args:
    found: by level, [h * w * A, ...] each, of the canvas.
    image, canvas: height and width.
  """
  cut = []
  for x, (h, w), size in zip(found, shapes(*image), shapes(*canvas)):
    x = np.asarray(x).reshape(*size, -1, *x.shape[1:])[:h, :w]
    cut.append(x.reshape(-1, *x.shape[3:]))
  return cut


def example(tree, i):
  """One example of each array of a batch."""
  return jax.tree.map(lambda x: x[i], tree)
