"""ResNet: blocks against plain numpy, windows, masks, statistics, the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from metaformer_jax.models import layers, pyramids, resnet

NAMES = [name for name in pyramids.MODELS if name.startswith("resnet")]
# Small enough to run at many sizes.
SMALL = {"depths": (1, 2, 1, 1), "widths": (8, 12, 16, 20), "num_classes": 5}
KINDS = pytest.mark.parametrize("kind", [
    pytest.param("basic", marks=pytest.mark.slow), "bottleneck"])


@functools.partial(jax.jit, static_argnums=0,
                   static_argnames=("method", "train", "mutable"))
def apply(model, variables, x, mask=None, **kwargs):
  return model.apply(variables, x, mask=mask, **kwargs)


def perturbed(model, image, seed=0, scale=0.2):
  """Variables other than 0 and 1; drawn by numpy, to compile nothing."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name == "n_batches":
      return np.full(leaf.shape, 7, leaf.dtype)
    std = np.prod(leaf.shape[:-1])**-0.5 if name == "kernel" else scale
    mean = 1 if name in ("scale", "var") else 0
    return rng.normal(mean, std, leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(
      draw, jax.eval_shape(model.init, jax.random.key(0), image))


def images(n=2, height=64, width=64, dim=3, seed=0):
  return np.random.default_rng(seed).normal(
      size=(n, height, width, dim)).astype(np.float32)


def on_canvas(x, height=96, width=128, fill=5.0):
  """The images at the top left of a canvas, and their mask."""
  n, h, w, dim = x.shape
  canvas = np.full((n, height, width, dim), fill, np.float32)
  canvas[:, :h, :w] = x
  mask = np.zeros((n, height, width), bool)
  mask[:, :h, :w] = True
  return canvas, mask


def windows(x, size, stride, fill):
  """Yields (row, column, pixels) for each offset in a window."""
  p, (h, w) = size // 2, x.shape[1:3]
  x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)), constant_values=fill)
  for i in range(size):
    for j in range(size):
      yield i, j, x[:, i:i + h:stride, j:j + w:stride]


def conv(x, kernel, stride):
  return sum(pixels @ kernel[i, j] for i, j, pixels in windows(
      x, kernel.shape[0], stride, 0))


def batch_norm(x, variables, path):
  params, stats = (functools.reduce(dict.__getitem__, path, variables[name])
                   for name in ("params", "batch_stats"))
  x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
  return x * params["scale"] + params["bias"]


def relu(x):
  return np.maximum(x, 0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind,strides", [
    ("basic", (0, 1)), ("bottleneck", (1, 0, 1))])
def test_block_is_its_equation(kind, strides, stride):
  """The first 3x3 of both kinds has the stride (0 above)."""
  x = images(2, 7, 9, dim=6)
  block = resnet.Block(kind, 4, stride=stride)
  variables = perturbed(block, x)
  y = x
  for i, s in enumerate(strides, 1):
    kernel = variables["params"][f"conv{i}"]["kernel"]
    y = batch_norm(conv(y, kernel, s or stride), variables, [f"norm{i}"])
    y = y if i == len(strides) else relu(y)
  kernel = variables["params"]["downsample"]["conv"]["kernel"]
  assert kernel.shape[:2] == (1, 1)
  shortcut = batch_norm(conv(x, kernel, stride), variables,
                        ["downsample", "norm"])
  got, mask = apply(block, variables, x)
  assert mask is None
  np.testing.assert_allclose(got, relu(y + shortcut), atol=2e-5)


@KINDS
def test_a_block_that_keeps_the_shape_has_no_projection(kind):
  x = images(2, 5, 5, dim=16)
  block = resnet.Block(kind, 4 if kind == "bottleneck" else 16)
  assert "downsample" not in perturbed(block, x)["params"]


@KINDS
def test_a_block_begins_as_its_shortcut(kind):
  x = images(2, 5, 5, dim=16)
  block = resnet.Block(kind, 4 if kind == "bottleneck" else 16)
  y, _ = block.init_with_output(jax.random.key(0), x)[0]
  np.testing.assert_array_equal(y, relu(x))


