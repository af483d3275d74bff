"""Class activation maps: which places of a layer support a class.

`METHODS` are functions of a layer's features and of the gradients of a class's
logit with respect to them, as pytorch-grad-cam 1.5.7 computes them; `maps`
takes both from a model. For eigen-CAM see `eigen_cam`: its sign is not that
package's, where it is arbitrary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from metaformer_jax import errors
from metaformer_jax.models import compiling, mlp_mixer, pvt, vit
from metaformer_jax.ops import resize


def grad_cam(features: jax.Array, gradients: jax.Array) -> jax.Array:
  """Grad-CAM (arXiv 1610.02391, eq. 1 and 2).

  alpha_k = mean over the places of dy/dA_k;  map = relu(sum_k alpha_k A_k).

  Args:
    features: A, float32 [B, h, w, K].
    gradients: dy/dA of a class's logit y, likewise.

  Returns:
    float32 [B, h, w], not negative.
  """
  return _weighted(features, gradients.mean((1, 2), keepdims=True))


def grad_cam_plus_plus(features: jax.Array, gradients: jax.Array) -> jax.Array:
  """Grad-CAM++ (arXiv 1710.11063, eq. 5 and 19); as `grad_cam`.

  a_k = g_k^2 / (2 g_k^2 + g_k^3 sum(A_k)), for the gradient g_k at each place,
  and alpha_k = sum over the places of a_k relu(g_k).
  """
  square = gradients**2
  total = features.sum((1, 2), keepdims=True)
  part = square / (2 * square + total * square * gradients + 1e-6)
  part = jnp.where(gradients != 0, part, 0)
  return _weighted(features, (nn.relu(gradients) * part).sum(
      (1, 2), keepdims=True))


def layer_cam(features: jax.Array, gradients: jax.Array) -> jax.Array:
  """LayerCAM: relu(sum_k relu(g_k) A_k), each place with its own gradient.

  Jiang et al., IEEE Transactions on Image Processing 30, 2021, eq. 6 and 7; as
  `grad_cam`.
  """
  return _weighted(features, nn.relu(gradients))


def _weighted(features: jax.Array, weights: jax.Array) -> jax.Array:
  return nn.relu((features * weights).sum(-1))


def eigen_cam(features: jax.Array,
              gradients: jax.Array | None = None) -> jax.Array:
  """Eigen-CAM (arXiv 2008.00299): the first principal component of the places.

  No class has a part in it. The channels' means over the places are subtracted,
  as in pytorch-grad-cam; the paper does not. The component's sign has no
  meaning. There it is what LAPACK returns; here, the value furthest from 0 is
  positive, the first one if there are two (Seg-Eigen-CAM, doi
  10.3390/app15137562, eq. 13). What is negative then is 0. Features that are
  the same everywhere give 0.

  Args:
    features: float32 [B, h, w, K].
    gradients: not used.

  Returns:
    float32 [B, h, w], not negative.
  """
  del gradients
  b, h, w, dim = features.shape
  x = features.reshape(b, h * w, dim)
  x = x - x.mean(1, keepdims=True)
  _, _, axes = jnp.linalg.svd(x, full_matrices=False)
  found = jnp.einsum("bnk,bk->bn", x, axes[:, 0],
                     precision=lax.Precision.HIGHEST)
  peak = jnp.take_along_axis(found, abs(found).argmax(1)[:, None], 1)
  return nn.relu(jnp.where(peak < 0, -found, found)).reshape(b, h, w)


# By the names that the official PoolFormer's misc/cam_image.py has for them.
METHODS = {"gradcam": grad_cam, "gradcam++": grad_cam_plus_plus,
           "layercam": layer_cam, "eigencam": eigen_cam}


def scaled(maps: jax.Array, height: int, width: int) -> jax.Array:
  """Maps as pytorch-grad-cam returns them: of the image's size, from 0 to 1.

  Each is scaled to a least value of 0 and a largest of 1, resized bilinearly,
  and scaled again. One that is the same everywhere becomes 0.

  Args:
    maps: [B, h, w].
    height, width: of the image.

  Returns:
    float32 [B, height, width].
  """

  def unit(x):
    x = x - x.min((1, 2), keepdims=True)
    return x / (1e-7 + x.max((1, 2), keepdims=True))

  rows, columns = (resize.linear_weights(old, new) for old, new in
                   zip(maps.shape[1:], (height, width)))
  return unit(jnp.einsum("yh,bhw,xw->byx", rows, unit(maps), columns,
                         precision=lax.Precision.HIGHEST))


class Layer(NamedTuple):
  """A layer whose output has places.

  Attributes:
    path: of its module.
    shape: (B, h, w, K) of its output without class tokens.
  """

  path: tuple[str, ...]
  shape: tuple[int, int, int, int]


def maps(model: nn.Module, variables, images: jax.Array,
         classes: jax.Array | None = None, *, layer: str | None = None,
         method: str = "gradcam") -> jax.Array:
  """Where the features of a layer support a class.

  Args:
    model: of `create_model`, with a head; eigencam needs none.
    variables: as for `model.apply`.
    images: normalised images [B, H, W, C].
    classes: int [B], each below `model.num_classes`: the maps of others would
      be 0; None for those with the largest logits.
    layer: as for `find_layer`.
    method: a name in `METHODS`.

  Returns:
    Maps [B, h, w] of the layer's size, float32, not scaled: 0 where the
    features do not support the class.

  Raises:
    ValueError: the model has no head or no such layer, or there is no such
      method.
  """
  if method not in METHODS:
    raise ValueError(
        f"there is no method {method!r}{errors.did_you_mean(method, METHODS)}")
  if not model.num_classes and method != "eigencam":
    raise ValueError("the model is without a head: it has no classes")
  where = find_layer(model, variables, images, layer)
  run = functools.partial(_logits_and_features, model, variables, images, where)
  zeros = jnp.zeros(where.shape)
  if method == "eigencam":
    return eigen_cam(run(zeros)[1])
  logits, gradient, features = jax.vjp(run, zeros, has_aux=True)
  if classes is None:
    classes = logits.argmax(-1)
  (gradients,) = gradient(jax.nn.one_hot(classes, model.num_classes))
  return METHODS[method](features, gradients)


def _logits_and_features(model, variables, images, where: Layer, change):
  """Logits with [B, h, w, K] added to the features; and the features."""
  b, h, w, dim = where.shape
  features = []

  def add(path, x):
    if path != where.path:
      return x
    tokens = x.reshape(b, -1, dim)
    n_prefix = tokens.shape[1] - h * w  # Class tokens come first.
    features.append(tokens[:, n_prefix:].reshape(where.shape))
    tokens = tokens.at[:, n_prefix:].add(
        change.reshape(b, h * w, dim).astype(x.dtype))
    return tokens.reshape(x.shape)

  logits = _apply(model, variables, images, add)
  (found,) = features
  return logits.astype(jnp.float32), found.astype(jnp.float32)


def _apply(model: nn.Module, variables, images: jax.Array,
           change: Callable[[tuple[str, ...], jax.Array], jax.Array]):
  """Logits, where `change` sees and replaces the output of every module.

  It is called with the module's path and the output, or the first of several.
  """
  if hasattr(model, "compile"):  # Scanned blocks would be seen as one.
    model = model.clone(compile=compiling.Compile())

  def changing(next_fn, args, kwargs, context):
    out = next_fn(*args, **kwargs)
    if context.method_name != "__call__":
      return out
    x, *rest = out if isinstance(out, tuple) else (out,)
    x = change(context.module.path, x)
    return (x, *rest) if isinstance(out, tuple) else x

  with nn.intercept_methods(changing):
    return model.apply(variables, images)


def find_layer(model: nn.Module, variables, images: jax.Array,
               name: str | None = None) -> Layer:
  """The layer that a name means.

  Args:
    model, variables, images: as for `maps`.
    name: a name in the model's features, as "stage3"; or the path of a module,
      as "stage3/block2/token_mixer" or "block7". By default the last stage. In
      ViT, DeiT and PVT the class token does not depend on the patches after the
      last attention, so that their last stage has no gradient; it is the input
      of this attention instead: the last block's first norm.

  Raises:
    ValueError: there is no such layer, it is called several times, or its
      output has no places.
  """
  stages = jax.eval_shape(functools.partial(model.apply, method="features"),
                          variables, images)
  outputs = {}

  def note(path, x):
    outputs.setdefault(path, []).append(x)
    return x

  jax.eval_shape(lambda v, x: _apply(model, v, x, note), variables, images)
  name = max(stages) if name is None else name
  path = (_path(model, name, name == max(stages)) if name in stages
          else tuple(name.split("/")))
  known = {"/".join(found): found for found in outputs if found}
  if path not in known.values():
    raise ValueError(f"the model has no layer {name!r}"
                     f"{errors.did_you_mean(name, [*stages, *known])}")
  if len(outputs[path]) > 1:
    raise ValueError(f"the layer {name!r} is called {len(outputs[path])} times "
                     "for an image; name one that is called once")
  shape = getattr(outputs[path][0], "shape", ())
  if len(shape) == 3:  # Tokens of the grid of their stage.
    _, h, w, _ = stages.get(path[0], stages[max(stages)]).shape
    if 0 <= shape[1] - h * w <= 2:
      shape = (shape[0], h, w, shape[2])
  if len(shape) != 4:
    raise ValueError(f"the output of the layer {name!r}, {list(shape)}, has no "
                     "places; name another layer, as a stage or a block")
  return Layer(path, shape)


def _path(model: nn.Module, stage: str, last: bool) -> tuple[str, ...]:
  """Path of the module whose output `maps` takes as a stage's features."""
  if isinstance(model, vit.VisionTransformer):
    return f"block{model.depth}", "norm1"
  if isinstance(model, pvt.PyramidVisionTransformer) and last:
    return stage, f"block{model.depths[-1]}", "norm1"
  if isinstance(model, mlp_mixer.PatchMlp):
    return (f"block{model.depth}",)
  return (stage,)


def features_at(model: nn.Module, variables, images: jax.Array,
                name: str | None = None) -> jax.Array:
  """The output of a layer, without class tokens: [B, h, w, K], float32.

  Of a stage it is what `model.features` returns, also of those models for which
  `maps` takes another layer.

  Args:
    model, variables, images: as for `maps`; a head is not needed.
    name: as for `find_layer`.

  Raises:
    ValueError: as `find_layer`.
  """
  stages = model.apply(variables, images, method="features")
  if name is None or name in stages:
    return stages[name or max(stages)].astype(jnp.float32)
  where = find_layer(model, variables, images, name)
  return _logits_and_features(model, variables, images, where,
                              jnp.zeros(where.shape))[1]
