"""Augmentation on the device: mixup, cutmix and random erasing.

Pure functions of a key, of static shapes, on normalised float images
[B, H, W, C]; each computes what timm's function of that name does. As in timm's
script, images are mixed before boxes are erased; unlike there, mixed images are
not rounded to 8 bits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import images as image_ops
from metaformer_jax.ops import platforms

_GROUP = 16  # Examples among which partners are chosen.


def smooth_one_hot(labels: jax.Array, n_classes: int,
                   smoothing: float) -> jax.Array:
  """[B] -> [B, C]: s / C for every class, plus 1 - s for the label."""
  return (jax.nn.one_hot(labels, n_classes) * (1 - smoothing)
          + smoothing / n_classes)


def partners(x: jax.Array) -> jax.Array:
  """The examples to mix those of a batch with: [B, ...] -> [B, ...].

  In timm, they are the batch reversed. Here, they are the examples half of a
  group further, where a group is 16 in a row; the whole batch if it is not
  divisible by 16. The order of a batch is random, so that all pairs are as
  probable as in timm. A device with a multiple of 16 examples has all their
  partners; and repetitions of an image, which come in a row, do not meet.
  """
  size = _GROUP if len(x) % _GROUP == 0 else len(x)
  if size % 2:
    return jnp.roll(x, -(size // 2), axis=0)
  # Halves change places: a CPU computes this in one loop with what follows.
  halves = x.reshape(-1, 2, size // 2, *x.shape[1:])
  return jnp.flip(halves, axis=1).reshape(x.shape)


def blend(x: jax.Array, partners: jax.Array, lam: jax.Array) -> jax.Array:
  """lam * example + (1 - lam) * partner."""
  return lam * x + (1 - lam) * partners


def cutmix_box(height: int, width: int, lam: jax.Array, y: jax.Array,
               x: jax.Array) -> tuple[jax.Array, ...]:
  """The (top, bottom, left, right) of a box about pixel (y, x), clipped.

  Its sides are sqrt(1 - lam) of the image's (arXiv 1905.04899, eq. 2).
  """
  ratio = jnp.sqrt(1 - lam)
  box = []
  for size, centre in ((height, y), (width, x)):
    side = jnp.floor(size * ratio).astype(jnp.int32)
    box += [jnp.clip(centre - side // 2, 0, size),
            jnp.clip(centre + (side + 1) // 2, 0, size)]
  return tuple(box)


def inside(height: int, width: int, box: tuple[jax.Array, ...]) -> jax.Array:
  """bool [..., H, W]: true inside the boxes, of which each side is [...]."""
  top, bottom, left, right = (jnp.asarray(v)[..., None, None] for v in box)
  shape = (1,) * (top.ndim - 2)
  y = jnp.arange(height).reshape(*shape, -1, 1)
  x = jnp.arange(width).reshape(*shape, 1, -1)
  return (top <= y) & (y < bottom) & (left <= x) & (x < right)


def cutmix_weights(height: int, width: int, box: tuple[jax.Array, ...],
                   ) -> tuple[jax.Array, jax.Array]:
  """Of the example: each pixel's share [H, W], 0 inside the box, and lambda."""
  top, bottom, left, right = box
  lam = 1 - (bottom - top) * (right - left) / (height * width)
  return jnp.where(inside(height, width, box), 0.0, 1.0), lam


