"""The optimizer of an experiment."""

import jax
import optax

from metaformer_jax.experiment import Experiment
from metaformer_jax.training import schedules


def decay_mask(params):
  """True for what weight decay shrinks: kernels, not vectors or scalars.

  Norms, biases and scales are vectors; timm exempts them by the same rule.
  """
  return jax.tree.map(lambda p: p.ndim > 1, params)


def create(cfg: Experiment, total_steps: int, steps_per_epoch: float,
           ) -> tuple[optax.GradientTransformation, schedules.Schedule]:
  """Returns AdamW, clipped if the config says so, and its learning rate."""
  optim = cfg.optim
  schedule = schedules.warmup_cosine(
      peak=optim.base_lr * cfg.train.batch_size / 1024,
      total_steps=total_steps,
      warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
      warmup_lr=optim.warmup_lr, min_lr=optim.min_lr)
  adamw = optax.adamw(
      schedule, b1=optim.beta1, b2=optim.beta2, eps=optim.eps,
      weight_decay=optim.weight_decay, mask=decay_mask)
  if optim.clip_norm is None:
    return adamw, schedule
  clip = optax.clip_by_global_norm(optim.clip_norm)
  return optax.chain(clip, adamw), schedule
