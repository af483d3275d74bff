"""Detectors of any backbone: sizes, padding, frozen norms, initial values."""

import functools
import math

import detectors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segmenters import (
  PUBLISHED,
  SMALL,
  Own,
  images,
  on_canvas,
  perturbed,
  shapes_of,
)

import metaformer_jax
from metaformer_jax.heads import detector, features, fpn, retinanet

# All parameters with 80 classes, and those that mmdetection trains; of
# mmdetection 2.19 with the official backbones (tests/golden/make_detection.py
# --count). The papers print the latter in millions (arXiv 2111.11418, table 3).
TABLE = {
    "poolformer_s12": (21_653_044, 21_653_044, 21.7),
    "poolformer_s24": (31_126_836, 31_126_836, 31.1),
    "poolformer_s36": (40_600_628, 40_600_628, 40.6),
    "resnet18": (21_410_100, 21_252_596, 21.3),
    "resnet50": (37_968_692, 37_743_348, 37.7),
    "resnet101": (56_960_820, 56_735_476, 56.7),
    "pvt_tiny": (22_964_724, 22_964_724, 23.0),
    "pvt_small": (34_221_300, 34_221_300, 34.2),
    "pvt_medium": (53_943_540, 53_943_540, 53.9),
    "pvt_large": (71_104_756, 71_104_756, 71.1),
}


def small(name, norm=None, dtype=None, **task):
  backbone = metaformer_jax.create_model(name, num_classes=0, dtype=dtype,
                                         **SMALL[name])
  return detector.create(backbone, detectors.section(**task),
                         feature_norm=norm)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "poolformer_s12"))
    for name in TABLE])
def test_retinanet_has_the_parameters_of_the_table(name):
  overrides, norm = PUBLISHED[metaformer_jax.get_spec(name).family]
  # Semantic FPN has ResNet-V1c, RetinaNet the plain one.
  overrides = {k: v for k, v in overrides.items() if k != "stem"}
  model = detector.create(
      metaformer_jax.create_model(name, num_classes=0, **overrides),
      detectors.section(num_classes=80, fpn_dim=256, head_dim=256,
                        head_depth=4), feature_norm=norm)
  params = shapes_of(model, 224)["params"]
  frozen = [params["backbone"][part] for part in ("stem", "stage1")
            ] if name.startswith("resnet") else []
  everything, fixed = (sum(x.size for x in jax.tree.leaves(tree))
                       for tree in (params, frozen))
  *exact, millions = TABLE[name]
  assert [everything, everything - fixed] == exact
  assert round((everything - fixed) / 1e6, 1) == millions


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in (
        "caformer_s18", "vit_base_patch16_224"))) for name in SMALL
    if name not in ("mixer_b16_224", "resmlp_12_224")])  # Of one image size.
def test_every_family_judges_the_anchors_of_five_levels(name):
  model = small(name, dtype=jnp.bfloat16)
  size = (224, 224) if name.startswith("metaformer") else (96, 160)
  run = functools.partial(model.apply, train=True, mutable=["batch_stats"])
  found, _ = jax.eval_shape(
      run, shapes_of(model, metaformer_jax.get_spec(name).input_size),
      jnp.zeros((2, *size, 3)), jnp.ones((2, *size), bool))
  anchors = detectors.anchors_of(*size)
  for key, dtype, last in (("logits", jnp.float32, (3,)),
                           ("deltas", jnp.float32, (4,)), ("mask", bool, ())):
    assert all(level.dtype == dtype for level in found[key])
    assert [level.shape for level in found[key]] == [
        (2, len(of_level), *last) for of_level in anchors]


def test_what_is_not_an_output_is_not_computed_with():
  """Neither a norm nor a lateral of the finest output."""
  params = shapes_of(small("poolformer_s12", "group_norm"))["params"]
  assert {key for key in params if "norm" in key} == {"norm2", "norm3", "norm4"}
  assert {key for key in params["pyramid"] if "lateral" in key} == {
      "lateral1", "lateral2", "lateral3"}


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [(96, 160), (160, 96)])
def test_a_missing_output_is_a_resized_one(canvas):
  """Of a user's backbone without stride 32; on a canvas as alone."""
  model = detector.create(Own(), detectors.section())
  variables = perturbed(model)
  size = (64, 96) if canvas[0] < canvas[1] else (96, 64)
  x = images(2, *size)
  run = jax.jit(model.apply)
  want = run(variables, x)
  found = run(variables, *on_canvas(x, *canvas))
  assert want["mask"] is None
  for i in range(len(x)):
    of_image, alone = detectors.example(found, i), detectors.example(want, i)
    for key in ("logits", "deltas"):
      for got, level in zip(detectors.alone(of_image[key], size, canvas),
                            alone[key], strict=True):
        np.testing.assert_allclose(got, level, atol=1e-5)
    n_anchors = [mask.sum() for mask in of_image["mask"]]
    assert n_anchors == list(map(len, detectors.anchors_of(*size)))


