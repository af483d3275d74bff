"""Equality with recorded outputs of mmdetection.

Outputs of all levels, losses, gradients and detections of RetinaNet, on the
official backbones; made by tests/golden/make_detection.py. The weights are
drawn by name on both sides.
"""

import functools

import detector_cases
import detectors
import jax
import jax.numpy as jnp
import numpy as np
import parity_cases
import pytest

from metaformer_jax.convert import layouts
from metaformer_jax.ops import dense_detection

CANVASES = detectors.CANVASES
MAX_BOXES = 6


def cases(*default):
  return pytest.mark.parametrize("name", [
      pytest.param(name, marks=[pytest.mark.slow] * (
          case.model not in default))
      for name, case in detector_cases.CASES.items()])


def load(name):
  return detectors.load(detector_cases.CASES[name])


@pytest.mark.parametrize("name,canvas", [
    pytest.param(name, canvas, marks=[pytest.mark.slow] * (
        (name, canvas) not in (("poolformer_s12-retinanet", CANVASES[0]),
                               ("resnet50-retinanet", CANVASES[1]))))
    for name in detector_cases.CASES for canvas in CANVASES])
def test_outputs_on_a_canvas(name, canvas):
  """Images of different sizes in one batch, on a canvas of noise."""
  golden, model, _, variables = load(name)
  images, mask = detectors.on_canvas(canvas)
  found = jax.jit(model.apply)(variables, images, mask)
  for i, size in enumerate(detector_cases.SIZES):
    of_image = detectors.example(found, i)
    got = np.concatenate([
        np.concatenate(detectors.alone(of_image[key], size, canvas))
        for key in ("logits", "deltas")], -1)
    want = golden.logits[size][i]
    np.testing.assert_allclose(got, want, rtol=0,
                               atol=1e-5 * np.abs(want).max())
    assert sum(m.sum() for m in of_image["mask"]) == len(want)
    assert all(m.all() for m in detectors.alone(of_image["mask"], size, canvas))


@cases()
def test_losses_and_gradients(name):
  """In training mode; one image has no objects."""
  golden, model, family, variables = load(name)
  size = detector_cases.SIZES[0]
  n_images = detector_cases.BATCH
  boxes = np.zeros((n_images, MAX_BOXES, 4), np.float32)
  labels = np.full((n_images, MAX_BOXES), -1)
  for i, (of_image, classes) in enumerate(zip(
      detector_cases.BOXES, detector_cases.LABELS)):
    boxes[i, :len(of_image)], labels[i, :len(classes)] = of_image, classes

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    found, state = model.apply(
        {**variables, "params": params}, detector_cases.images(size),
        train=True, mutable=["batch_stats"])
    losses = dense_detection.loss(
        found["logits"], found["deltas"], detectors.anchors_of(*size),
        found["mask"], jnp.asarray(boxes), jnp.asarray(labels),
        positive_iou=0.5, negative_iou=0.4, alpha=0.25, gamma=2.0)
    return sum(losses.values()), (losses, state)

  (_, (losses, state)), gradients = run(variables["params"])
  for ours, theirs in (("class_loss", "loss_cls"), ("box_loss", "loss_bbox")):
    np.testing.assert_allclose(losses[ours], golden.meta["losses"][theirs],
                               rtol=1e-5, err_msg=theirs)
  for path, leaf in layouts.flatten(state).items():  # BatchNorm is frozen.
    assert np.array_equal(leaf, layouts.flatten(variables)[path]), path
  found = layouts.to_torch(family, {"params": gradients}, "mmdet")
  assert found.keys() >= golden.gradients.keys()
  # The norms' biases before token mixers that subtract their input have none.
  floor = 1e-5 * max(want[0] for want in golden.gradients.values())
  for key, want in golden.gradients.items():
    np.testing.assert_allclose(parity_cases.sketch(key, found[key]), want,
                               atol=2e-4 * want[0] + floor, rtol=0, err_msg=key)


@cases("poolformer_s12")
def test_detections(name):
  """The same boxes, scores and labels, in the same order, on a canvas."""
  golden, model, _, variables = load(name)
  size, canvas = detector_cases.SIZES[-1], CANVASES[-1]
  images = np.zeros((1, *canvas, 3), np.float32)
  mask = np.zeros(images.shape[:3], bool)
  images[:, :size[0], :size[1]] = detector_cases.images(size)[:1]
  mask[:, :size[0], :size[1]] = True

  @jax.jit
  def run(images, mask):
    found = detectors.example(model.apply(variables, images, mask), 0)
    return dense_detection.detect(
        found["logits"], found["deltas"], detectors.anchors_of(*canvas),
        found["mask"], jnp.asarray(detector_cases.IMAGE_SIZE),
        candidates=detector_cases.CANDIDATES, score_threshold=0.05, nms_iou=0.5,
        max_detections=detector_cases.MAX_DETECTIONS)

  found = run(images, mask)
  want = golden.features[size]["detections"]
  assert found["valid"].sum() == len(want) > 10
  assert len(np.unique(want[:, 5])) > 1
  np.testing.assert_array_equal(found["labels"][:len(want)], want[:, 5])
  np.testing.assert_allclose(found["scores"][:len(want)], want[:, 4], atol=1e-5)
  np.testing.assert_allclose(found["boxes"][:len(want)], want[:, :4], atol=1e-3)
