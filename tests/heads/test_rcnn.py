"""Faster and Mask R-CNN of any backbone: sizes, padding, initial values."""

import functools

import detectors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segmenters import PUBLISHED, SMALL, images, on_canvas, perturbed, shapes_of

import metaformer_jax
from metaformer_jax.heads import detector, rcnn

# All parameters with 80 classes: with boxes only, and with masks; and the
# latter that mmdetection trains. Of mmdetection 2.19 with the official
# backbones (tests/golden/make_rcnn.py --count). The papers print the last
# column (arXiv 2111.11418, table 3).
TABLE = {
    "poolformer_s12": (28_927_328, 31_570_608, 31_570_608, 31.6),
    "poolformer_s24": (38_401_120, 41_044_400, 41_044_400, 41.0),
    "poolformer_s36": (47_874_912, 50_518_192, 50_518_192, 50.5),
    "resnet18": (28_684_256, 31_327_536, 31_170_032, 31.2),
    "resnet50": (41_753_056, 44_396_336, 44_170_992, 44.2),
    "resnet101": (60_745_184, 63_388_464, 63_163_120, 63.2),
    "pvt_tiny": (30_238_880, 32_882_160, 32_882_160, 32.9),
    "pvt_small": (41_495_456, 44_138_736, 44_138_736, 44.1),
    "pvt_medium": (61_217_696, 63_860_976, 63_860_976, 63.9),
    "pvt_large": (78_378_912, 81_022_192, 81_022_192, 81.0),
}
STRIDES = rcnn.RCNN.strides


def create(backbone, norm=None, **task):
  return detector.create(backbone, detectors.section(
      **{"head": "mask_rcnn", "anchor_octaves": 1, **task}), feature_norm=norm)


def small(name, norm=None, dtype=None, **task):
  return create(metaformer_jax.create_model(
      name, num_classes=0, dtype=dtype, **SMALL[name]), norm, **task)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in (
        "poolformer_s12", "resnet18"))) for name in TABLE])
def test_parameters_are_those_of_the_table(name):
  overrides, norm = PUBLISHED[metaformer_jax.get_spec(name).family]
  overrides = {k: v for k, v in overrides.items() if k != "stem"}
  model = create(
      metaformer_jax.create_model(name, num_classes=0, **overrides), norm,
      num_classes=80, fpn_dim=256, head_dim=256, head_depth=4, box_dim=1024)
  params = shapes_of(model, 224)["params"]
  frozen = [params["backbone"][part] for part in ("stem", "stage1")
            ] if name.startswith("resnet") else []
  everything, masks, fixed = (
      sum(x.size for x in jax.tree.leaves(tree))
      for tree in (params, params["mask_head"], frozen))
  *exact, millions = TABLE[name]
  assert [everything - masks, everything, everything - fixed] == exact
  assert round((everything - fixed) / 1e6, 1) == millions


def test_faster_rcnn_lacks_the_mask_head():
  with_masks, without = (shapes_of(small("resnet18", head=head))
                         for head in ("mask_rcnn", "faster_rcnn"))
  del with_masks["params"]["mask_head"]
  assert with_masks == without


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in (
        "caformer_s18", "vit_base_patch16_224"))) for name in SMALL
    if name not in ("mixer_b16_224", "resmlp_12_224")])  # Of one image size.
def test_every_family_judges_anchors_and_boxes(name):
  """In bfloat16, but for what is judged."""
  model = small(name, dtype=jnp.bfloat16)
  size = (224, 224) if name.startswith("metaformer") else (96, 160)
  variables = shapes_of(model, metaformer_jax.get_spec(name).input_size)
  run = functools.partial(jax.eval_shape, functools.partial(
      model.apply, train=True, mutable=["batch_stats"], method="extract"))
  found, _ = run(variables, jnp.zeros((2, *size, 3)),
                 jnp.ones((2, *size), bool))
  places = detectors.shapes(*size, STRIDES)
  assert [(x.shape, x.dtype) for x in found["maps"]] == [
      ((2, *place, 12), jnp.bfloat16) for place in places]
  for key, dtype, last in (("logits", jnp.float32, ()),
                           ("deltas", jnp.float32, (4,)), ("mask", bool, ())):
    assert [(x.shape, x.dtype) for x in found[key]] == [
        ((2, 3 * h * w, *last), dtype) for h, w in places]
  for method, side, want in (
      ("boxes", 7, [(2, 5, 4), (2, 5, 3, 4)]), ("masks", 14, [
          (2, 5, 28, 28, 3)])):
    judged = jax.eval_shape(
        functools.partial(model.apply, method=method), variables,
        jnp.zeros((2, 5, side, side, 12), jnp.bfloat16))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(judged)] == [
        (shape, jnp.float32) for shape in want]


