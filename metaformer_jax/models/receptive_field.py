"""The effective receptive field: which pixels an output depends on, and how.

Luo et al., arXiv 1701.04128: the gradient of the central output with respect to
the input, which is far smaller at the border of the theoretical field.
"""

import jax
import numpy as np
from flax import linen as nn

from metaformer_jax.models import activation_maps


def field(model: nn.Module, variables, images: jax.Array,
          layer: str | None = None) -> jax.Array:
  """Mean absolute gradient of a layer's central place, by pixel.

  The gradient is that of the sum over the channels at the place (h // 2,
  w // 2) of the layer's h x w, in evaluation mode.

  Args:
    model: of `create_model`.
    variables: as for `model.apply`.
    images: normalised images [B, H, W, C].
    layer: as for `activation_maps.features_at`.

  Returns:
    float32 [H, W]: the mean over the images of the sum over the C channels of
    the absolute gradient.

  Raises:
    ValueError: as `activation_maps.find_layer`.
  """

  def centre(images):
    x = activation_maps.features_at(model, variables, images, layer)
    return x[:, x.shape[1] // 2, x.shape[2] // 2].sum()

  return abs(jax.grad(centre)(images)).sum(-1).mean(0)


def share(values: np.ndarray, mass: float) -> float:
  """The least share of pixels that together have a part of all mass.

  Args:
    values: of `field`, [H, W].
    mass: the part, from 0 to 1.

  Returns:
    From 0 to 1; 0 if there is no mass.
  """
  largest = np.sort(np.asarray(values, np.float64).ravel())[::-1]
  total = np.cumsum(largest)
  if not total[-1]:
    return 0.0
  # A sum of rounded values may miss the whole by a little.
  n = np.searchsorted(total, mass * total[-1] * (1 - 1e-12)) + 1
  return float(min(n, values.size) / values.size)
