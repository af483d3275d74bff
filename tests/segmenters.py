"""Small segmenters, and variables for them."""

import types

import head_cases
import jax
import jax.numpy as jnp
import numpy as np

import metaformer_jax
from metaformer_jax.heads import segmenter


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
