"""Equality with recorded outputs of mmdetection's Mask R-CNN.

Outputs of the RPN on images, and of the heads on given features of boxes; and
gradients; made by tests/golden/make_rcnn.py.
"""

import functools

import detector_cases
import detectors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity_cases
import pytest
import rcnn_cases

from metaformer_jax.convert import layouts
from metaformer_jax.heads import rcnn

N_CLASSES, SIZES = detector_cases.NUM_CLASSES, detector_cases.SIZES
STRIDES = rcnn.RCNN.strides


def cases(*default):
  return pytest.mark.parametrize("name", [
      pytest.param(name, marks=[pytest.mark.slow] * (
          case.model not in default))
      for name, case in rcnn_cases.CASES.items()])


def load(name):
  return detectors.load(rcnn_cases.CASES[name])


def assert_close(found, want):
  np.testing.assert_allclose(found, want, rtol=0,
                             atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("canvas", detectors.CANVASES)
@cases("poolformer_s12")
def test_anchors_on_a_canvas(name, canvas):
  """Images of different sizes in one batch, on a canvas of noise."""
  golden, model, _, variables = load(name)
  found = jax.jit(model.apply)(variables, *detectors.on_canvas(canvas))
  for i, size in enumerate(SIZES):
    of_image = detectors.example(found, i)
    logits, deltas, inside = (
        np.concatenate(detectors.alone(of_image[key], size, canvas, STRIDES))
        for key in ("logits", "deltas", "mask"))
    assert_close(np.concatenate([logits[:, None], deltas], -1),
                 golden.logits[size][0])
    assert inside.all() and sum(
        m.sum() for m in of_image["mask"]) == len(inside)
    want = detectors.shapes(*size, STRIDES)
    assert of_image["sizes"].tolist() == list(map(list, want))
    assert [m.sum() for m in of_image["masks"]] == [h * w for h, w in want]


@cases("poolformer_s12", "resnet50")
def test_heads(name):
  """Of given features of boxes."""
  golden, model, _, variables = load(name)
  want = golden.features[SIZES[0]]
  logits, deltas = model.apply(variables, rcnn_cases.features(7)[None],
                               method="boxes")
  assert_close(np.concatenate([logits[0], deltas[0].reshape(
      rcnn_cases.N_BOXES, -1)], -1), want["box_head"])
  masks = model.apply(variables, rcnn_cases.features(14)[None], method="masks")
  assert_close(masks[0], want["mask_head"])


def head_losses(model, variables):
  """As tests/golden/make_rcnn.py has them, written out."""
  found, _ = model.apply(variables, detector_cases.images(SIZES[0]), train=True,
                         mutable=["batch_stats"])
  logits, deltas = (jnp.concatenate(found[key], 1)
                    for key in ("logits", "deltas"))
  losses = {"logits": jnp.square(logits).mean(),
            "deltas": jnp.square(deltas).mean()}
  labels = rcnn_cases.LABELS
  rows = np.flatnonzero(labels < N_CLASSES)
  logits, deltas = model.apply(variables, rcnn_cases.features(7),
                               method="boxes")
  losses["loss_cls"] = optax.softmax_cross_entropy_with_integer_labels(
      logits, labels).mean()
  losses["loss_bbox"] = jnp.abs(
      deltas[rows, labels[rows]] - rcnn_cases.TARGETS[rows]).sum() / len(labels)
  masks = model.apply(variables, rcnn_cases.features(14), method="masks")
  losses["loss_mask"] = optax.sigmoid_binary_cross_entropy(
      masks[rows, ..., labels[rows]], rcnn_cases.mask_targets()).mean()
  return losses


@cases("poolformer_s12")
def test_gradients(name):
  """In training mode, of the whole network but for what is sampled."""
  golden, model, family, variables = load(name)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    losses = head_losses(model, {**variables, "params": params})
    return sum(losses.values()), losses

  (_, losses), gradients = run(variables["params"])
  for key, want in golden.meta["head_losses"].items():
    np.testing.assert_allclose(losses[key], want, rtol=1e-5, err_msg=key)
  found = layouts.to_torch(family, {"params": gradients}, "mmdet")
  wants = dict(zip(golden.gradients,
                   golden.features[SIZES[0]]["head_gradients"], strict=True))
  assert found.keys() >= wants.keys()
  # The norms' biases before token mixers that subtract their input have none.
  floor = 1e-5 * max(want[0] for want in wants.values())
  for key, want in wants.items():
    np.testing.assert_allclose(parity_cases.sketch(key, found[key]), want,
                               atol=1e-4 * want[0] + floor, rtol=0, err_msg=key)
