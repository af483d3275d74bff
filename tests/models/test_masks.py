"""An image gives the same outputs on any canvas: padding has no effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaformer_jax

MIXERS = {
    "identity": {"token_mixers": ("identity",) * 2},
    "pool 3": {},
    "pool 9": {"pool_size": 9},
    "pool without subtraction": {"pool_subtract": False},
    "depthwise conv 7": {"token_mixers": ("depthwise_conv",) * 2,
                         "conv_kernel_size": 7},
    "sepconv": {"token_mixers": ("sepconv",) * 2, "conv_kernel_size": 7,
                "activation": "star_relu"},
    "attention": {"token_mixers": ("attention",) * 2},
}
SETTINGS = {
    "layer norm": {"norm": "layer_norm"},
    "batch norm": {"norm": "batch_norm"},
    "no norm": {"norm": "none"},
    "star relu, other norms, mlp head": {
        "activation": "star_relu", "downsample_norm": True,
        "res_scale_init": (0.0, 1.0), "head_norm_first": False, "head": "mlp"},
    "position embeddings": {"position_embeddings": (1, 2)},
    "stem without padding": {"in_patch_size": 4, "in_pad": 0},
    "stem with much padding": {"in_patch_size": 2, "in_pad": 2},
}

# Height, width, and where on the canvas in strides of all stages together.
PLACES = ((61, 50, 0, 0), (33, 34, 1, 2), (64, 96, 0, 1), (97, 131, 2, 1))


def create(name="poolformer_s12", dtype=None, **settings):
  """A model with two stages and a total stride of 8."""
  return metaformer_jax.create_model(name, dtype=dtype, **{
      "depths": (1, 1), "dims": (32, 64), "num_classes": 5,
      "token_mixers": ("pooling", "pooling"), "res_scale_init": (),
      "position_embeddings": (), **settings})


def perturbed(model, seed=0, size=64):
  """Variables away from 0 and 1; variances stay positive."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "var":
      return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
    centre = 1.0 if path[-1].key == "scale" else 0.0
    # As at initialisation where there are many inputs.
    fan_in = max(np.prod(leaf.shape[:-1], dtype=int), 10)
    return (centre + fan_in**-0.5 * rng.standard_normal(leaf.shape)).astype(
        leaf.dtype)

  shapes = jax.eval_shape(model.init, jax.random.key(0),
                          jnp.zeros((1, size, size, 3)))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def image(height, width, seed=0):
  return np.random.default_rng(seed).standard_normal(
      (1, height, width, 3)).astype(np.float32)


def on_canvas(images, offsets, shape, garbage):
  """Images at their offsets on canvases of garbage, and the masks."""
  canvas = np.full((len(images), *shape, 3), garbage, np.float32)
  mask = np.zeros((len(images), *shape), bool)
  for i, (x, (top, left)) in enumerate(zip(images, offsets)):
    place = np.s_[i, top:top + x.shape[1], left:left + x.shape[2]]
    canvas[place], mask[place] = x[0], True
  return canvas, mask


@functools.cache
def program(model, logits=True):
  """Features and, unless disabled to save compile time, logits."""

  @jax.jit
  def run(variables, x, mask=None):
    return (model.apply(variables, x, mask=mask, method="features"),
            model.apply(variables, x, mask=mask) if logits else x[:, 0, 0])

  return run


def compare(model, variables, places, stride, *, garbage=1e3, margin=0,
            atol=1e-5, logits=True):
  """Compares images on one canvas with each image alone."""
  images = [image(h, w, seed=i) for i, (h, w, _, _) in enumerate(places)]
  offsets = [(top * stride, left * stride) for *_, top, left in places]
  shape = [max(o[axis] + x.shape[axis + 1] for o, x in zip(offsets, images))
           + margin for axis in (0, 1)]
  canvas, mask = on_canvas(images, offsets, shape, garbage)
  run = program(model, logits)
  features, got_logits = run(variables, canvas, mask)
  for i, (x, offset) in enumerate(zip(images, offsets)):
    want, want_logits = run(variables, x)
    assert features.keys() == want.keys()
    for name, value in want.items():
      got = np.array(features[name][i], np.float32)
      top, left = (o // 2 ** (int(name[-1]) + 1) for o in offset)
      place = np.s_[top:top + value.shape[1], left:left + value.shape[2]]
      value = np.asarray(value[0], np.float32)
      scale = max(1, np.abs(value).max())
      np.testing.assert_allclose(got[place], value, atol=atol * scale,
                                 err_msg=name)
      got[place] = 0
      assert not got.any()
    if logits:
      np.testing.assert_allclose(
          np.asarray(got_logits[i], np.float32), np.asarray(want_logits[0]),
          atol=atol * max(1, np.abs(want_logits).max()))


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=[pytest.mark.slow] * (case in (
        "identity", "pool 9", "pool without subtraction",
        "depthwise conv 7"))) for case in MIXERS])
