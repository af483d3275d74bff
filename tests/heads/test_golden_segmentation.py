"""Equality with recorded outputs of mmsegmentation.

Outputs, losses and gradients of every head, on the official backbones; made by
tests/golden/make_segmentation.py. The weights are drawn by name on both sides.
"""

import functools
import pathlib

import head_cases
import jax
import jax.numpy as jnp
import numpy as np
import parity_cases
import pytest
import segmenters
from head_cases import AUXILIARY_WEIGHT, IGNORE

from metaformer_jax.convert import layouts
from metaformer_jax.ops import resize

CANVAS = (96, 128)  # Larger than all images, in both directions.
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "segmentation"


def cross_entropy(logits, labels):
  """mmsegmentation 0.19: ignored pixels count in the denominator."""
  logits = resize.resize(logits, labels.shape[1:])
  found = -jnp.take_along_axis(
      jax.nn.log_softmax(logits), jnp.where(labels == IGNORE, 0, labels)[
          ..., None].astype(int), -1)[..., 0]
  return jnp.where(labels == IGNORE, 0, found).mean()


def cases(*default):
  return pytest.mark.parametrize("name", [
      pytest.param(name, marks=[pytest.mark.slow] * (name not in default))
      for name in head_cases.CASES])


def load(name):
  """The file, the model, its family and its variables."""
  golden = parity_cases.Golden.load(GOLDEN / f"{name}.npz")
  model, family, target = segmenters.build(head_cases.CASES[name])
  tensors = head_cases.weights(golden.state_shapes)
  variables = layouts.to_flax(family, tensors, target)
  back = layouts.to_torch(family, variables, "mmseg")
  assert back.keys() == tensors.keys()
  assert all(np.array_equal(back[key], tensors[key]) for key in back)
  n_params = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert n_params == golden.meta["n_params"]
  return golden, model, family, variables


@cases("resnet50-upernet")
def test_outputs_on_a_canvas(name):
  """Images of different sizes in one batch, on canvases of noise."""
  golden, model, _, variables = load(name)
  apply = jax.jit(model.apply)
  sizes = head_cases.SIZES
  for turn in range(len(sizes)):
    of_batch = sizes[turn:] + sizes[:turn]
    canvas = np.full((len(sizes), *CANVAS, 3), 1e3, np.float32)
    mask = np.zeros(canvas.shape[:3], bool)
    for i, size in enumerate(of_batch):
      place = np.s_[i, :size[0], :size[1]]
      canvas[place], mask[place] = head_cases.images(size)[i], True
    found = apply(variables, canvas, mask)
    for i, size in enumerate(of_batch):
      want = golden.logits[size]
      h, w = want.shape[1:3]
      assert np.array_equal(found["mask"][i].sum(), h * w)
      np.testing.assert_allclose(found["logits"][i, :h, :w], want[i], rtol=0,
                                 atol=1e-5 * np.abs(want).max())


@cases("poolformer_s12-semantic_fpn")
def test_losses_and_gradients(name):
  """In training mode, without dropout and padding."""
  golden, model, family, variables = load(name)
  size = head_cases.SIZES[0]
  images = head_cases.images(size)
  labels = jnp.asarray(head_cases.labels(size))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    found, _ = model.apply({**variables, "params": params}, images, train=True,
                           mutable=["batch_stats"])
    losses = {"decode.loss_ce": cross_entropy(found["logits"], labels)}
    if "auxiliary" in found:
      losses["aux.loss_ce"] = AUXILIARY_WEIGHT * cross_entropy(
          found["auxiliary"], labels)
    return sum(losses.values()), losses

  (_, losses), gradients = run(variables["params"])
  assert losses.keys() == golden.meta["losses"].keys()
  for key, want in golden.meta["losses"].items():
    np.testing.assert_allclose(losses[key], want, rtol=1e-5, err_msg=key)
  found = layouts.to_torch(family, {"params": gradients}, "mmseg")
  assert found.keys() == golden.gradients.keys()
  # The norms' biases before token mixers that subtract their input have none.
  floor = 1e-5 * max(want[0] for want in golden.gradients.values())
  for key, want in golden.gradients.items():
    np.testing.assert_allclose(parity_cases.sketch(key, found[key]), want,
                               atol=2e-4 * want[0] + floor, rtol=0, err_msg=key)
