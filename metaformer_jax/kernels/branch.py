"""What the branches of a block share: their plain parts, and the choice.

A branch is a function (settings, x, keep, *parameters) -> y, of x [B, H, W, C],
keep float32 [B] and float32 parameters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from metaformer_jax.ops import activations, platforms, statistics

Array = jax.Array
# StarReLU's scale and bias are parameters, which any of them can have.
ACTIVATIONS = {"gelu": activations.GELU, "relu": activations.RELU,
               "squared_relu": activations.SQUARED_RELU,
               "star_relu": activations.SQUARED_RELU}


def vector(values: Array | None, n: int, default: float) -> Array:
  """A vector of n parameters in float32; None stands for the default."""
  if values is None:
    return jnp.full((n,), default, jnp.float32)
  return values.astype(jnp.float32)


def spread(values: Array, x: Array) -> Array:
  """[C] to the shape and the dtype of x [..., C]; sums gradients in float32."""
  return jnp.broadcast_to(values, x.shape).astype(x.dtype)


def norm(x: Array, scale: Array, bias: Array, axes: tuple[int, ...],
         eps: float) -> Array:
  """A norm with statistics over axes of x, in float32; in x's dtype."""
  return statistics.normalize(x, scale, bias, axes, eps).astype(x.dtype)


def add(x: Array, y: Array, keep: Array, layer_scale: Array,
        res_scale: Array) -> Array:
  """res_scale x + keep layer_scale y, rounded to the dtype after each step."""
  y = (y * spread(layer_scale, y)).astype(jnp.float32)
  y = (y * keep[:, None, None, None]).astype(x.dtype)
  return x * spread(res_scale, x) + y


def differentiable(plain: Callable[..., Array], forward: Callable[..., Array],
                   backward: Callable[..., tuple[Array, ...]],
                   ) -> Callable[..., Array]:
  """A branch that is `plain`, but in a program for a TPU two kernels.

  Args:
    plain: the branch.
    forward: the same, by a kernel.
    backward: (settings, dy, x, keep, *parameters) -> gradients of x and the
      parameters, by a kernel.

  Returns:
    The branch; `settings.interpret` takes the kernels on any platform, and
    `keep` has no gradient.
  """

  def plain_backward(settings, dy, x, keep, *parameters):
    def branch(x, *parameters):
      return plain(settings, x, keep, *parameters)

    return jax.vjp(branch, x, *parameters)[1](dy)

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def branch(settings, *args):
    return _choose(settings, plain, forward, *args)

  def fwd(settings, *args):
    return branch(settings, *args), args

  def bwd(settings, args, dy):
    dx, *gradients = _choose(settings, plain_backward, backward, dy, *args)
    return dx, jnp.zeros_like(args[1]), *gradients

  branch.defvjp(fwd, bwd)
  return branch


def mesh() -> AbstractMesh | None:
  """The context's mesh, over whose axes the batch is split.

  A compiler cannot split a kernel. `jax.sharding.use_abstract_mesh` sets the
  mesh; None for one device, and where the batch is split already.
  """
  found = jax.sharding.get_abstract_mesh()
  return None if found.empty or found.size == 1 or found.manual_axes else found


def local_shape(shape: Sequence[int]) -> tuple[int, ...] | None:
  """Of the images [B, H, W, C] of one device; None if they cannot be split."""
  n_devices = 1 if mesh() is None else mesh().size
  if shape[0] % n_devices:
    return None
  return shape[0] // n_devices, *shape[1:]


def problem(shape: Sequence[int],
            of_images: Callable[[tuple[int, ...]], str | None]) -> str | None:
  """Why a batch of this shape cannot use the kernels; None if it can.

  Args:
    shape: of all images, [B, H, W, C].
    of_images: (shape of a device's images) -> why they cannot.
  """
  local = local_shape(shape)
  if local is None:
    return f"{shape[0]} images cannot be divided among {mesh().size} devices"
  return of_images(local)


def _choose(settings: Any, plain: Callable[..., Any],
            kernel: Callable[..., Any], *args: Array) -> Any:
  plain, kernel = (functools.partial(fn, settings) for fn in (plain, kernel))
  if settings.mesh is not None:
    kernel = _split(kernel, settings.mesh, args)
  if settings.interpret:
    return kernel(*args)
  return platforms.choose(plain, *args, tpu=kernel)


def _split(kernel, devices, args):
  """Runs a kernel on each device's images; sums the parameters' gradients.

  The images come first among the arguments, then keep. Gradients of matrices
  and convolutions are sent in the images' dtype, as those of `plain`.
  """
  axes, whole = P(devices.axis_names), P()
  n_images = sum(getattr(v, "ndim", 0) == 4 for v in args)
  backward = n_images == 2

  def local(*args):
    out = kernel(*args)
    if not backward:
      return out
    dx, *gradients = out
    sent = jax.tree.map(
        lambda g: g.astype(dx.dtype) if g.ndim > 1 else g, gradients)
    return dx, *jax.tree.map(lambda g: g.astype(jnp.float32),
                             lax.psum(sent, devices.axis_names))

  n_parameters = len(args) - n_images - 1
  specs = (*(axes,) * (n_images + 1), *(whole,) * n_parameters)
  return jax.shard_map(
      local, mesh=devices, in_specs=specs, check_vma=False,
      out_specs=(axes, *(whole,) * n_parameters) if backward else axes)