def test_images_of_many_sizes_share_a_canvas(case):
  model = create(**MIXERS[case])
  compare(model, perturbed(model), PLACES, 8, logits=False)


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=[pytest.mark.slow] * (case in (
        "star relu, other norms, mlp head", "no norm",
        "stem with much padding")))
    for case in SETTINGS])
def test_padding_is_left_out_whatever_the_setting(case):
  model = create(**SETTINGS[case])
  compare(model, perturbed(model), PLACES[:2], 8)


@pytest.mark.parametrize("garbage", [np.inf, np.nan])
def test_padding_may_hold_what_is_no_number(garbage):
  model = create()
  compare(model, perturbed(model), PLACES[:1], 8, garbage=garbage, margin=9,
          logits=False)


def test_bfloat16_differs_by_its_rounding():
  model = create(dtype=jnp.bfloat16, token_mixers=("pooling", "attention"))
  compare(model, perturbed(model), PLACES[:2], 8, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "caformer_s18", "poolformer_s12", "metaformer_ppaa_s12_224",
    "poolformerv2_s12", "identityformer_s12", "convformer_s18",
    "metaformer_pppa_s12_224"])
def test_padding_changes_no_output_of_the_papers_models(name):
  model = metaformer_jax.create_model(
      name, num_classes=5, depths=(1, 1, 1, 1), dims=(32, 64, 64, 96))
  compare(model, perturbed(model, size=224), ((61, 50, 1, 0),), 32, margin=35)


def test_without_a_mask_padding_does_change_the_output():
  """Otherwise the tests above would prove nothing."""
  model = create()
  variables, x = perturbed(model), image(64, 64)
  canvas, _ = on_canvas([x], [(0, 0)], (96, 96), 0.0)
  _, want = program(model)(variables, x)
  _, got = program(model)(variables, canvas)
  assert np.abs(got - want).max() > 1e-2


def gradients(model, variables, x, weights, mask=None):
  """Gradients of weighted logits by the parameters."""

  @jax.jit
  @jax.grad
  def of(params):
    logits = model.apply({**variables, "params": params}, x, mask=mask)
    return (logits * weights).sum()

  return of(variables["params"])


@pytest.mark.parametrize("settings", [
    pytest.param({"token_mixers": ("pooling", "depthwise_conv")},
                 marks=pytest.mark.slow),
    {"token_mixers": ("sepconv", "attention"), "activation": "star_relu",
     "downsample_norm": True, "position_embeddings": (1, 2), "head": "mlp",
     "head_norm_first": False, "norm": "layer_norm"}],
    ids=["first paper", "second paper"])
def test_padding_adds_nothing_to_gradients(settings):
  """On one canvas, gradients are the sum of the single images'."""
  model = create(**settings)
  variables = perturbed(model)
  images = [image(33, 34, 0), image(50, 29, 1)]
  canvas, mask = on_canvas(images, [(8, 0), (0, 16)], (64, 64), 1e3)
  weights = np.random.default_rng(0).standard_normal((2, 5))
  got = gradients(model, variables, canvas, weights, mask)
  want = jax.tree.map(jnp.add, *(
      gradients(model, variables, x, w[None])
      for x, w in zip(images, weights)))
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got),
                          jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()),
                               err_msg=jax.tree_util.keystr(path))


def test_batch_statistics_in_training_leave_out_the_padding():
  model = create(norm="batch_norm")
  variables = perturbed(model)
  images = [image(33, 34, 0), image(33, 34, 1)]
  canvas, mask = on_canvas(images, [(8, 0), (0, 16)], (64, 64), 1e3)

  @jax.jit
  def train(x, mask=None):
    return model.apply(variables, x, mask=mask, train=True,
                       mutable=["batch_stats"])

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
               train(canvas, mask), train(np.concatenate(images)))


@pytest.mark.parametrize("mixer", ["random", "spatial_fc"])
def test_matrices_over_all_pixels_say_what_they_are_tied_to(mixer):
  model = create(token_mixers=("pooling", mixer))
  shapes = jax.eval_shape(model.init, jax.random.key(0), image(64, 64))
  with pytest.raises(ValueError, match="64 pixels cannot mix 8 x 12"):
    jax.eval_shape(model.apply, shapes, image(64, 96))
  with pytest.raises(ValueError, match="no mask"):
    jax.eval_shape(model.apply, shapes, image(64, 64),
                   mask=np.ones((1, 64, 64), bool))
