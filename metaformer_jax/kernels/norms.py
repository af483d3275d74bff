"""Norms of a block of images in VMEM, without their scale and bias.

Both classes have the same methods: a kernel asks for a group's pixels, and
gives the gradient of these, from which the norm writes that of its input.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from metaformer_jax.kernels import folding, grid

Array = jax.Array
# The gradient of the normalised values, of the lanes of a group.
Gradient = Callable[[pl.Slice, Array], Array]
# Takes the gradient of the norm's input, of the lanes of a group.
Write = Callable[[pl.Slice, Array], None]


class PerPixel:
  """LayerNorm: statistics over the channels of each pixel."""

  axes = (3,)
  fold = staticmethod(folding.of_rows)

  def __init__(self, fold: folding.Fold, eps: float, x_ref: Any):
    self._fold, self._eps, self._x_ref = fold, eps, x_ref

  @staticmethod
  def scratch(fold: folding.Fold) -> tuple[grid.Array, ...]:
    """What the gradient needs beside x; the last arguments of `__init__`."""
    del fold
    return ()

  def pixels(self, lanes: pl.Slice) -> Array:
    """Normalised x of a group: [pixels, C]."""
    return self._standardized(lanes)[0]

  def _standardized(self, lanes):
    x = folding.split(self._fold, folding.read(self._x_ref, lanes))
    x = x - x.mean(1, keepdims=True)
    inverse = lax.rsqrt((x * x).mean(1, keepdims=True) + self._eps)
    return x * inverse, inverse

  def write_gradient(self, gradient: Gradient, write: Write) -> None:
    """Calls write(lanes, gradient of x [H, n_images, lanes]) for each group.

    Args:
      gradient: (lanes, pixels) -> gradient of the pixels, both [pixels, C].
      write: keeps what it is given.
    """

    def step(i, carry):
      lanes = folding.lanes_of(self._fold, i)
      z, inverse = self._standardized(lanes)
      dz = gradient(lanes, z)
      first, second = (v.mean(1, keepdims=True) for v in (dz, dz * z))
      dx = inverse * (dz - first - z * second)
      write(lanes, folding.join(self._fold, dx))
      return carry

    folding.loop(self._fold, step)


class PerImage:
  """GroupNorm with one group: statistics over all of an image."""

  axes = (1, 2, 3)
  fold = staticmethod(folding.of)

  def __init__(self, fold: folding.Fold, eps: float, x_ref: Any,
               dz_ref: Any = None):
    self._fold, self._x_ref, self._dz_ref = fold, x_ref, dz_ref
    self._n = math.prod(fold.shape[1:])
    self._mean = self._sum(lambda x: x) / self._n
    variance = self._sum(lambda x: jnp.square(x - self._mean)) / self._n
    self._inverse = lax.rsqrt(variance + eps)

  @staticmethod
  def scratch(fold: folding.Fold) -> tuple[grid.Array, ...]:
    return (fold.block(),)

  def _sum(self, of):
    """Sums of a function of x over each image."""

    def add(i, carry):
      lanes = folding.lanes_of(self._fold, i)
      return carry + folding.total(of(folding.read(self._x_ref, lanes)))

    return folding.loop(self._fold, add, folding.zeros(self._fold))

  def pixels(self, lanes: pl.Slice) -> Array:
    return folding.split(self._fold, self.folded(lanes))

  def folded(self, lanes: pl.Slice) -> Array:
    """Normalised x of a group: [H, n_images, lanes]."""
    x = folding.read(self._x_ref, lanes)
    return (x - self._mean) * self._inverse

  def write_gradient(self, gradient: Gradient, write: Write) -> None:

    def folded(lanes, z):
      dz = gradient(lanes, folding.split(self._fold, z))
      return folding.join(self._fold, dz)

    self.write_folded_gradient(folded, write)

  def write_folded_gradient(self, gradient: Gradient, write: Write) -> None:
    """As `write_gradient`, of values [H, n_images, lanes]."""

    def differentiate(i, sums):
      lanes = folding.lanes_of(self._fold, i)
      z = self.folded(lanes)
      dz = self._dz_ref[:, :, lanes] = gradient(lanes, z)
      return sums[0] + folding.total(dz), sums[1] + folding.total(dz * z)

    sums = folding.loop(self._fold, differentiate,
                        (folding.zeros(self._fold),) * 2)
    first, second = (v / self._n for v in sums)

    def finish(i, carry):
      lanes = folding.lanes_of(self._fold, i)
      dz, z = self._dz_ref[:, :, lanes], self.folded(lanes)
      write(lanes, self._inverse * (dz - first - z * second))
      return carry

    folding.loop(self._fold, finish)


NORMS = {"group_norm": PerImage, "layer_norm": PerPixel}