@pytest.mark.parametrize("height,width", [(13, 18), (16, 15)])
def test_stem_is_convolution_norm_relu_and_maximum(height, width):
  x = images(2, height, width)
  stem = resnet.Stem(6)
  variables = perturbed(stem, x)
  y = conv(x, variables["params"]["conv"]["kernel"], 2)
  y = relu(batch_norm(y, variables, ["norm"]))
  want = np.max([p for *_, p in windows(y, 3, 2, -np.inf)], 0)
  got, mask = apply(stem, variables, x)
  assert mask is None and variables["params"]["conv"].keys() == {"kernel"}
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_stem_of_three_convolutions_halves_the_first_two_widths():
  x = images(1, 13, 18)
  stem = resnet.Stem(8, "3x3")
  variables = perturbed(stem, x)
  y, widths = x, []
  for i in (1, 2, 3):
    kernel = variables["params"][f"conv{i}"]["kernel"]
    widths.append(kernel.shape[-1])
    y = relu(batch_norm(conv(y, kernel, 2 if i == 1 else 1), variables,
                        [f"norm{i}"]))
  assert widths == [4, 4, 8]
  got, _ = apply(stem, variables, x)
  np.testing.assert_allclose(got, resnet.max_pool(jnp.asarray(y), None)[0],
                             atol=1e-5)


@pytest.mark.parametrize("height,width", [(6, 9), (7, 8), (1, 1)])
def test_max_pool_pads_with_less_than_any_value(height, width):
  x = -1 - np.abs(images(2, height, width))
  want = np.max([p for *_, p in windows(x, 3, 2, -np.inf)], 0)
  got, _ = resnet.max_pool(x, None)
  np.testing.assert_array_equal(got, want)
  canvas, mask = on_canvas(x, 12, 14)
  got, mask = resnet.max_pool(canvas, mask)
  want, valid = on_canvas(want, 6, 7, fill=0)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(mask, valid)


def test_max_pool_has_a_finite_gradient_on_padding():
  canvas, mask = on_canvas(images(1, 5, 5), 16, 16)
  gradient = jax.grad(lambda x: resnet.max_pool(x, mask)[0].sum())(canvas)
  assert np.all(np.isfinite(gradient)) and not np.any(gradient[~mask])


def test_features_have_the_strides_and_channels_of_the_stages():
  model = resnet.ResNet(block="bottleneck", **SMALL)
  x = images(1, 70, 33)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  features = jax.eval_shape(functools.partial(model.apply, method="features"),
                            variables, x)
  assert {k: v.shape for k, v in features.items()} == {
      "stage1": (1, 18, 9, 32), "stage2": (1, 9, 5, 48),
      "stage3": (1, 5, 3, 64), "stage4": (1, 3, 2, 80)}


@KINDS
def test_head_is_mean_then_linear(kind):
  model = resnet.ResNet(block=kind, **SMALL)
  x = images()
  variables = perturbed(model, x)
  head = variables["params"]["head"]
  pooled = apply(model, variables, x, method="features")["stage4"].mean((1, 2))
  bare = resnet.ResNet(block=kind, **{**SMALL, "num_classes": 0})
  np.testing.assert_allclose(apply(bare, variables, x), pooled, atol=1e-5)
  np.testing.assert_allclose(
      apply(model, variables, x),
      pooled @ head["kernel"] + head["bias"].reshape(1, -1), atol=1e-5)


@KINDS
@pytest.mark.parametrize("height,width", [
    (61, 50), pytest.param(64, 96, marks=pytest.mark.slow),
    pytest.param(33, 34, marks=pytest.mark.slow)])
def test_padding_changes_no_valid_output(kind, height, width):
  model = resnet.ResNet(block=kind, **SMALL)
  x = images(2, height, width)
  variables = perturbed(model, x, scale=0.1)
  canvas, mask = on_canvas(x)
  alone = apply(model, variables, x, method="features")
  padded = apply(model, variables, canvas, mask=mask, method="features")
  for name, want in alone.items():
    h, w = want.shape[1:3]
    got = padded[name]
    np.testing.assert_allclose(got[:, :h, :w], want, atol=1e-5)
    assert not np.any(got[:, h:]) and not np.any(got[:, :, w:])
  logits = apply(model, variables, x)
  np.testing.assert_allclose(apply(model, variables, canvas, mask=mask), logits,
                             atol=1e-5)
  # Otherwise the lines above would prove nothing.
  assert np.abs(apply(model, variables, canvas) - logits).max() > 1e-2


def test_padding_changes_no_training_step():
  model = resnet.ResNet(block="basic", depths=(1, 1), widths=(8, 12),
                        num_classes=5)
  x = images(4, 61, 75)
  variables = perturbed(model, x, scale=0.1)

  @jax.jit
  def step(variables, x, mask=None):
    def loss(params):
      logits, state = model.apply({**variables, "params": params}, x, mask=mask,
                                  train=True, mutable="batch_stats")
      return jnp.square(logits).mean(), state
    return jax.value_and_grad(loss, has_aux=True)(variables["params"])

  canvas, mask = on_canvas(x)
  (alone, stats), gradient = step(variables, x)
  (padded, new_stats), new_gradient = step(variables, canvas, mask)
  np.testing.assert_allclose(padded, alone, atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5,
                                 rtol=1e-5), new_stats, stats)
  scale = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4 * scale),
               new_gradient, gradient)


