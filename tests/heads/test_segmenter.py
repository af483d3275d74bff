"""Segmenters of any backbone: sizes, padding, precision, initial values."""

import functools

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
  section,
  shapes_of,
)

import metaformer_jax
from metaformer_jax.heads import convs, fpn, segmenter, semantic_fpn

# Parameters with 150 classes, of mmsegmentation 0.19 with the official
# backbones; the paper prints them in millions (arXiv 2111.11418, table 5).
TABLE = {
    "poolformer_s12": (15_669_846, 15.7),
    "poolformer_s24": (25_143_638, 25.1),  # The paper has 23.2.
    "poolformer_s36": (34_617_430, 34.6),
    "poolformer_m36": (59_778_006, 59.8),
    "poolformer_m48": (77_078_934, 77.1),
    "resnet18": (15_446_006, 15.4),  # The paper has 15.5.
    "resnet50": (28_514_806, 28.5),
    "resnet101": (47_506_934, 47.5),
    "pvt_tiny": (16_981_398, 17.0),
    "pvt_small": (28_237_974, 28.2),
    "pvt_medium": (47_960_214, 48.0),
    "pvt_large": (65_121_430, 65.1),
}


def small(name, norm=None, dtype=None, **task):
  backbone = metaformer_jax.create_model(name, num_classes=0, dtype=dtype,
                                         **SMALL[name])
  return segmenter.create(backbone, section(**task), feature_norm=norm)


def n_params(name, **task):
  family = metaformer_jax.get_spec(name).family
  overrides, norm = PUBLISHED[family]
  model = segmenter.create(
      metaformer_jax.create_model(name, num_classes=0, **overrides),
      section(**{"num_classes": 150, "fpn_dim": 256, "head_dim": None,
                 "auxiliary_dim": 256, **task}), feature_norm=norm)
  return sum(x.size for x in jax.tree.leaves(shapes_of(model, 224)["params"]))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in (
        "poolformer_s12", "resnet18", "pvt_tiny"))) for name in TABLE])
def test_semantic_fpn_has_the_parameters_of_the_table(name):
  exact, millions = TABLE[name]
  assert n_params(name) == exact
  assert round(exact / 1e6, 1) == millions


def test_upernet_has_the_parameters_of_mmsegmentation():
  assert n_params("poolformer_s12", head="upernet",
                  auxiliary_weight=0.4) == 41_891_052


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in (
        "metaformer_ppaa_s12_224", "vit_base_patch16_224", "resmlp_12_224")))
    for name in SMALL])
def test_every_family_gives_logits_at_its_finest_stride(name):
  size = metaformer_jax.get_spec(name).input_size
  model = small(name, dtype=jnp.bfloat16, head="upernet", auxiliary_weight=0.4)
  run = functools.partial(model.apply, train=True, mutable=["batch_stats"])
  found, _ = jax.eval_shape(run, shapes_of(model, size),
                            jnp.zeros((2, size, size, 3)))
  assert found["logits"].dtype == found["auxiliary"].dtype == jnp.float32
  assert found["logits"].shape == (2, size // 4, size // 4, 5)
  assert found["auxiliary"].shape == (2, size // 16, size // 16, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name,head,norm", [
    ("caformer_s18", "upernet", "layer_norm"),
    ("poolformer_s12", "semantic_fpn", "group_norm")])
