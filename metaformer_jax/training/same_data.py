"""Whether the data set is the same: on all processes, and after a restart."""

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager
from metaformer_jax.config import comparison
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import processes
from metaformer_jax.tasks import base

log = logging.getLogger(__name__)

Fingerprints = dict[str, dict[str, Any]]

# What follows from another fact: of other files, the sizes are other ones.
_FOLLOWS = {"file names": ("sizes of files", "sizes of images")}


def agree(**splits: base.Data) -> Fingerprints:
  """The fingerprint of each split; all processes must call it.

  Every process looks at its own files: hosts may have a copy each.

  Raises:
    ConfigError: on all processes, if two differ; names the split and what does.
  """
  with processes.agreeing():
    found = {name: _fingerprint(data, name) for name, data in splits.items()}
    layout = {name: _call(data, "layout") for name, data in splits.items()}
  processes.require_same(lambda: {
      f"{what} of the {name} data": value for name in splits
      for what, value in (found[name] | layout[name]).items()})
  return found


def _fingerprint(data: base.Data, name: str) -> dict[str, Any]:
  """A split's fingerprint as a checkpoint gives it back."""
  found = _call(data, "fingerprint")
  try:
    return json.loads(json.dumps(
        {"number of examples": data.n_examples, **found}, allow_nan=False))
  except (TypeError, ValueError) as e:
    raise errors.ConfigError(
        f"config.data.source: the fingerprint of the {name} data is not JSON: "
        f"{e}") from e


def _call(data: base.Data, method: str) -> dict[str, Any]:
  return getattr(data, method)() if hasattr(data, method) else {}


def require_unchanged(cfg: Experiment, checkpoints: manager.Checkpoints,
                      step: int, now: Fingerprints, n_steps: int) -> None:
  """Checks that the data is what a checkpoint was trained and evaluated on.

  A fact that only one of both has, as of a newer version, is not compared.

  Args:
    cfg: the experiment, which may allow other data.
    checkpoints: of the run.
    step: the one to resume.
    now: of `agree`.
    n_steps: of the whole run, with the data as it is.

  Raises:
    ConfigError: it is other data, which is not allowed; says what differs. Or
      with this data the run has fewer steps than were taken.
  """
  before, workdir = checkpoints.read(step).data, checkpoints.directory.parent
  changed = [text for name in now
             for text in _changes(before.get(name, {}), now[name], name)]
  line = (f"--workdir: {workdir} was trained on other data: "
          f"{comparison.listed(changed)}")
  if changed and not cfg.checkpoint.allow_other_data:
    raise errors.ConfigError(
        f"{line}; restore it, choose a new folder, or continue with the data "
        "as it is by --config.checkpoint.allow_other_data=True")
  if changed:
    log.warning("%s; config.checkpoint.allow_other_data is on", line)
  if step > n_steps:
    raise errors.ConfigError(
        f"--workdir: {workdir} is at step {step}, but with the data as it is "
        f"the run has {n_steps} steps; restore the data, or choose a new "
        "folder")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any],
             name: str) -> Iterator[str]:
  follow = {effect for cause, effects in _FOLLOWS.items()
            if before.get(cause) != now.get(cause) for effect in effects}
  shared = [what for what in now if what in before and what not in follow]
  yield from comparison.between(
      *({f"{what} of the {name} data": facts[what] for what in shared}
        for facts in (before, now)))