@KINDS
def test_training_moves_every_running_statistic_and_evaluation_none(kind):
  model = resnet.ResNet(block=kind, **SMALL)
  x = images()
  variables = perturbed(model, x)
  old = variables["batch_stats"]
  _, state = apply(model, variables, x, train=True, mutable="batch_stats")
  jax.tree.map(lambda a, b: np.testing.assert_(np.all(a != b)),
               state["batch_stats"], old)
  _, state = apply(model, variables, x, mutable="batch_stats")
  jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], old)


def test_drop_path_grows_from_nothing_to_its_rate():
  model = resnet.ResNet(block="basic", **SMALL, drop_path_rate=0.4)
  rates = []

  def note(next_fn, args, kwargs, context):
    if isinstance(context.module, layers.DropPath):
      rates.append(context.module.rate)
    return next_fn(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(model.init, jax.random.key(0), images())
  np.testing.assert_allclose(rates, np.linspace(0, 0.4, 5), rtol=1e-6)


@KINDS
def test_drop_path_leaves_the_shortcut(kind):
  x = images(64, 3, 3, dim=6)
  block = resnet.Block(kind, 4, stride=2, drop_path_rate=0.5)
  variables = perturbed(block, x)

  def run(rate, **rngs):
    return apply(block.clone(drop_path_rate=rate), variables, x, train=True,
                 rngs=rngs, mutable="batch_stats")[0][0]

  branch_off = run(1 - 1e-7, drop_path=jax.random.key(0))
  doubled = run(0.5, drop_path=jax.random.key(0))
  dropped = np.isclose(doubled, branch_off, atol=1e-5).all((1, 2, 3))
  assert 16 < dropped.sum() < 48
  assert np.array_equal(doubled, run(0.5, drop_path=jax.random.key(0)))
  assert not np.allclose(doubled, run(0.5, drop_path=jax.random.key(1)))


def test_dropout_comes_before_the_head():
  model = resnet.ResNet(block="basic", **SMALL, drop_rate=1.0)
  x = images()
  variables = perturbed(model, x)
  logits, _ = apply(model, variables, x, train=True, mutable="batch_stats",
                          rngs={"dropout": jax.random.key(0)})
  bias = np.broadcast_to(variables["params"]["head"]["bias"], (2, 5))
  np.testing.assert_array_equal(logits, bias)


def test_bfloat16_computes_near_float32_with_float32_parameters():
  x = images()
  half = resnet.ResNet(block="bottleneck", **SMALL, dtype=jnp.bfloat16)
  variables = perturbed(half, x, scale=0.05)
  assert all(v.dtype == jnp.float32 for v in
             jax.tree.leaves(variables["params"]))
  got = apply(half, variables, x)
  assert got.dtype == jnp.bfloat16
  want = apply(resnet.ResNet(block="bottleneck", **SMALL), variables, x)
  got = got.astype(jnp.float32)
  np.testing.assert_allclose(got, want, atol=0.05, rtol=0.05)
  assert not np.array_equal(got, want)


def test_convolutions_and_head_begin_as_timms():
  model = resnet.ResNet(block="bottleneck", depths=(1,), widths=(64,),
                        num_classes=1000)
  params = model.init(jax.random.key(0), images(1))["params"]
  block = params["stage1"]["block1"]
  for kernel in (params["stem"]["conv"]["kernel"], block["conv2"]["kernel"],
                 block["conv3"]["kernel"]):
    fan_out = kernel.shape[0] * kernel.shape[1] * kernel.shape[3]
    assert abs(np.std(kernel) / np.sqrt(2 / fan_out) - 1) < 0.05
  for name in ("norm1", "norm2", "norm3"):
    assert np.all(block[name]["scale"] == (name != "norm3"))
  for values in params["head"].values():
    assert np.abs(values).max() <= 256**-0.5
    assert abs(np.std(values) * np.sqrt(3 * 256) - 1) < 0.05


def test_wrong_settings_are_named():
  with pytest.raises(ValueError, match="did you mean bottleneck"):
    resnet.ResNet(block="botleneck", **SMALL).init(jax.random.key(0), images())
  with pytest.raises(ValueError, match="depths: has 2 stages, widths has 4"):
    resnet.ResNet(block="basic", depths=(1, 1)).init(
        jax.random.key(0), images())


@pytest.mark.parametrize("name", NAMES)
def test_table_holds_the_built_model(name):
  spec = pyramids.MODELS[name]
  model = spec.load_class()(**vars(spec.settings))
  params = jax.eval_shape(model.init, jax.random.key(0), images(1))["params"]
  assert sum(x.size for x in jax.tree.leaves(params)) == spec.n_params
