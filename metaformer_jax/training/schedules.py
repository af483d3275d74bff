"""Learning rates as functions of the step.

The curves are timm's (timm.scheduler; for "step" its StepLRScheduler). Warm-up
is not a prefix: the curve's time runs from the start of the run, so that it is
a little below its peak when the warm-up ends.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metaformer_jax.config.schema import Experiment, Optim

Schedule = Callable[[jax.Array], jax.Array]


def create(cfg: Experiment, total_steps: int,
           steps_per_epoch: float) -> Schedule:
  """The experiment's learning rate.

  Args:
    cfg: the experiment.
    total_steps: of the run, cool-down included.
    steps_per_epoch: need not be an integer.

  Returns:
    A function of the number of steps taken. If `optim.schedule_per` is "epoch",
    the rate is constant until the next epoch's first step, as in timm's
    training script; its values are computed in float64.
  """
  optim, train = cfg.optim, cfg.train
  peak = optim.base_lr * train.batch_size / 1024
  if optim.schedule_per == "step":
    length = total_steps
    if train.steps is None:
      length -= round(optim.cooldown_epochs * steps_per_epoch)
    return curve(optim, peak, max(length, 1), steps_per_epoch)
  epochs = train.epochs if train.steps is None else (
      total_steps / steps_per_epoch)
  rates, starts = table(optim, peak, epochs, total_steps, steps_per_epoch)

  def schedule(step):
    epoch = jnp.searchsorted(starts, jnp.asarray(step), side="right") - 1
    return jnp.asarray(rates, jnp.float32)[epoch]

  return schedule


def table(optim: Optim, peak: float, epochs: float, total_steps: int,
          steps_per_epoch: float) -> tuple[np.ndarray, np.ndarray]:
  """The rate of each epoch of the run, float64, and each epoch's first step."""
  n_epochs = max(1, math.ceil(round(total_steps / steps_per_epoch, 6)))
  rates = curve(optim, peak, epochs, 1, np)(np.arange(n_epochs))
  starts = np.ceil(np.round(np.arange(n_epochs) * steps_per_epoch, 6))
  return rates, starts.astype(np.int32)


def curve(optim: Optim, peak: float, length: float, per_epoch: float,
          xp=jnp) -> Schedule:
  """The rate as a function of t.

  Args:
    optim: kind of the curve, and its constants.
    peak: the highest rate.
    length: the value of t at which "cosine" and "poly" reach their end.
    per_epoch: increase of t per epoch.
    xp: jax.numpy for float32, numpy for float64.
  """
  low = optim.min_lr
  warmup = round(optim.warmup_epochs * per_epoch)
  milestones = optim.step_epochs if optim.schedule == "step" else ()

  def schedule(t):
    t = xp.asarray(t, float)
    progress = xp.clip(t / length, 0, 1)
    if optim.schedule == "cosine":
      rate = low + (peak - low) * 0.5 * (1 + xp.cos(xp.pi * progress))
    elif optim.schedule == "poly":
      # Not 1 - progress, of which little is left at the end in float32.
      rest = xp.clip((length - t) / length, 0, 1)
      rate = low + (peak - low) * rest ** optim.poly_power
    else:
      n_falls = sum(t >= epoch * per_epoch for epoch in milestones)
      rate = peak * optim.step_factor ** n_falls
    rising = optim.warmup_lr + (peak - optim.warmup_lr) * t / max(warmup, 1)
    return xp.where(t < warmup, rising, rate)

  return schedule
