"""The optimizer of an experiment, as timm's factory makes it.

The algorithms are those of `torch.optim`, and timm 0.6.11's LAMB, with which
the published MetaFormer baselines were trained, built from optax's parts.
"""

import bisect
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.runtime import sharding
from metaformer_jax.training import backbone, freeze, schedules

# What `no_weight_decay` lists in timm and the official repositories: ViT's, at
# the top level. Position embeddings of the hybrids and of PVT do decay.
_EXEMPT = re.compile(r"pos_embed|(.*/)?(cls_token|dist_token)")

_POSITION = re.compile(r"(?:stage(\d+)/)?(?:block(\d+)/)?")
# What precedes all stages and blocks.
_STEM = re.compile(r"(stem|patch_embed|pos_embed|cls_token|dist_token)\b")


def create(cfg: schema.Experiment, total_steps: int, steps_per_epoch: float,
           path: str | None = "", params: Any = None,
           frozen: freeze.Frozen = freeze.NOTHING,
           ) -> tuple[optax.GradientTransformation, schedules.Schedule]:
  """Returns the optimizer and its learning rate.

  The gradient is clipped to `clip_norm`, turned into an update by the
  algorithm, then scaled by `layer_decay` and by the learning rate.

  Args:
    cfg: the experiment.
    total_steps: of the run.
    steps_per_epoch: batches per epoch.
    path: of the backbone in the parameters (`base.Backbone`); None if there is
      none.
    params: all parameters, or their shapes; by default those that it updates.
    frozen: those of `params` that it does not get.

  Raises:
    ConfigError: as `layer_numbers`, if `params` are given.
  """
  optim = cfg.optim
  schedule = schedules.create(cfg, total_steps, steps_per_epoch)
  parts = []
  clip_norm = optim.clip_norm
  if clip_norm is None and optim.name == "lamb":
    clip_norm = 1.0
  if clip_norm is not None:
    parts.append(optax.clip_by_global_norm(clip_norm))
  algorithm = {"adamw": adamw, "lamb": lamb, "sgd": sgd}[optim.name]
  mask = None if optim.decay_all else functools.partial(decay_mask, path=path)
  parts += algorithm(optim, mask)
  if optim.layer_decay < 1:
    parts.append(scale_by_layer(optim.layer_decay, path, params, frozen))
  parts.append(optax.scale_by_learning_rate(schedule))
  return optax.chain(*parts), schedule


def adamw(optim: schema.Optim, mask) -> list[optax.GradientTransformation]:
  """Adam with decoupled weight decay (arXiv 1711.05101; torch.optim.AdamW).

  `mask` is a function of the parameters that is true for those that decay;
  None if all do.
  """
  return [
      optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps or 1e-8),
      optax.add_decayed_weights(optim.weight_decay, mask)]


def lamb(optim: schema.Optim, mask) -> list[optax.GradientTransformation]:
  """LAMB (arXiv 1904.00962) with bias correction, as timm.optim.Lamb.

  The update, weight decay included, is scaled to the norm of its parameter,
  unless either norm is 0. As in timm, only decayed parameters are scaled so.
  """
  parts = [
      optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps or 1e-6),
      optax.add_decayed_weights(optim.weight_decay, mask)]
  if optim.weight_decay:
    scaled = optax.scale_by_trust_ratio()
    parts.append(scaled if mask is None else optax.masked(scaled, mask))
  return parts


def sgd(optim: schema.Optim, mask) -> list[optax.GradientTransformation]:
  """SGD with momentum and coupled weight decay, as torch.optim.SGD."""
  return [
      optax.add_decayed_weights(optim.weight_decay, mask),
      optax.trace(optim.momentum, optim.nesterov)]


def _names(params, path: str | None) -> Any:
  """In each parameter's place its name in the backbone, "" if outside."""

  def name(keys, _):
    full = sharding.path_name(keys)
    return ("" if path is None else backbone.relative_name(full, path)) or ""

  return jax.tree_util.tree_map_with_path(name, params)


def decay_mask(params, path: str | None = "") -> Any:
  """True for decayed parameters, as timm's `param_groups_weight_decay`.

  Vectors and scalars (biases, norms, scales) are exempt, and so are ViT's
  position embedding, class and distillation tokens in the backbone at `path`.
  """
  return jax.tree.map(
      lambda name, p: p.ndim > 1 and not _EXEMPT.fullmatch(name),
      _names(params, path), params)


def layer_numbers(params, path: str | None = "") -> Any:
  """The layer of each parameter, counted from the stem's, 0.

  Each block of the backbone at `path` is a layer. What lies between two blocks,
  such as a downsampling, belongs to the first one, the final norm to the last
  one. Everything else, heads, is one layer after them. timm's `group_matcher`s
  do the same (PoolFormer's, in timm 0.6.11).

  Raises:
    ConfigError: there are no blocks.
  """
  def position(name):
    return tuple(int(n or 0) for n in _POSITION.match(name).groups())

  names = _names(params, path)
  blocks = sorted({p for p in map(position, jax.tree.leaves(names)) if p[1]})
  if not blocks:
    raise errors.ConfigError(
        "config.optim.layer_decay: is below 1, but the model has no blocks "
        f"{'and no backbone' if path is None else f'in {path!r}'}; set it to 1")

  def number(name):
    if any(position(name)) or _STEM.match(name):
      return bisect.bisect_right(blocks, position(name))
    return len(blocks) + (not name.startswith("norm/"))

  return jax.tree.map(number, names)


def scale_by_layer(decay: float, path: str | None = "", params: Any = None,
                   frozen: freeze.Frozen = freeze.NOTHING,
                   ) -> optax.GradientTransformation:
  """Scales updates by decay^n, where n is the number of later layers.

  Equal to timm's `param_groups_layer_decay`, which scales the learning rate.
  The arguments are as for `create`.
  """
  def scales(params):
    numbers = layer_numbers(params, path)
    last = max(jax.tree.leaves(numbers))
    return frozen.split(jax.tree.map(lambda n: decay ** (last - n), numbers))[0]

  known = None if params is None else scales(params)

  def update(updates, params=None):
    del params
    return jax.tree.map(jnp.multiply, updates, scales(updates) if known is None
                        else known)

  return optax.stateless(update)
