"""BatchNorm against plain numpy, and the others' gradient against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from metaformer_jax.models import norms
from metaformer_jax.ops import statistics

# All sizes differ, so that mixed-up axes are noticed.
SHAPE = (8, 5, 7, 6)
EPS, MOMENTUM = 1e-2, 0.8


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(0.5, 2, shape).astype(np.float32)


def made():
  """A BatchNorm with parameters and statistics away from 0 and 1."""
  rng = np.random.default_rng(1)
  params = {name: rng.normal(1, 0.3, 6).astype(np.float32)
            for name in ("scale", "bias")}
  norm = norms.BatchNorm(eps=EPS, momentum=MOMENTUM)
  variables = norm.init(jax.random.key(0), normal(SHAPE))
  stats = variables["batch_stats"] | {
      "mean": rng.normal(0, 1, 6).astype(np.float32),
      "var": rng.uniform(0.5, 2, 6).astype(np.float32)}
  return norm, jax.tree.map(
      jnp.asarray, {"params": params, "batch_stats": stats})


def normalised(x, mean, var, params):
  mean, var = np.asarray(mean), np.asarray(var)
  params = jax.tree.map(np.asarray, params)
  return (x - mean) / np.sqrt(var + EPS) * params["scale"] + params["bias"]


def train(norm, variables, x, mask=None):
  y, state = norm.apply(variables, x, mask=mask, train=True,
                        mutable=["batch_stats"])
  return y, state["batch_stats"]


def valid_mask(heights, widths, shape=SHAPE):
  rows = np.arange(shape[1]).reshape(1, -1, 1)
  columns = np.arange(shape[2]).reshape(1, 1, -1)
  return ((rows < np.reshape(heights, (-1, 1, 1)))
          & (columns < np.reshape(widths, (-1, 1, 1))))


def test_begins_as_the_identity_of_standardised_values():
  variables = norms.BatchNorm().init(jax.random.key(0), normal(SHAPE))
  assert not np.any(variables["batch_stats"]["mean"])
  assert np.all(variables["batch_stats"]["var"] == 1)
  assert np.all(variables["params"]["scale"] == 1)
  assert not np.any(variables["params"]["bias"])


def test_evaluation_uses_the_running_statistics():
  norm, variables = made()
  x, stats = normal(SHAPE), variables["batch_stats"]
  want = normalised(x, stats["mean"], stats["var"], variables["params"])
  np.testing.assert_allclose(norm.apply(variables, x), want, atol=1e-5)
  mask = valid_mask(range(1, 9), 4)
  assert np.array_equal(norm.apply(variables, x, mask=mask),
                        norm.apply(variables, x))


def test_training_uses_the_biased_variance_and_keeps_the_unbiased():
  norm, variables = made()
  x, old = normal(SHAPE), variables["batch_stats"]
  y, new = train(norm, variables, x)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(
      y, normalised(x, mean, var, variables["params"]), atol=1e-5)
  np.testing.assert_allclose(
      new["mean"], MOMENTUM * old["mean"] + (1 - MOMENTUM) * mean, atol=1e-5)
  unbiased = x.var((0, 1, 2), ddof=1)
  np.testing.assert_allclose(
      new["var"], MOMENTUM * old["var"] + (1 - MOMENTUM) * unbiased, atol=1e-5)


def test_few_values_tell_the_variances_apart():
  """With two values, the unbiased variance is twice the biased one."""
  norm, variables = made()
  x = normal((2, 1, 1, 6))
  _, new = train(norm, variables, x)
  want = (MOMENTUM * variables["batch_stats"]["var"]
          + (1 - MOMENTUM) * 2 * x.var((0, 1, 2)))
  np.testing.assert_allclose(new["var"], want, atol=1e-5)


def test_training_leaves_the_callers_arrays_alone():
  norm, variables = made()
  variables = jax.tree.map(np.array, variables)
  before = jax.tree.map(np.copy, variables)
  train(norm, variables, normal(SHAPE))
  jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_initialising_does_not_move_the_running_statistics():
  variables = norms.BatchNorm().init(
      jax.random.key(0), normal(SHAPE), train=True)
  assert not np.any(variables["batch_stats"]["mean"])
  assert np.all(variables["batch_stats"]["var"] == 1)


def test_training_statistics_leave_out_the_padding():
  norm, variables = made()
  mask = valid_mask([5, 1, 3, 2, 4, 5, 2, 1], [7, 2, 3, 6, 1, 4, 5, 1])
  x = np.where(mask[..., None], normal(SHAPE), 1e3).astype(np.float32)
  y, new = train(norm, variables, x, mask)
  valid = x[mask]
  old = variables["batch_stats"]
  np.testing.assert_allclose(
      np.asarray(y)[mask], normalised(valid, valid.mean(0), valid.var(0),
                                      variables["params"]), atol=1e-5)
  for name, of_batch in (("mean", valid.mean(0)),
                         ("var", valid.var(0, ddof=1))):
    np.testing.assert_allclose(
        new[name], MOMENTUM * old[name] + (1 - MOMENTUM) * of_batch, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_eight_devices_give_the_statistics_of_the_global_batch(masked):
  norm, variables = made()
  # Each device's images differ, so that no local statistic is the global one.
  x = normal(SHAPE) + np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1)
  mask = valid_mask(np.arange(8) % 5 + 1, np.arange(8) % 7 + 1)
  mask = mask if masked else None
  dy = normal(SHAPE, 2)

  @jax.jit
  def step(params, x, mask):
    def loss(params):
      y, stats = train(norm, {**variables, "params": params}, x, mask)
      valid = 1 if mask is None else mask[..., None]
      return (y * dy * valid).mean(), (y, stats)
    return jax.grad(loss, has_aux=True)(params)

  mesh = jax.make_mesh((8,), ("data",))
  split = NamedSharding(mesh, PartitionSpec("data"))
  one = step(variables["params"], x, mask)
  eight = step(variables["params"], *jax.device_put((x, mask), split))
  assert len(eight[1][0].sharding.device_set) == 8
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6,
                                                       rtol=1e-5), eight, one)


def test_running_statistics_are_used_in_training_if_asked_for():
  """mmdetection's norm_eval: they stay, and scale and bias have gradients."""
  norm, variables = made()
  x = normal(SHAPE)
  want = norm.apply(variables, x)
  with norms.running_statistics():
    y, new = train(norm, variables, x)
    gradient = jax.grad(lambda params: train(
        norm, {**variables, "params": params}, x)[0].sum())(variables["params"])
  np.testing.assert_array_equal(y, want)
  assert np.abs(y - train(norm, variables, x)[0]).max() > 0.1
  jax.tree.map(np.testing.assert_array_equal, new, variables["batch_stats"])
  stats = jax.tree.map(np.asarray, variables["batch_stats"])
  np.testing.assert_allclose(
      gradient["scale"], ((x - stats["mean"]) / np.sqrt(stats["var"] + EPS)
                          ).sum((0, 1, 2)), rtol=1e-4)


