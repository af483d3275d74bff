"""MLP-Mixer (arXiv 2105.01601), and what it has in common with ResMLP."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from metaformer_jax.models import activations, layers, norms

Dtype = Any


def over_patches(fn: Callable[[jax.Array], jax.Array],
                 x: jax.Array) -> jax.Array:
  """Applies to the patches of x [B, N, C] what is made for channels."""
  return fn(x.swapaxes(1, 2)).swapaxes(1, 2)


class PatchMlp(nn.Module):
  """Patches, blocks that mix them, norm, mean over the patches, head.

  The blocks have matrices over all patches, which tie a model to the size of
  its first image. A sub-class sets `stem`, `blocks`, `final_norm` and, where
  num_classes is not 0, `classifier`.
  """

  patch_size: int
  dim: int
  depth: int
  num_classes: int = 1000
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  def _conv(self, **kwargs) -> nn.Conv:
    p = self.patch_size
    return nn.Conv(self.dim, (p, p), strides=(p, p), padding="VALID",
                   dtype=self.dtype, name="patch_embed", **kwargs)

  def _n_patches(self, block) -> int:
    """Returns the patches that a block's parameters were made for."""
    raise NotImplementedError

  def _check(self, height, width, mask):
    if mask is not None:
      raise ValueError("matrices over all patches cannot leave out padding; "
                       "give images of the model's own size and no mask")
    if self.is_initializing():
      return
    n = self._n_patches(self.get_variable("params", "block1"))
    if n != height * width:
      raise ValueError(
          f"matrices over {n} patches meet {height} x {width}; they are tied "
          "to the image size that they were made for: resize the images to "
          "that")

  def features(self, x: jax.Array, *, mask: None = None,
               train: bool = False) -> dict[str, jax.Array]:
    """Returns the patches after the last block, before the final norm.

    Args:
      x: normalised images [B, H, W, 3] of the size of the first.
      mask: must be None, as nothing can be left out.
      train: whether dropout and drop path are on.

    Returns:
      {"stage4": [B, H/patch_size, W/patch_size, dim]}.

    Raises:
      ValueError: images of another size, or a mask.
    """
    x = self.stem(x)
    b, h, w, dim = x.shape
    self._check(h, w, mask)
    x = x.reshape(b, h * w, dim)
    for block in self.blocks:
      x = block(x, train=train)
    return {"stage4": x.reshape(b, h, w, dim)}

  def __call__(self, x: jax.Array, *, mask: None = None,
               train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] for images as in `features`."""
    x = self.features(x, mask=mask, train=train)["stage4"]
    x = layers.global_average_pool(self.final_norm(x), None)
    return self.classifier(x) if self.num_classes else x


class MlpBlock(nn.Module):
  """Dense, GELU, Dense along the last axis, with Flax's first values."""

  hidden_dim: int
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array):
    y = nn.Dense(self.hidden_dim, dtype=self.dtype, name="fc1")(x)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(
        activations.gelu(y))


class MixerBlock(nn.Module):
  """Y = X + MLP(Norm(X)^T)^T; Z = Y + MLP(Norm(Y)): eq. 1, [B, N, C] -> same.

  Attributes:
    token_dim, channel_dim: hidden dims of the MLPs over patches and channels.
  """

  token_dim: int
  channel_dim: int
  norm_eps: float = 1e-6
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    def norm(i):
      return norms.LayerNorm(self.norm_eps, dtype=self.dtype, name=f"norm{i}")

    def drop_path(i):
      return layers.DropPath(self.drop_path_rate, name=f"drop_path{i}")

    mlp_tokens = MlpBlock(self.token_dim, dtype=self.dtype, name="mlp_tokens")
    mlp_channels = MlpBlock(self.channel_dim, dtype=self.dtype,
                            name="mlp_channels")
    x = x + drop_path(1)(over_patches(mlp_tokens, norm(1)(x)), train=train)
    return x + drop_path(2)(mlp_channels(norm(2)(x)), train=train)


class MlpMixer(PatchMlp):
  """MLP-Mixer; see `PatchMlp`.

  Its first values are the paper's (github.com/google-research/
  vision_transformer, models_mixer.py): Flax's own, and a head of zeros. The
  GELU is exact as in timm; the paper's code has the tanh approximation.

  Attributes:
    patch_size: side of a patch in pixels.
    dim: channels.
    depth: number of blocks.
    mlp_ratio: hidden dims of the MLPs over patches and over channels, both in
      units of `dim`.
    norm_eps: of every LayerNorm.
    num_classes: outputs of the head; 0 for the pooled features.
    drop_path_rate: of the last block; linear from 0 at the first.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  mlp_ratio: tuple[float, float] = (0.5, 4.0)
  norm_eps: float = 1e-6

  def setup(self):
    token_dim, channel_dim = (int(r * self.dim) for r in self.mlp_ratio)
    self.stem = self._conv()
    self.blocks = [
        MixerBlock(token_dim, channel_dim, self.norm_eps, rate,
                   dtype=self.dtype, name=f"block{i}")
        for i, rate in enumerate(
            np.linspace(0, self.drop_path_rate, self.depth).tolist(), 1)]
    self.final_norm = norms.LayerNorm(self.norm_eps, dtype=self.dtype,
                                      name="norm")
    if self.num_classes:
      self.classifier = nn.Dense(
          self.num_classes, dtype=self.dtype,
          kernel_init=nn.initializers.zeros, name="head")

  def _n_patches(self, block) -> int:
    return block["mlp_tokens"]["fc1"]["kernel"].shape[0]