def test_in_training_padding_adds_nothing(name, head, norm):
  """To logits, statistics and gradients, of one size on a portrait canvas."""
  model = small(name, norm, head=head, auxiliary_weight=0.4)
  variables = perturbed(model)
  x = images(2, 45, 33)

  @jax.jit
  def run(x, mask=None):

    def loss(params):
      found, state = model.apply(
          {**variables, "params": params}, x, mask, train=True,
          mutable=["batch_stats"])
      keys = ("logits", "auxiliary")
      found = [found[key][:, :h, :w] for key, (h, w) in zip(keys, shapes)]
      return sum(jnp.square(y).mean() for y in found), (found, state)

    return jax.grad(loss, has_aux=True)(variables["params"])

  stages = jax.eval_shape(functools.partial(
      model.backbone.apply, method="features"),
      {"params": variables["params"]["backbone"]}, x)
  shapes = [stages[stage].shape[1:3] for stage in ("stage1", "stage3")]
  for (path, got), want in zip(
      jax.tree_util.tree_leaves_with_path(run(*on_canvas(x, 80, 48))),
      jax.tree.leaves(run(x)), strict=True):
    np.testing.assert_allclose(
        got, want, atol=3e-5 * max(1, np.abs(want).max()),
        err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_one_output_becomes_a_pyramid():
  """Resized bilinearly; on a canvas as alone."""
  model = small("vit_base_patch16_224", "layer_norm")
  variables = perturbed(model)
  x = images(1, 50, 33)  # 3 x 2 patches: 12 x 8, 6 x 4, 3 x 2 and 2 x 1.
  run = jax.jit(model.apply)
  want = run(variables, x)["logits"]
  assert want.shape == (1, 12, 8, 5)
  found = run(variables, *on_canvas(x, 64, 80))
  np.testing.assert_allclose(found["logits"][:, :12, :8], want, atol=1e-5)
  assert found["mask"].sum() == 12 * 8

  @jax.jit
  def by_hand(variables, x):
    bound = model.bind(variables)
    y = bound.backbone.features(x)["stage4"]
    scale, bias = (variables["params"]["norm4"][k] for k in ("scale", "bias"))
    y = jax.nn.standardize(y, epsilon=1e-6) * scale.reshape(
        1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)
    maps = [jax.image.resize(y, (1, *size, 24), "linear", antialias=False)
            for size in ((12, 8), (6, 4), (3, 2), (2, 1))]
    return bound.head(*bound.pyramid(maps, [None] * 4))

  np.testing.assert_allclose(by_hand(variables, x), want, atol=1e-5)


def test_a_backbone_needs_nothing_but_features():
  model = segmenter.create(Own(), section(head="upernet", pool_sizes=(2,)))
  variables = perturbed(model)
  x = images(2, 29, 41)
  run = jax.jit(model.apply)
  want = run(variables, x)["logits"]
  found = run(variables, *on_canvas(x, 48, 64))
  np.testing.assert_allclose(found["logits"][:, :8, :11], want, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_gives_float32():
  half = small("resnet18", dtype=jnp.bfloat16)
  variables = perturbed(half)
  assert all(x.dtype in (jnp.float32, jnp.int32)
             for x in jax.tree.leaves(variables))
  x = images(1, 64, 64)
  got = jax.jit(half.apply)(variables, x.astype(jnp.bfloat16))["logits"]
  want = jax.jit(small("resnet18").apply)(variables, x)["logits"]
  assert got.dtype == jnp.float32
  assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_dropout_drops_whole_channels():
  classifier = convs.Classifier(6, 0.5)
  variables = {"params": {"conv": {"kernel": np.eye(6, dtype=np.float32),
                                   "bias": np.zeros(6, np.float32)}}}
  x = np.ones((4, 3, 2, 6), np.float32)
  y = classifier.apply(variables, x, train=True,
                       rngs={"dropout": jax.random.key(0)})
  np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], x.shape))
  assert {0.0, 2.0} == set(np.unique(y))
  np.testing.assert_array_equal(classifier.apply(variables, x), x)


@pytest.mark.slow
def test_initial_values_are_mmsegmentations():
  x = [jnp.zeros((1, n, n, 64)) for n in (4, 2)]
  pyramid = fpn.Pyramid(128).init(jax.random.key(0), x, [None] * 2)["params"]
  head = semantic_fpn.SemanticFpn(50, 128).init(
      jax.random.key(0), x, [None] * 2)["params"]
  bound = (6 / (9 * 128 + 9 * 128))**0.5  # Xavier uniform.
  kernel = pyramid["output1"]["kernel"]
  assert 0.99 * bound < np.abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.02)
  np.testing.assert_allclose(  # Kaiming normal, fan out.
      head["level2"]["conv1"]["kernel"].std(), (2 / (9 * 128))**0.5, rtol=0.02)
  np.testing.assert_allclose(head["classifier"]["conv"]["kernel"].std(), 0.01,
                             rtol=0.05)
  for tree in (pyramid, head):
    assert not any(leaf.any() for path, leaf in
                   jax.tree_util.tree_leaves_with_path(tree)
                   if path[-1].key == "bias")


@pytest.mark.parametrize("task,norm,message", [
    ({"head": "upnet"}, None, r"unknown head 'upnet'.*upernet"),
    ({}, "groupnorm", r"unknown norm 'groupnorm'.*group_norm")])
def test_unknown_names_are_reported(task, norm, message):
  with pytest.raises(ValueError, match=message):
    small("poolformer_s12", norm, **task)