def test_running_statistics_of_flax_are_used_as_well():
  norm = nn.BatchNorm()
  x = normal(SHAPE)
  variables = norm.init(jax.random.key(0), x, True)
  with norms.running_statistics():
    y, new = norm.apply(variables, x, False, mutable=["batch_stats"])
    named, _ = norm.apply(variables, x, use_running_average=False,
                          mutable=["batch_stats"])
  np.testing.assert_array_equal(y, norm.apply(variables, x, True))
  np.testing.assert_array_equal(y, named)
  assert not np.any(new["batch_stats"]["mean"])


SCALE, BIAS = (jnp.asarray(np.linspace(*ends, 6, dtype=np.float32))
               for ends in ((0.5, -2), (1, 3)))


def plainly(x, scale, bias, axes, weight=None):
  """`statistics.normalize`, for JAX to differentiate."""
  z = x.astype(jnp.float32)
  mean, var = statistics.moments(z, axes, weight)
  y = (z - mean) / jnp.sqrt(var + EPS) * statistics.per_channel(scale, x)
  return y if bias is None else y + statistics.per_channel(bias, x)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-6),
                                             ("bfloat16", 8e-3)])
@pytest.mark.parametrize("axes,masked", [
    ((1, 2, 3), False), ((1, 2, 3), True), ((0, 1, 2), False),
    ((0, 1, 2), True), ((-1,), False)])