@pytest.mark.slow
@pytest.mark.parametrize("name,norm", [
    ("caformer_s18", "layer_norm"), ("poolformer_s12", "group_norm"),
    ("resnet18", None), ("vit_base_patch16_224", "layer_norm")])
def test_an_image_on_a_canvas_is_as_alone(name, norm):
  """In training: maps, outputs and gradients."""
  model = small(name, norm, frozen_batch_norm=name == "resnet18")
  variables = perturbed(model)
  size = (64, 32)
  x = images(2, *size)

  def run(canvas, x, mask=None):
    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, x, mask):
      found, _ = model.apply({**variables, "params": params}, x, mask,
                             train=True, mutable=["batch_stats"])
      cut = {key: [
          y.reshape(len(y), *of_canvas, -1)[:, :h, :w]
          for y, (h, w), of_canvas in zip(
              found[key], detectors.shapes(*size, STRIDES),
              detectors.shapes(*canvas, STRIDES), strict=True)]
             for key in ("maps", "logits", "deltas")}
      total = sum(jnp.square(y).mean() for y in jax.tree.leaves(cut))
      return total, (cut, found["sizes"])

    return gradient(variables["params"], x, mask)

  want = run(size, x)
  canvas = (96, 128)
  for (path, got), leaf in zip(
      jax.tree_util.tree_leaves_with_path(run(canvas, *on_canvas(x, *canvas))),
      jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(
        got, leaf, atol=3e-5 * max(1, np.abs(leaf).max()),
        err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_the_last_level_is_every_other_place():
  model = small("resnet18")
  found = jax.jit(model.apply)(perturbed(model), *on_canvas(
      images(1, 96, 160), 128, 192))
  for key in ("maps", "masks"):
    *_, fine, coarse = found[key]
    np.testing.assert_array_equal(fine[:, ::2, ::2], coarse)
  assert found["sizes"].tolist() == [[[24, 40], [12, 20], [6, 10], [3, 5],
                                      [2, 3]]]


@pytest.mark.slow
def test_initial_values_are_mmdetections():
  """Deviations of normal distributions; biases are 0."""
  def init(module, *x):
    return jax.jit(lambda key: module.init(key, *x))(
        jax.random.key(0))["params"]

  n, dim, hidden = 40, 32, 128
  found = {
      "rpn": init(rcnn.RPN(8, hidden), [jnp.zeros((1, 2, 2, dim))], [None]),
      "box": init(rcnn.BoxHead(n, hidden), jnp.zeros((1, 7, 7, dim))),
      "mask": init(rcnn.MaskHead(n, hidden, 2), jnp.zeros((1, 14, 14, dim)))}
  want = {
      "rpn": {"conv": 0.01, "class_out": 0.01, "box_out": 0.01},
      "box": {"fc1": (2 / (49 * dim + hidden))**0.5, "class_out": 0.01,
              "fc2": (2 / (hidden + hidden))**0.5, "box_out": 0.001},
      "mask": {"conv1": (2 / (9 * hidden))**0.5,
               "conv2": (2 / (9 * hidden))**0.5,
               "deconv": (2 / (4 * hidden))**0.5, "mask_out": (2 / n)**0.5}}
  for head, layers in want.items():
    assert found[head].keys() == layers.keys()
    for name, deviation in layers.items():
      kernel = found[head][name]["kernel"]
      np.testing.assert_allclose(kernel.std(), deviation, rtol=0.06)
      assert np.abs(kernel).max() > 2.6 * deviation  # Not truncated.
      assert not found[head][name]["bias"].any()
