"""What the user sees of a run: the plan at its start, then its progress."""

import logging
import sys
from collections.abc import Sequence

import jax
from clu import parameter_overview
from tqdm import auto as tqdm

from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import sharding

log = logging.getLogger(__name__)


def plan(cfg: Experiment, abstract_state, mesh, n_train: int, n_eval: int,
         total_steps: int) -> str:
  """The parameter table, and a summary of the run."""
  n_params = sum(x.size for x in jax.tree.leaves(abstract_state.params))
  table = parameter_overview.get_parameter_overview(
      abstract_state.params, include_stats=False)
  train = cfg.train
  device = mesh.devices.flat[0]
  size = cfg.task.input_size
  rows = {
      "model": f"{cfg.model.name}, {n_params:,} parameters, {cfg.model.dtype}",
      "data": f"{cfg.data.source}: {n_train:,} to train, {n_eval:,} to "
              "evaluate" + (f", {size[0]}x{size[1]}" if size else ""),
      "steps": f"{total_steps:,} of {train.batch_size} images"
               + (f" in {train.accumulate} micro-batches"
                  if train.accumulate > 1 else "")
               + f", {total_steps * train.batch_size / n_train:.4g} epochs",
      "devices": f"{mesh.size} x {device.device_kind}, "
                 f"{jax.process_count()} processes, mesh "
                 + " x ".join(f"{k}={v}" for k, v in mesh.shape.items()),
      "state": f"{sharding.n_bytes(abstract_state) / 2**20:,.1f} MiB in all",
      "learning rate": f"{cfg.optim.base_lr * train.batch_size / 1024:.4g} at "
                       "the peak",
  }
  width = max(map(len, rows))
  return "\n".join([table, "", *(
      f"{name:<{width}}  {value}" for name, value in rows.items())])


def measures(result: dict[str, float]) -> str:
  """An evaluation's result on one line."""
  return "  ".join(f"{name} {value:,}" if isinstance(value, int) else
                   f"{name} {value:.4f}" for name, value in result.items())


class Progress:
  """A progress bar on a terminal, lines elsewhere."""

  def __init__(self, first_step: int, total_steps: int, names: Sequence[str],
               enabled: bool):
    """`names` are the task's metrics that are shown."""
    self._total, self._names = total_steps, names
    self._enabled = enabled
    self._bar = tqdm.tqdm(total=total_steps, initial=first_step, unit="step",
                          dynamic_ncols=True,
                          disable=not (enabled and sys.stderr.isatty()))

  def advance(self) -> None:
    self._bar.update()

  def show(self, step: int, metrics: dict[str, float]) -> None:
    """Shows the metrics of a window."""
    if not self._enabled:
      return
    left = (self._total - step) * metrics["step_seconds"]
    parts = [f"epoch {metrics['epoch']:.2f}"]
    parts += [f"{name} {metrics[name]:.4f}" for name in self._names
              if name in metrics]
    parts += [f"lr {metrics['learning_rate']:.2e}",
              f"{metrics['images_per_second']:.0f} img/s",
              f"input wait {metrics['input_wait']:.0%}"]
    parts += [f"{name.replace('_', ' ')} {metrics[name]:,}"
              for name in ("skipped_steps", "bad_images") if metrics[name]]
    if self._bar.disable:
      log.info("step %d/%d  %s  eta %s", step, self._total, "  ".join(parts),
               tqdm.tqdm.format_interval(left))
    else:
      self._bar.set_postfix_str("  ".join(parts))

  def say(self, message: str) -> None:
    """Prints a line, above the bar if there is one."""
    if not self._enabled:
      return
    if self._bar.disable:
      log.info("%s", message)
    else:
      self._bar.write(message, file=sys.stderr)

  def close(self) -> None:
    self._bar.close()
