"""Norms: `norm(x, mask=None, train=False)`, [B, H, W, C] -> [B, H, W, C].

Statistics are float32; scale and bias are vectors over channels. A factory of
norms takes `eps`, `use_bias`, `dtype` and `name`.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from metaformer_jax.ops import statistics


def spread(vector: jax.Array, x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Broadcasts a vector over channels, or one value, to x [..., C].

  The cast comes last, so that the gradient, a sum over all of x, is summed in
  float32: a CPU sums bfloat16 in bfloat16, which stops growing at 256 times the
  summand.
  """
  vector = statistics.per_channel(vector, x)
  return jnp.broadcast_to(vector, x.shape).astype(dtype)


def _weight(mask):
  return None if mask is None else mask[..., None].astype(jnp.float32)


class _Norm(nn.Module):
  """Base of the norms: an epsilon, a scale and a bias."""

  eps: float = 1e-5
  use_bias: bool = True
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: DTypeLike | None = None

  def _vectors(self, dim: int) -> tuple[jax.Array, jax.Array | None]:
    return (self.param("scale", self.scale_init, (dim,)),
            self.param("bias", nn.initializers.zeros, (dim,))
            if self.use_bias else None)

  def _normalize(self, x: jax.Array, axes: tuple[int, ...],
                 weight: jax.Array | None = None) -> jax.Array:
    y = statistics.normalize(x, *self._vectors(x.shape[-1]), axes, self.eps,
                             weight)
    return y.astype(self.dtype or jnp.float32)


class GroupNorm(_Norm):
  """GroupNorm with one group: statistics over H, W and C of each image.

  The "Modified Layer Normalization" of arXiv 2111.11418.
  """

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    return self._normalize(x, (1, 2, 3), _weight(mask))


class LayerNorm(_Norm):
  """LayerNorm over the channels of each pixel; [..., C]. Needs no mask."""

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    return self._normalize(x, (-1,))


class BatchNorm(_Norm):
  """BatchNorm as in PyTorch: statistics of the global batch, or running ones.

  The collection "batch_stats" holds the running mean and variance and the
  number of batches seen. In training it must be mutable: the running values
  move by 1 - momentum towards the batch's mean and unbiased variance. The batch
  itself is normalised with its biased variance.
  """

  momentum: float = 0.9

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    dim = x.shape[-1]
    x = x.astype(jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (dim,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (dim,))
    n_batches = self.variable("batch_stats", "n_batches", jnp.zeros, (),
                              jnp.int32)
    if not train:
      mean, var = (statistics.per_channel(v.value, x)
                   for v in (running_mean, running_var))
      y = statistics.affine((x - mean) * lax.rsqrt(var + self.eps),
                            *self._vectors(dim))
      return y.astype(self.dtype or jnp.float32)
    axes, weight = tuple(range(x.ndim - 1)), _weight(mask)
    if not self.is_initializing():
      # The norm computes the same; XLA merges the two.
      mean, var = statistics.moments(lax.stop_gradient(x), axes, weight)
      n = x.size / dim if mask is None else statistics.count(x, axes, weight)
      unbiased = var * (n / jnp.maximum(n - 1, 1))
      n_batches.value = n_batches.value + 1
      for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.value = running.value + (1 - self.momentum) * (
            new.reshape(-1) - running.value)
    return self._normalize(x, axes, weight)


@contextlib.contextmanager
def running_statistics() -> Iterator[None]:
  """Within it, BatchNorm uses its running statistics, in training as well.

  They do not change, and scale and bias have gradients: mmdetection's
  `norm_eval`. Flax's own BatchNorm is included.
  """

  def call(next_fn, args, kwargs, context):
    if context.method_name == "__call__":
      if isinstance(context.module, BatchNorm):
        kwargs = {**kwargs, "train": False}
      elif isinstance(context.module, nn.BatchNorm):
        args, kwargs = args[:1], {**kwargs, "use_running_average": True}
    return next_fn(*args, **kwargs)

  with nn.intercept_methods(call):
    yield


class NoNorm(_Norm):
  """Returns x: the ablation without a norm."""

  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    return x


NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch_norm": BatchNorm,
    "group_norm": GroupNorm,
    "layer_norm": LayerNorm,
    "none": NoNorm,
}
