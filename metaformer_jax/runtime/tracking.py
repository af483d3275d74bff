"""Metrics of a run on Weights & Biases, if `config.log.wandb` names a project.

The package wandb is an extra, imported here only, by the process that writes.
"""

import json
import logging
import pathlib
import re
import secrets
from typing import Any

from metaformer_jax import errors
from metaformer_jax.config import json_data, saved
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import workdir as workdir_lib

log = logging.getLogger(__name__)


def package() -> Any:
  """The package wandb; ConfigError if it is not installed."""
  try:
    import wandb  # noqa: PLC0415  Slow, and an extra.

    # A folder named wandb can be imported, too.
    return wandb if hasattr(wandb, "init") else _missing()
  except ImportError as e:
    return _missing(e)


def _missing(error: ImportError | None = None) -> Any:
  raise errors.ConfigError(
      "config.log.wandb: needs the package wandb, which cannot be imported; "
      "run pip install 'metaformer-jax[wandb]', or set it to None") from error


class Tracker:
  """A run on Weights & Biases, which a resumed run continues."""

  def __init__(self, workdir: pathlib.Path, cfg: Experiment):
    """Starts or continues the run whose id the workdir keeps.

    Raises:
      ConfigError: wandb is not installed, or refuses the project or the key.
      UserError: its server cannot be reached.
      OSError: the workdir cannot be written.
    """
    wandb, project = package(), cfg.log.wandb
    *entity, name = project.split("/", 1)
    try:
      self._run = wandb.init(
          entity=entity[0] if entity else None, project=name, resume="allow",
          id=_run_id(workdir, project), dir=str(workdir),
          name="/".join(workdir.absolute().parts[-2:]),
          config=json.loads(saved.text(cfg)), allow_val_change=True,
          reinit="create_new",
          # What it prints is not for the terminal of a run.
          settings=wandb.Settings(silent=True, console="off"))
    except wandb.errors.Error as e:
      is_remote = isinstance(e, wandb.errors.CommError) and not (
          isinstance(e, wandb.errors.AuthenticationError))
      kind = errors.UserError if is_remote else errors.ConfigError
      reason = errors.one_line(e).rstrip(".")
      raise kind(
          f"config.log.wandb: {project}: {reason}; run wandb login, or set "
          "WANDB_MODE=offline and send the run later by wandb sync") from e
    # Steps that an earlier process has sent, and that a resume repeats.
    self._first_step = self._run.step
    log.info("wandb: %s", self._run.dir if self._run.offline else self._run.url)

  def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Adds metrics as SPLIT/NAME."""
    if step < self._first_step:
      return
    self._try(self._run.log, {f"{split}/{name}": value
                              for name, value in metrics.items()}, step=step)

  def finish(self, summary: dict[str, Any]) -> None:
    """Adds what is in summary.json."""
    self._try(self._run.summary.update, {
        f"summary/{name}": value for name, value in summary.items()})

  def close(self, error: BaseException | None = None) -> None:
    """Ends the run; with an error, as failed or preempted."""
    if isinstance(error, errors.Preempted):
      self._try(self._run.mark_preempting)
    self._try(self._run.finish, exit_code=getattr(
        error, "exit_code", 0 if error is None else 1))

  def _try(self, call: Any, *args: Any, **kwargs: Any) -> None:
    """A failure of the service does not end a run; metrics.jsonl has all."""
    try:
      call(*args, **kwargs)
    except Exception as e:  # Of wandb, or of the connection to its process.
      log.warning("wandb: %s", errors.one_line(e))


def _run_id(workdir: pathlib.Path, project: str) -> str:
  """The id that the workdir keeps for the project; a new one if it has none."""
  path = workdir / workdir_lib.TRACKED
  try:
    found = json_data.read(path)
    if found["project"] == project and re.fullmatch(
        "[0-9a-f]{16}", found["id"]):
      return found["id"]
  except (OSError, ValueError, TypeError, KeyError):
    pass
  made = {"project": project, "id": secrets.token_hex(8)}
  workdir_lib.write(path, json.dumps(made) + "\n")
  return made["id"]