@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "no bias"])
def test_the_gradients_are_those_of_automatic_differentiation(
    bias, axes, masked, dtype, tolerance):
  """Also where the mean is far from 0, and of what padding is given."""
  x = jnp.asarray(normal(SHAPE) * np.linspace(0.1, 3, 6) + 7).astype(dtype)
  weight = norms._weight(valid_mask([5, 1, 3, 2, 5, 4, 1, 5], 4)
                         ) if masked else None
  dy = jnp.asarray(normal(SHAPE, 1))

  y, gradients = jax.vjp(lambda *v: statistics.normalize(
      *v, axes, EPS, weight), x, SCALE, bias)
  want_y, want_gradients = jax.vjp(
      lambda *v: plainly(*v, axes, weight), x, SCALE, bias)
  np.testing.assert_allclose(y, want_y, rtol=0, atol=3e-5)
  assert gradients(dy)[0].dtype == x.dtype
  for got, want in zip(*map(jax.tree.leaves, (
      gradients(dy), want_gradients(dy))), strict=True):
    got, want = (v.astype(jnp.float32) for v in (got, want))
    np.testing.assert_allclose(
        got, want, rtol=0, atol=tolerance * float(jnp.abs(want).max()))


@pytest.mark.parametrize("axes", [(1, 2, 3), (0, 1, 2), (-1,)])
def test_the_second_derivative_has_that_of_the_statistics(axes):
  x, dy, v = (jnp.asarray(normal(SHAPE, seed)) for seed in range(3))

  def second(fn):
    def along(*args):
      return (jax.vjp(fn, *args)[1](dy)[0] * v).sum()
    return jax.grad(along, (0, 1))(x, SCALE)

  got, want = (
      second(lambda x, scale, fn=fn: fn(x, scale, BIAS, axes))
      for fn in (lambda *v: statistics.normalize(*v, EPS), plainly))
  for one, other in zip(got, want):
    np.testing.assert_allclose(one, other, rtol=0,
                               atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(("axes", "barriers"), [((-1,), 1), ((1, 2, 3), 0)])
def test_a_gpu_computes_the_means_of_a_gradient_first(axes, barriers):
  x = normal(SHAPE)

  def gradient(dy):
    return jax.vjp(lambda x: statistics.normalize(
        x, SCALE, BIAS, axes, EPS), x)[1](dy)

  for platform, n in (("cuda", barriers), ("tpu", 0)):
    lowered = jax.jit(gradient).trace(x).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("optimization_barrier") == n


@pytest.mark.parametrize("axes", [(1, 2, 3), (0, 1, 2)])
def test_a_gradient_keeps_what_is_normalised_and_not_the_result(axes):
  """On a CPU; and the activation, which the next layer's gradient needs."""
  n_layers, dim = 6, 64
  layer = np.eye(dim), np.ones(dim), np.ones(dim)

  def loss(layers, x):
    for weight, scale, bias in layers:
      x = jax.nn.relu(statistics.normalize(x @ weight, scale, bias, axes, EPS))
    return x.sum()

  layers = jax.tree.map(jnp.float32, [layer] * n_layers)
  x = jnp.zeros((4, 32, 32, dim))
  compiled = jax.jit(jax.grad(loss)).lower(layers, x).compile()
  kept = compiled.memory_analysis().temp_size_in_bytes / x.nbytes
  assert kept < 2.5 * n_layers  # And one or two at a time on the way.
