"""Both branches, by the kernels and by the modules of a block."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax.kernels import mlp, pooling, sepconv
from metaformer_jax.models import layers, mixers, norms

EPS = 1e-3
# Of the largest value. In bfloat16 both are compared with the modules in
# float32. A rounding is 2^-9 of a value; the kernel rounds the operands of its
# products and its results, and sums in float32.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


def images(shape, dtype, seed=0):
  """Of different means and deviations, rounded to the dtype."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * rng.uniform(0.5, 2, (shape[0], 1, 1, 1))
  return jnp.asarray(x + rng.normal(size=(shape[0], 1, 1, 1)), dtype)


def keep(n, rate=0.25):
  """Drop path's factors: the first image's branch is dropped."""
  return jnp.where(jnp.arange(n) == 0, 0, 1 / (1 - rate))


def parameters(channels, hidden, seed=0, bias=True, star=False):
  """Of a branch with an MLP: none is near 0 or 1; kernels keep the scale.

  Args:
    channels, hidden: of the MLP.
    seed: of the random values.
    bias: whether norm and products have one.
    star: whether the activation is StarReLU.
  """
  rng = np.random.default_rng(seed)

  def vector(n, low, high):
    return jnp.asarray(rng.uniform(low, high, n), jnp.float32)

  def kernel(*shape):
    return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

  def optional(values):
    return values if bias else None

  return {
      "norm_scale": vector(channels, 0.5, 1.5),
      "norm_bias": optional(vector(channels, -0.5, 0.5)),
      "kernel1": kernel(channels, hidden),
      "bias1": optional(vector(hidden, -0.5, 0.5)),
      "act_scale": vector(1, 0.5, 0.9) if star else None,
      "act_bias": vector(1, -0.5, -0.3) if star else None,
      "kernel2": kernel(hidden, channels),
      "bias2": optional(vector(channels, -0.5, 0.5)),
      "layer_scale": vector(channels, 0.2, 0.8),
      "res_scale": vector(channels, 0.6, 1.4)}


def pooling_parameters(channels, seed=0, bias=True):
  whole = parameters(channels, 1, seed, bias)
  return {key: whole[key] for key in (
      "norm_scale", "norm_bias", "layer_scale", "res_scale")}


def sepconv_parameters(channels, hidden, size, seed=0, bias=True, star=True):
  """Those of the branch with a separable convolution of a size."""
  whole = parameters(channels, hidden, seed, bias, star)
  rng = np.random.default_rng(seed + 1)
  taps = jnp.asarray(rng.normal(size=(size, size, 1, hidden)) / size,
                     jnp.float32)
  return {"taps": taps} | {key: value for key, value in whole.items()
                                if key not in ("bias1", "bias2")}


def _normed(x, p, dtype, norm="group_norm"):
  given = {"scale": p["norm_scale"], "bias": p["norm_bias"]}
  return norms.NORMS[norm](EPS, p["norm_bias"] is not None, dtype=dtype).apply(
      {"params": given}, x)


def _scaled(x, scale, dtype):
  if scale is None:
    return x
  return layers.Scale(1.0, dtype=dtype).apply({"params": {"scale": scale}}, x)


def _add(x, y, keep, p, dtype):
  y = _scaled(y, p["layer_scale"], dtype)
  y = y * keep[:, None, None, None].astype(y.dtype)
  return _scaled(x, p["res_scale"], dtype) + y


def pooling_modules(x, keep, p, size, subtract=True):
  """The branch as `models.metaformer` has it; computed in the dtype of x."""
  mixer = mixers.Pooling(dim=x.shape[-1], pool_size=size,
                         pool_subtract=subtract, dtype=x.dtype)
  return _add(x, mixer.apply({}, _normed(x, p, x.dtype)), keep, p, x.dtype)


def mlp_modules(x, keep, p, activation="gelu", norm="group_norm"):
  """The branch as `models.metaformer` has it; computed in the dtype of x."""
  module = layers.Mlp(p["kernel1"].shape[1], activation,
                      p["bias1"] is not None, dtype=x.dtype)
  variables = {"params": {f"fc{i}": {"kernel": p[f"kernel{i}"],
                                     "bias": p[f"bias{i}"]} for i in (1, 2)}}
  if p["act_scale"] is not None:
    variables["params"]["act"] = {"scale": p["act_scale"],
                                  "bias": p["act_bias"]}
  y = module.apply(variables, _normed(x, p, x.dtype, norm))
  return _add(x, y, keep, p, x.dtype)


