"""Small detectors, and variables for them."""

import pathlib
import types

import detector_cases
import jax
import numpy as np
import parity_cases
import segmenters

import metaformer_jax
from metaformer_jax.convert import layouts
from metaformer_jax.heads import detector
from metaformer_jax.ops import anchors

GOLDEN = pathlib.Path(__file__).parent / "golden" / "detection"
# Larger than all images.
CANVASES = ((96, 128), (128, 96))
# As in `config.tasks.Detection`.
SCALE, OCTAVES, RATIOS = 4.0, 3, (0.5, 1.0, 2.0)


def section(**overrides):
  """What `detector.create` reads of the task's section."""
  return types.SimpleNamespace(**{
      "head": "retinanet", "num_classes": 3, "fpn_dim": 12, "head_dim": 8,
      "head_depth": 1, "box_dim": 16, "anchor_octaves": OCTAVES,
      "anchor_ratios": RATIOS, "frozen_batch_norm": False, **overrides})


def build(case):
  """The model of a case, its family, and its variables' shapes."""
  cases = detector_cases
  backbone = metaformer_jax.create_model(case.model, num_classes=0,
                                         **case.overrides)
  octaves = {} if case.head == "retinanet" else {"anchor_octaves": 1}
  model = detector.create(backbone, section(
      head=case.head, num_classes=cases.NUM_CLASSES, fpn_dim=cases.FPN_DIM,
      head_dim=cases.HEAD_DIM, head_depth=cases.HEAD_DEPTH,
      box_dim=cases.BOX_DIM, **octaves,
      frozen_batch_norm=case.frozen_batch_norm),
      feature_norm=case.feature_norm)
  family = f"{case.head}/{metaformer_jax.get_spec(case.model).family}"
  return model, family, segmenters.shapes_of(model, case.image_size)


def load(case):
  """mmdetection's results, the model, its family and its variables.

  The weights are drawn by name on both sides; they are the same when written.
  """
  golden = parity_cases.Golden.load(GOLDEN / f"{case.name}.npz")
  model, family, target = build(case)
  tensors = detector_cases.weights(golden.state_shapes)
  variables = layouts.to_flax(family, tensors, target)
  back = layouts.to_torch(family, variables, "mmdet")
  assert back.keys() == tensors.keys()
  assert all(np.array_equal(back[key], tensors[key]) for key in back)
  n_params = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert n_params == golden.meta["n_params"]
  return golden, model, family, variables


def on_canvas(canvas):
  """Image i of size i, on a canvas of noise; and the mask."""
  sizes = detector_cases.SIZES
  images = np.full((len(sizes), *canvas, 3), 1e3, np.float32)
  mask = np.zeros(images.shape[:3], bool)
  for i, size in enumerate(sizes):
    place = np.s_[i, :size[0], :size[1]]
    images[place], mask[place] = detector_cases.images(size)[i], True
  return images, mask


def shapes(height, width, strides=detector.Detector.strides):
  """Height and width of each level, of images of this size."""
  return [(-(-height // stride), -(-width // stride)) for stride in strides]


def anchors_of(height, width) -> list[np.ndarray]:
  """Those of each level."""
  return [anchors.grid(shape, stride,
                       anchors.base(stride, SCALE, OCTAVES, RATIOS))
          for shape, stride in zip(shapes(height, width),
                                   detector.Detector.strides)]


def alone(found, image, canvas, strides=detector.Detector.strides):
  """What is inside an image, at the top left of a canvas, of one level each.

  Args:
    found: by level, [h * w * A, ...] each, of the canvas.
    image, canvas: height and width.
    strides: of the levels.
  """
  cut = []
  for x, (h, w), size in zip(
      found, shapes(*image, strides), shapes(*canvas, strides)):
    x = np.asarray(x).reshape(*size, -1, *x.shape[1:])[:h, :w]
    cut.append(x.reshape(-1, *x.shape[3:]))
  return cut


def example(tree, i):
  """One example of each array of a batch."""
  return jax.tree.map(lambda x: x[i], tree)
