"""Faster and Mask R-CNN (arXiv 1506.01497, 1703.06870), as mmdetection's.

Initial values are those of dense_heads/rpn_head.py and, in roi_heads,
convfc_bbox_head.py and fcn_mask_head.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.heads import convs, features, fpn
from metaformer_jax.models import layers, resnet
from metaformer_jax.ops import resize

# Height and width of the features of a box, for its class and for its mask.
BOX_SIZE, MASK_SIZE = 7, 14

_XAVIER_NORMAL = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


class RPN(nn.Module):
  """A 3x3 convolution and ReLU, then objectness and box of each anchor.

  maps, masks -> by level, in float32: logits [B, h w A], and the boxes relative
  to the anchors, [B, h w A, 4]; both undefined in the padding. Anchors are in
  the order of `ops.anchors.grid`.

  Attributes:
    n_anchors: A, of each place.
    dim: channels between.
  """

  n_anchors: int = 3
  dim: int = 256
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array],
               masks: Sequence[jax.Array | None],
               ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    init = nn.initializers.normal(0.01)
    hidden = convs.conv(self.dim, 3, kernel_init=init, dtype=self.dtype,
                        name="conv")
    class_out, box_out = (
        layers.Dense(self.n_anchors * n, kernel_init=init, dtype=jnp.float32,
                     name=name)
        for n, name in ((1, "class_out"), (4, "box_out")))
    logits, deltas = [], []
    for x, mask in zip(maps, masks):
      x = nn.relu(hidden(layers.apply_mask(x, mask)))
      logits.append(class_out(x).reshape(len(x), -1))
      deltas.append(box_out(x).reshape(len(x), -1, 4))
    return tuple(logits), tuple(deltas)


class BoxHead(nn.Module):
  """Two layers with ReLU, then the classes and the box of each class.

  [..., 7, 7, C] -> logits [..., num_classes + 1], of which the last is the
  background's, and deltas [..., num_classes, 4]; in float32.

  Attributes:
    dim: channels of the two layers.
  """

  num_classes: int
  dim: int = 1024
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.reshape(*x.shape[:-3], -1)
    for name in ("fc1", "fc2"):
      x = nn.relu(layers.Dense(self.dim, kernel_init=_XAVIER_NORMAL,
                               dtype=self.dtype, name=name)(x))
    logits = layers.Dense(
        self.num_classes + 1, kernel_init=nn.initializers.normal(0.01),
        dtype=jnp.float32, name="class_out")(x)
    deltas = layers.Dense(
        self.num_classes * 4, kernel_init=nn.initializers.normal(0.001),
        dtype=jnp.float32, name="box_out")(x)
    return logits, deltas.reshape(*x.shape[:-1], self.num_classes, 4)


class MaskHead(nn.Module):
  """3x3 convolutions, one that doubles height and width, all with ReLU.

  [..., 14, 14, C] -> logits of each class, float32 [..., 28, 28, num_classes].

  Attributes:
    dim: channels of all but the last layer.
    depth: 3x3 convolutions.
  """

  num_classes: int
  dim: int = 256
  depth: int = 4
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = resnet.kaiming_fan_out
    for i in range(1, self.depth + 1):
      x = nn.relu(convs.conv(self.dim, 3, kernel_init=init, dtype=self.dtype,
                             name=f"conv{i}")(x))
    x = nn.relu(Deconv(self.dim, dtype=self.dtype, name="deconv")(x))
    return layers.Dense(self.num_classes, kernel_init=init, dtype=jnp.float32,
                        name="mask_out")(x)


class Deconv(nn.Module):
  """A transposed convolution with kernel and stride 2, as one product.

  [..., h, w, C] -> [..., 2 h, 2 w, dim]. The kernel is [2, 2, dim, C],
  PyTorch's with its axes as of `conv`. On a CPU, the gradient of the kernel
  takes a twentieth of `nn.ConvTranspose`'s time.
  """

  dim: int
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", resnet.kaiming_fan_out,
                        (2, 2, self.dim, x.shape[-1]))
    bias = self.param("bias", nn.initializers.zeros, (self.dim,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = jnp.einsum("...hwc,ijdc->...hiwjd", x, kernel)
    y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
    *batch, height, _, width, _, _ = y.shape
    return y.reshape(*batch, 2 * height, 2 * width, self.dim)


class RCNN(nn.Module):
  """Proposals, and the classes, boxes and masks of what is at them.

  Between `extract` and the other methods, the task chooses proposals and cuts
  their features out of the maps, which needs no parameters.

  Attributes:
    backbone: any model with `features` (`docs/design.md`, models). Its outputs
      are used at strides of 4 to 32, as in `detector.Detector`.
    pyramid: without extra levels; here the last one follows, which is every
      other place of the one before.
    rpn: of all levels.
    box_head, mask_head: of features of boxes; mask_head None for Faster R-CNN.
    feature_norm, frozen_batch_norm: as of `detector.Detector`.
  """

  strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32, 64)

  backbone: nn.Module
  pyramid: fpn.Pyramid
  rpn: RPN
  box_head: BoxHead
  mask_head: MaskHead | None = None
  feature_norm: Callable[..., nn.Module] | None = None
  frozen_batch_norm: bool = False

  def __call__(self, images: jax.Array, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, Any]:
    """As `extract`; initialises all parts."""
    found = self.extract(images, mask, train)
    if self.is_initializing():
      dim = found["maps"][0].shape[-1]
      self.boxes(jnp.zeros((1, 1, BOX_SIZE, BOX_SIZE, dim)))
      if self.mask_head:
        self.masks(jnp.zeros((1, 1, MASK_SIZE, MASK_SIZE, dim)))
    return found

  @nn.compact
  def extract(self, images: jax.Array, mask: jax.Array | None = None,
              train: bool = False) -> dict[str, Any]:
    """Feature maps, and objectness and boxes of all anchors.

    Args:
      images, mask, train: as of `detector.Detector`.

    Returns:
      By level: "maps": [B, h, w, dim]; "masks": bool [B, h, w], their valid
      parts, or None; "logits": float32 [B, n], of the n anchors; "deltas":
      float32 [B, n, 4], the boxes relative to the anchors; "mask": bool [B, n],
      the anchors at places inside the image, or None. And "sizes": int32
      [B, 5, 2], height and width of the valid part of each map. Maps, logits
      and deltas are undefined where the masks are false.
    """
    levels = features.prepared(
        self.backbone, images, mask, train, strides=self.strides[:-1],
        norm=self.feature_norm, frozen_batch_norm=self.frozen_batch_norm)
    maps, masks = self.pyramid(*([getattr(level, key) for level in levels]
                                 for key in ("map", "mask")))
    maps.append(maps[-1][:, ::2, ::2])
    masks.append(None if mask is None else masks[-1][:, ::2, ::2])
    logits, deltas = self.rpn(maps, masks)
    found = {"maps": tuple(maps), "logits": logits, "deltas": deltas}
    if mask is None:
      sizes = jnp.array([x.shape[1:3] for x in maps], jnp.int32)
      sizes = jnp.broadcast_to(sizes, (len(images), *sizes.shape))
      return {**found, "masks": None, "sizes": sizes, "mask": None}
    return {**found, "masks": tuple(masks),
            "sizes": jnp.stack([resize.sizes(m) for m in masks], 1),
            "mask": features.of_anchors(masks, self.rpn.n_anchors)}

  def boxes(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Classes and boxes of [B, R, 7, 7, dim], as `BoxHead`."""
    return self.box_head(x)

  def masks(self, x: jax.Array) -> jax.Array:
    """Masks of [B, R, 14, 14, dim], as `MaskHead`."""
    return self.mask_head(x)