def sepconv_modules(x, keep, p, activation="star_relu", norm="layer_norm"):
  """The branch as `models.metaformer` has it; computed in the dtype of x."""
  channels, hidden = p["kernel1"].shape
  module = mixers.SepConv(
      dim=channels, expansion=hidden / channels, activation=activation,
      conv_kernel_size=len(p["taps"]), dtype=x.dtype)
  variables = {"params": {name: {"kernel": p[key]} for name, key in (
      ("pwconv1", "kernel1"), ("dwconv", "taps"), ("pwconv2", "kernel2"))}}
  if p["act_scale"] is not None:
    variables["params"]["act1"] = {"scale": p["act_scale"],
                                   "bias": p["act_bias"]}
  y = module.apply(variables, _normed(x, p, x.dtype, norm))
  return _add(x, y, keep, p, x.dtype)


def pooling_kernel(x, keep, p, size, subtract=True, interpret=True):
  return pooling.pooling_branch(x, keep, **p, size=size, subtract=subtract,
                                eps=EPS, interpret=interpret)


def mlp_kernel(x, keep, p, activation="gelu", norm="group_norm",
               interpret=True):
  return mlp.mlp_branch(x, keep, **p, activation=activation, norm=norm, eps=EPS,
                        interpret=interpret)


def sepconv_kernel(x, keep, p, activation="star_relu", norm="layer_norm",
                   interpret=True):
  return sepconv.sepconv_branch(x, keep, **p, activation=activation, norm=norm,
                                eps=EPS, interpret=interpret)


def assert_same(kernel, modules, x, keep, p):
  """Values and all gradients of the kernel are those of the modules in float32.

  Both are functions of (x, keep, parameters).
  """
  tolerance = TOLERANCES[str(x.dtype)]
  exact, dy = x.astype(jnp.float32), images(x.shape, x.dtype, seed=1)
  y, (dx, dp) = _differentiated(kernel, x, keep, p, dy)
  want, (want_dx, want_dp) = _differentiated(modules, exact, keep, p,
                                             dy.astype(jnp.float32))
  assert y.dtype == dx.dtype == x.dtype
  # The branches alone: beside x and dy they might be lost.
  _assert_close(y - exact, want - exact, tolerance, want)
  _assert_close(dx - dy.astype(jnp.float32),
                want_dx - dy.astype(jnp.float32), tolerance, want_dx)
  for key, want in want_dp.items():
    if want is None:
      assert dp[key] is None
      continue
    assert dp[key].dtype == want.dtype, key
    # One that cancels is compared with a sum of as many random values: of all
    # pixels, and of all hidden channels if it is one number for them.
    n = x.size // x.shape[-1] * (
        p["kernel1"].shape[1] if key.startswith("act_") else 1)
    _assert_close(dp[key], want, tolerance, want, least=n**0.5, name=key)


def assert_devices_share_a_batch(kernel, modules, p):
  """Each runs the kernel on its images; gradients of parameters are summed."""
  devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
  split = NamedSharding(devices, PartitionSpec(("data", "fsdp")))

  def branch(x, keep, p):
    with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
      return kernel(x, keep, p)

  assert_same(branch, modules,
              jax.device_put(images((8, 3, 4, 8), "float32"), split),
              jax.device_put(keep(8), split),
              jax.device_put(p, NamedSharding(devices, PartitionSpec())))


def _differentiated(branch, x, keep, p, dy):
  """(y, (gradient of x, gradients of the parameters))."""

  @jax.jit
  def run(x, keep, p, dy):
    y, pull = jax.vjp(lambda x, p: branch(x, keep, p), x, p)
    return y, pull(dy)

  return run(x, keep, p, dy)


def _assert_close(got, want, tolerance, size, least=1e-3, name=""):
  largest = np.abs(np.asarray(size, np.float32)).max(initial=least)
  np.testing.assert_allclose(
      np.asarray(got, np.float32) / largest, np.asarray(want) / largest,
      rtol=0, atol=tolerance, err_msg=name)
