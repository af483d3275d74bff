"""What tasks with a backbone inside a larger model have in common.

The functions take an experiment whose task section has `feature_norm`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from metaformer_jax import imports
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry, settings
from metaformer_jax.ops import images, resize
from metaformer_jax.tasks import base


def backbone(cfg: Experiment, num_classes: int = 0,
             **changed: Any) -> nn.Module:
  """The network of the model section, by default without a head.

  Args:
    cfg: the experiment.
    num_classes: outputs of its head.
    **changed: hyper-parameters that differ from the section's.
  """
  return registry.create_model(
      cfg.model.name, num_classes=num_classes, dtype=jnp.dtype(cfg.model.dtype),
      compile=cfg.compile, **cfg.model.overrides() | changed)


def pretrained(cfg: Experiment, size: tuple[int, int]) -> base.Backbone:
  """The backbone as warm starts find it; `size` is that of the model's images.
  """
  name = cfg.model.name
  family = None if imports.is_path(name) else registry.get_spec(name).family
  # Classifiers have the class token that dense tasks leave out.
  token = {"class_token": True} if hasattr(
      _settings(cfg), "class_token") else {}
  return base.Backbone(family, "backbone", init_size(cfg, size),
                       backbone(cfg, 1000, **token))


def feature_norm(cfg: Experiment) -> str:
  """The norm of the backbone's outputs: the section's, or the model's."""
  if cfg.task.feature_norm is not None:
    return cfg.task.feature_norm
  match _settings(cfg):
    case settings.MetaFormer(norm=norm):
      return norm
    case settings.OneStage():
      return "layer_norm"
  return "none"


def init_size(cfg: Experiment, size: tuple[int, int]) -> tuple[int, int]:
  """Height and width of the images that the model is initialised with.

  Position embeddings have the size of the published classifier's, and are
  resized to other images, as in the official code of PVT. Other models are
  initialised with images of `size`.
  """
  match _settings(cfg):
    case (settings.PyramidVisionTransformer() | settings.VisionTransformer()):
      embedded = True
    case settings.MetaFormer(position_embeddings=stages):
      embedded = bool(stages)
    case _:
      embedded = False
  if embedded:
    side = registry.get_spec(cfg.model.name).input_size
    return side, side
  return size


def init_inputs(cfg: Experiment,
                size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
  """Images and their mask, which the model is initialised with."""
  size = init_size(cfg, size)
  return jnp.zeros((1, *size, 3)), jnp.ones((1, *size), bool)


def normalized(cfg: Experiment, image: jax.Array,
               sizes: jax.Array) -> jax.Array:
  """Normalised images, zero in the padding.

  Args:
    cfg: its data section has mean and standard deviation.
    image: uint8 [B, H, W, 3], which begins at the top left.
    sizes: [B, 2], its height and width.
  """
  mask = resize.mask(sizes, *image.shape[1:3])
  return jnp.where(mask[..., None],
                   images.normalize(image, cfg.data.mean, cfg.data.std), 0)


def _settings(cfg: Experiment) -> settings.Family | None:
  """The hyper-parameters of the backbone; None if it is the user's own."""
  if imports.is_path(cfg.model.name):
    return None
  return registry.get_spec(cfg.model.name).override(**cfg.model.overrides())
