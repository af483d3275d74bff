"""MLP-Mixer (arXiv 2105.01601), and the base that it shares with ResMLP."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.models import layers, norms, settings
from metaformer_jax.ops import activations


def over_patches(fn: Callable[[jax.Array], jax.Array],
                 x: jax.Array) -> jax.Array:
  """Applies a function of the last axis to the patches of x [B, N, C]."""
  return fn(x.swapaxes(1, 2)).swapaxes(1, 2)


class PatchMlp(settings.OneStage, layers.Features, nn.Module):
  """Patches, blocks that mix them, norm, mean over the patches, head.

  The blocks have matrices over all patches, so that a model only works at the
  image size that it was initialised with. A sub-class sets `stem`, `blocks`,
  `final_norm` and, if num_classes is not 0, `classifier`.
  """

  num_classes: int = 1000
  dtype: DTypeLike | None = None

  def _n_patches(self, block) -> int:
    """The number of patches that a block's parameters are for."""
    raise NotImplementedError

  def _check_patches(self, height, width, mask):
    if mask is not None:
      raise ValueError("matrices over all patches cannot ignore padding; "
                       "give images of the model's own size and no mask")
    if self.is_initializing():
      return
    n = self._n_patches(self.get_variable("params", "block1"))
    if n != height * width:
      raise ValueError(
          f"matrices over {n} patches cannot mix {height} x {width}; resize "
          "the images to the size that the model was initialised with")

  def features(self, x: jax.Array, *, mask: None = None,
               train: bool = False) -> dict[str, jax.Array]:
    """Returns the patches after the last block, before the final norm.

    Args:
      x: normalised images [B, H, W, 3], all of one size.
      mask: must be None, as padding cannot be ignored.
      train: whether dropout and drop path are on.

    Returns:
      {"stage4": [B, H/patch_size, W/patch_size, dim]}.

    Raises:
      ValueError: images of another size, or a mask.
    """
    layers.check_images(self, x, "patch_embed")
    x = self.stem(x)
    b, h, w, dim = x.shape
    self._check_patches(h, w, mask)
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
  """Dense, GELU, Dense along the last axis, with Flax's initial values."""

  hidden_dim: int
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array):
    y = layers.Dense(self.hidden_dim, dtype=self.dtype, name="fc1")(x)
    return layers.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(
        activations.gelu(y))


class MixerBlock(nn.Module):
  """Y = X + MLP(Norm(X)^T)^T; Z = Y + MLP(Norm(Y)): eq. 1; [B, N, C].

  Attributes:
    token_dim, channel_dim: hidden dims of the MLPs over patches and channels.
  """

  token_dim: int
  channel_dim: int
  norm_eps: float
  drop_path_rate: float
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    norm1, norm2 = (
        norms.LayerNorm(self.norm_eps, dtype=self.dtype, name=name)
        for name in ("norm1", "norm2"))
    mlp_tokens = functools.partial(
        over_patches, MlpBlock(self.token_dim, dtype=self.dtype,
                               name="mlp_tokens"))
    mlp_channels = MlpBlock(self.channel_dim, dtype=self.dtype,
                            name="mlp_channels")
    drop_path1, drop_path2 = layers.drop_paths(self.drop_path_rate, train)

    x = x + drop_path1(mlp_tokens(norm1(x)))
    return x + drop_path2(mlp_channels(norm2(x)))


class MlpMixer(settings.MlpMixer, PatchMlp):
  """MLP-Mixer; see `PatchMlp`. `settings.MlpMixer` has the hyper-parameters.

  Its initial values are the paper's (github.com/google-research/
  vision_transformer, models_mixer.py): Flax's own, and zeros in the head. The
  GELU is exact as in timm; the paper's code has the tanh approximation.

  Attributes:
    mlp_ratio: hidden channels of the MLPs over patches and over channels, both
      in units of `dim`.
    drop_path_rate: of the last block; linear from 0 at the first.
    num_classes: outputs of the head; 0 for the pooled features.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  def setup(self):
    token_dim, channel_dim = (int(r * self.dim) for r in self.mlp_ratio)
    self.stem = layers.patch_embed(
        self.dim, self.patch_size, dtype=self.dtype)
    self.blocks = [
        MixerBlock(token_dim, channel_dim, self.norm_eps, rate,
                   dtype=self.dtype, name=f"block{i}")
        for i, rate in enumerate(
            np.linspace(0, self.drop_path_rate, self.depth).tolist(), 1)]
    self.final_norm = norms.LayerNorm(self.norm_eps, dtype=self.dtype,
                                      name="norm")
    if self.num_classes:
      self.classifier = layers.Dense(
          self.num_classes, dtype=self.dtype,
          kernel_init=nn.initializers.zeros, name="head")

  def _n_patches(self, block) -> int:
    return block["mlp_tokens"]["fc1"]["kernel"].shape[0]