def level(stage, stride, n):
  x = np.random.default_rng(stride).standard_normal((1, n, n, 2))
  return features.Level(stage, stride, jnp.asarray(x, jnp.float32), None)


def test_levels_of_any_strides():
  four, eight = level("stage1", 4, 16), level("stage2", 8, 8)
  assert features.nearest([four, eight], (8, 16, 32)) == [eight]
  same, half, quarter = features.at_strides([four, eight], (8, 16, 32))
  np.testing.assert_array_equal(same.map, eight.map)
  for found, n in ((half, 4), (quarter, 2)):
    np.testing.assert_allclose(found.map, jax.image.resize(
        eight.map, (1, n, n, 2), "linear", antialias=False), atol=1e-6)
  assert features.at_strides([four, eight], (4, 8)) == [four, eight]


@pytest.mark.slow
@pytest.mark.parametrize("name,norm", [
    ("caformer_s18", "layer_norm"), ("poolformer_s12", "group_norm"),
    ("resnet18", None), ("vit_base_patch16_224", "layer_norm")])
def test_in_training_padding_adds_nothing(name, norm):
  """To outputs, statistics and gradients, on a canvas of each orientation."""
  model = small(name, norm, frozen_batch_norm=name == "resnet18")
  variables = perturbed(model)
  size = (64, 32)
  x = images(2, *size)

  def run(canvas, x, mask=None):

    @jax.jit
    def gradient(params, x, mask):
      found, state = model.apply(
          {**variables, "params": params}, x, mask, train=True,
          mutable=["batch_stats"])
      total = 0
      for key in ("logits", "deltas"):
        for y, (h, w), of_canvas in zip(
            found[key], detectors.shapes(*size), detectors.shapes(*canvas)):
          y = y.reshape(len(y), *of_canvas, -1)[:, :h, :w]
          total += jnp.square(y).mean()
      return total, state

    return jax.grad(gradient, has_aux=True)(variables["params"], x, mask)

  want = run(size, x)
  for canvas in ((96, 64), (64, 128)):
    found = run(canvas, *on_canvas(x, *canvas))
    for (path, got), leaf in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(want),
        strict=True):
      np.testing.assert_allclose(
          got, leaf, atol=3e-5 * max(1, np.abs(leaf).max()),
          err_msg=jax.tree_util.keystr(path))


def test_initial_values_are_mmdetections():
  x = [jnp.zeros((1, n, n, 64)) for n in (4, 2)]
  pyramid, head = (
      jax.jit(lambda key, module=module: module.init(key, x, [None] * 2))(
          jax.random.key(0))["params"]
      for module in (fpn.Pyramid(128, n_extra=2),
                     retinanet.RetinaNet(20, dim=64, depth=2)))
  for name, n_in in (("extra1", 64), ("extra2", 128)):  # Xavier uniform.
    bound = (6 / (9 * n_in + 9 * 128))**0.5
    kernel = pyramid[name]["kernel"]
    assert kernel.shape[2] == n_in
    assert 0.99 * bound < np.abs(kernel).max() <= bound
  assert set(head) == {f"{kind}_{part}" for kind in ("class", "box")
                       for part in ("conv1", "conv2", "out")}
  for name, tree in head.items():
    np.testing.assert_allclose(tree["kernel"].std(), 0.01, rtol=0.03)
    bias = -math.log(99) if name == "class_out" else 0
    np.testing.assert_allclose(tree["bias"], bias, rtol=1e-6)


@pytest.mark.parametrize("task,norm,message", [
    ({"head": "retina"}, None, r"unknown head 'retina'.*retinanet"),
    ({}, "groupnorm", r"unknown norm 'groupnorm'.*group_norm")])
def test_unknown_names_are_reported(task, norm, message):
  with pytest.raises(ValueError, match=message):
    small("poolformer_s12", norm, **task)