@jax.named_scope("augment")
def mixup_cutmix(rng: jax.Array, examples: tuple[jax.Array, jax.Array],
                 others: tuple[jax.Array, jax.Array], *, mixup_alpha: float,
                 cutmix_alpha: float, prob: float = 1.0,
                 switch_prob: float = 0.5) -> tuple[jax.Array, jax.Array]:
  """Mixes a batch with its partners; one lambda for the whole batch.

  Both methods weigh pixels, so that one pass over the images does either.

  Args:
    rng: a key.
    examples: images, float [B, H, W, C], and targets [B, C], smoothed.
    others: likewise, their `partners`.
    mixup_alpha, cutmix_alpha: lambda is Beta(alpha, alpha); 0: never.
    prob: probability that the batch is mixed.
    switch_prob: probability of cutmix where both are possible.

  Returns:
    Images and targets of the same shapes.
  """
  if not (mixup_alpha or cutmix_alpha) or not prob:
    return examples
  height, width = examples[0].shape[1:3]
  key_do, key_which, key_mix, key_cut, key_y, key_x = jax.random.split(rng, 6)
  if mixup_alpha and cutmix_alpha:
    cut = jax.random.uniform(key_which) < switch_prob
  else:
    cut = jnp.asarray(bool(cutmix_alpha))
  alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
  lam = jax.random.beta(jnp.where(cut, key_cut, key_mix), alpha, alpha)
  shares, kept = cutmix_weights(height, width, cutmix_box(
      height, width, lam, jax.random.randint(key_y, (), 0, height),
      jax.random.randint(key_x, (), 0, width)))
  do = jax.random.uniform(key_do) < prob
  shares, lam = (
      jnp.where(do, jnp.where(cut, by_cutmix, lam), 1.0)
      for by_cutmix in (shares, kept))
  return tuple(blend(x, other, weight) for x, other, weight in zip(
      examples, others, (shares[None, :, :, None], lam)))


def erasing_boxes(rng: jax.Array, n: int, height: int, width: int, *,
                  prob: float, area=(0.02, 1 / 3), least_aspect: float = 0.3,
                  ) -> tuple[jax.Array, ...]:
  """n boxes (top, bottom, left, right), each int [n]; empty with 1 - prob.

  Ten boxes are drawn, of uniform area and log-uniform height/width in
  [least_aspect, 1 / least_aspect]; the first that is smaller than the image in
  both directions is taken, or an empty one if there is none.
  """
  key_do, key_area, key_aspect, key_top, key_left = jax.random.split(rng, 5)
  tries = (n, 10)
  target = height * width * jax.random.uniform(
      key_area, tries, minval=area[0], maxval=area[1])
  limit = -math.log(least_aspect)
  aspect = jnp.exp(jax.random.uniform(
      key_aspect, tries, minval=-limit, maxval=limit))
  h = jnp.round(jnp.sqrt(target * aspect)).astype(jnp.int32)
  w = jnp.round(jnp.sqrt(target / aspect)).astype(jnp.int32)
  fits = (h < height) & (w < width)
  first = fits.argmax(1)[:, None]
  h, w = (jnp.take_along_axis(v, first, 1)[:, 0] for v in (h, w))
  top = jax.random.randint(key_top, (n,), 0, height - h + 1)
  left = jax.random.randint(key_left, (n,), 0, width - w + 1)
  do = (jax.random.uniform(key_do, (n,)) < prob) & fits.any(1)
  return top, top + jnp.where(do, h, 0), left, left + jnp.where(do, w, 0)


@jax.named_scope("augment")
def random_erasing(rng: jax.Array, images: jax.Array, prob: float) -> jax.Array:
  """Fills a box of each image with noise (arXiv 1708.04896; mode pixel)."""
  if not prob:
    return images
  n, height, width, _ = images.shape
  key_box, key_noise = jax.random.split(rng)
  boxes = erasing_boxes(key_box, n, height, width, prob=prob)
  # A CPU draws noise for the images that are erased, others for all at once.
  return platforms.choose(
      jax.vmap(_erase), images, jax.random.split(key_noise, n), boxes,
      cpu=functools.partial(image_ops.one_by_one, _erase))


def _erase(image, key, box):
  height, width, _ = image.shape

  def erase(image):
    noise = jax.random.normal(key, image.shape, image.dtype)
    return jnp.where(inside(height, width, box)[..., None], noise, image)

  top, bottom, _, _ = box
  return lax.cond(bottom > top, erase, lambda image: image, image)
