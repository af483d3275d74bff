"""Small segmenters, and variables and images for them."""

import types

import head_cases
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import metaformer_jax
from metaformer_jax.heads import segmenter

# Of the published models: settings of a family, and the norm of its outputs.
PUBLISHED = {"poolformer": ({}, "group_norm"),
             "resnet": ({"stem": "3x3"}, None),
             "pvt": ({"class_token": False}, None)}
# A small model of each family.
SMALL = {
    "poolformer_s12": {"dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1)},
    "caformer_s18": {"dims": (32, 32, 32, 32), "depths": (1, 1, 1, 1)},
    "metaformer_ppaa_s12_224": {"dims": (32, 32, 32, 32),
                                "depths": (1, 1, 1, 1)},
    "resnet18": {"widths": (8, 12, 16, 20)},
    "pvt_tiny": {"dims": (8, 12, 16, 24), "n_heads": (1, 2, 2, 3)},
    "vit_base_patch16_224": {"dim": 24, "depth": 1, "n_heads": 2},
    "mixer_b16_224": {"dim": 24, "depth": 1},
    "resmlp_12_224": {"dim": 24, "depth": 1},
}


def section(**overrides):
  """What `segmenter.create` reads of the task's section."""
  return types.SimpleNamespace(**{
      "head": "semantic_fpn", "num_classes": 5, "fpn_dim": 12, "head_dim": 8,
      "head_drop_rate": 0.0, "pool_sizes": (1, 2, 3, 6),
      "auxiliary_weight": 0.0, "auxiliary_dim": 8, **overrides})


def shapes_of(model, size=64):
  """Shapes of the variables."""
  return jax.eval_shape(model.init, jax.random.key(0),
                        jnp.zeros((1, size, size, 3)))


def perturbed(model, size=64):
  """Variables away from 0 and 1; variances stay positive."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == "var":
      return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
    fan_in = max(np.prod(leaf.shape[:-1], dtype=int), 10)
    return ((path[-1].key == "scale")
            + fan_in**-0.5 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model, size))


def images(n, height, width):
  """Noise [n, height, width, 3]."""
  return np.random.default_rng(1).standard_normal(
      (n, height, width, 3)).astype(np.float32)


def on_canvas(x, height, width):
  """Images at the top left of canvases of other values, and their mask."""
  canvas = np.full((len(x), height, width, 3), 1e3, np.float32)
  canvas[:, :x.shape[1], :x.shape[2]] = x
  mask = np.zeros(canvas.shape[:3], bool)
  mask[:, :x.shape[1], :x.shape[2]] = True
  return canvas, mask


class Own(nn.Module):
  """A user's backbone: features, and nothing else."""

  @nn.compact
  def features(self, x, mask=None, train=False):
    found = {}
    for i, stride in enumerate((4, 2, 2), 1):
      if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
      n = 2 * (stride // 2) + 1
      x = nn.Conv(8, (n, n), (stride, stride), [(n // 2, n // 2)] * 2,
                  name=f"conv{i}")(x)
      if mask is not None:
        mask = mask[:, ::stride, ::stride]
      found[f"stage{i}"] = x
    return found


def build(case):
  """The model of a case, its family, and its variables' shapes."""
  cases = head_cases
  backbone = metaformer_jax.create_model(case.model, num_classes=0,
                                         **case.overrides)
  model = segmenter.create(backbone, section(
      head=case.head, num_classes=cases.NUM_CLASSES, fpn_dim=cases.FPN_DIM,
      head_dim=cases.HEAD_DIMS[case.head], auxiliary_dim=cases.AUXILIARY_DIM,
      auxiliary_weight=cases.AUXILIARY_WEIGHT * (case.head == "upernet")),
      feature_norm=case.feature_norm)
  family = f"{case.head}/{metaformer_jax.get_spec(case.model).family}"
  return model, family, shapes_of(model, case.image_size)
