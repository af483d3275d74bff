"""The optimizer of an experiment: what timm's factory makes of its arguments.

The algorithms are those of `torch.optim` and, LAMB, of timm 0.6.11, with which
the published MetaFormer baselines were trained; optax has their parts.
"""

import bisect
import re
from typing import Any

import jax
import optax

from metaformer_jax.config import schema
from metaformer_jax.runtime import sharding
from metaformer_jax.training import schedules

# What timm and the official repositories name in `no_weight_decay`. Theirs of
# ViT are at the top; the hybrids' and PVT's position embeddings decay.
_EXEMPT = re.compile(r"pos_embed|(.*/)?(cls_token|dist_token)")

_POSITION = re.compile(r"(?:stage(\d+)/)?(?:block(\d+)/)?")
# What comes before any stage or block.
_STEM = re.compile(r"(stem|patch_embed|pos_embed|cls_token|dist_token)\b")


def create(cfg: schema.Experiment, total_steps: int,
           steps_per_epoch: float,
           ) -> tuple[optax.GradientTransformation, schedules.Schedule]:
  """Returns the optimizer and its learning rate.

  In this order: the gradient is clipped to `clip_norm`, made an update by the
  algorithm, scaled by `layer_decay`, and by the learning rate.
  """
  optim = cfg.optim
  schedule = schedules.create(cfg, total_steps, steps_per_epoch)
  parts = []
  clip_norm = optim.clip_norm
  if clip_norm is None and optim.name == "lamb":
    clip_norm = 1.0
  if clip_norm is not None:
    parts.append(optax.clip_by_global_norm(clip_norm))
  parts += {"adamw": adamw, "lamb": lamb, "sgd": sgd}[optim.name](optim)
  if optim.layer_decay < 1:
    parts.append(scale_by_layer(optim.layer_decay))
  parts.append(optax.scale_by_learning_rate(schedule))
  return optax.chain(*parts), schedule


def adamw(optim: schema.Optim) -> list[optax.GradientTransformation]:
  """Adam with decoupled decay (arXiv 1711.05101), as torch.optim.AdamW."""
  return [
      optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps or 1e-8),
      optax.add_decayed_weights(optim.weight_decay, decay_mask)]


def lamb(optim: schema.Optim) -> list[optax.GradientTransformation]:
  """LAMB (arXiv 1904.00962) with bias correction, as timm.optim.Lamb.

  The update, decay included, takes the norm of its parameter; one of the two
  being 0, it stays as it is. timm does so for the decayed parameters only.
  """
  parts = [
      optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps or 1e-6),
      optax.add_decayed_weights(optim.weight_decay, decay_mask)]
  if optim.weight_decay:
    parts.append(optax.masked(optax.scale_by_trust_ratio(), decay_mask))
  return parts


def sgd(optim: schema.Optim) -> list[optax.GradientTransformation]:
  """Momentum, the decay being part of the gradient, as torch.optim.SGD."""
  return [
      optax.add_decayed_weights(optim.weight_decay, decay_mask),
      optax.trace(optim.momentum, optim.nesterov)]


def _names(params) -> Any:
  """The parameters' names, "stage1/block1/norm1/scale", in their places."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: sharding.path_name(path), params)


def decay_mask(params) -> Any:
  """True for what weight decay shrinks: timm's `param_groups_weight_decay`.

  Vectors and scalars are exempt, i.e. biases, norms and scales, and so are
  ViT's position embedding and the class and distillation tokens.
  """
  return jax.tree.map(
      lambda name, p: p.ndim > 1 and not _EXEMPT.fullmatch(name),
      _names(params), params)


def layer_numbers(params) -> Any:
  """The layer of each parameter, counted from 0, the stem.

  Each block is a layer; what comes between two, as the downsampling, belongs to
  the one before, the final norm to the last. The rest, the head, is a layer
  after them. timm's models are grouped so by their `group_matcher`, PoolFormer
  by that of 0.6.11.
  """
  def position(name):
    return tuple(int(n or 0) for n in _POSITION.match(name).groups())

  names = _names(params)
  blocks = sorted({p for p in map(position, jax.tree.leaves(names)) if p[1]})

  def number(name):
    if any(position(name)) or _STEM.match(name):
      return bisect.bisect_right(blocks, position(name))
    return len(blocks) + (not name.startswith("norm/"))

  return jax.tree.map(number, names)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Scales updates by decay^n, n being the number of layers that follow.

  As timm's `param_groups_layer_decay` scales the learning rate.
  """
  def update(updates, params=None):
    del params
    numbers = layer_numbers(updates)
    last = max(jax.tree.leaves(numbers))
    return jax.tree.map(lambda u, n: u * decay ** (last - n), updates, numbers)

  return optax.stateless(update)
