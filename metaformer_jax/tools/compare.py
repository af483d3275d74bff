r"""Compares runs, finished or not, and draws their curves over one another:

    python -m metaformer_jax.tools.compare runs/s12 runs/s24 \
        --output=runs/compared

It prints a table, and writes compare.html, one page that needs no other file
and no network, and compare.png, its curves. Both have the final and the best
values of each measure; the page also has how the configs differ. Parameters and
MACs are those of the traced program; nothing of a run is executed but modules
of your own that you have used in the run yourself.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from metaformer_jax import command, errors
from metaformer_jax.config import comparison, json_data, own, paths, saved
from metaformer_jax.config.schema import Experiment
from metaformer_jax.config.tasks import Measure
from metaformer_jax.runtime import writers
from metaformer_jax.tools import output

_MAX_SUMMARY_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Run:
  """What the folder of a run says.

  Attributes:
    name: what tells it from the others.
    workdir: its folder.
    cfg: its experiment.
    records: those of metrics.jsonl.
    summary: the numbers of summary.json; empty if it is not finished.
    n_params, macs: of one image; None if they cannot be counted.
  """

  name: str
  workdir: pathlib.Path
  cfg: Experiment
  records: Sequence[writers.Record]
  summary: dict[str, float]
  n_params: float | None = None
  macs: float | None = None

  def values(self, split: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, in order."""
    return [(record["step"], record[name]) for record in self.records
            if record["split"] == split and name in record]

  @property
  def step(self) -> int:
    """The last one that it has recorded."""
    return max([0, int(self.summary.get("step", 0)),
                *(record["step"] for record in self.records)])

  @property
  def state(self) -> str:
    """Whether it is finished."""
    return ("finished" if self.summary else "unfinished") + (
        f" at step {self.step:,}")

  @property
  def measures(self) -> tuple[Measure, ...]:
    """What it was evaluated by; those of a task that is not imported, too."""
    known = {measure.name for measure in self.cfg.task.MEASURES}
    if known:
      return tuple(measure for measure in self.cfg.task.MEASURES
                   if self.final(measure.name) is not None)
    found = dict.fromkeys(
        name for record in self.records if record["split"] == "eval"
        for name in record if name not in ("step", "split", "bad_images"))
    return tuple(Measure(name, None) for name in found)

  def final(self, name: str) -> float | None:
    """A measure at the last evaluation."""
    found = self.values("eval", name)
    return found[-1][1] if found else self.summary.get(name)

  def best(self, measure: Measure) -> tuple[float, int] | None:
    """The best value and its step; None if the direction is not known."""
    found = [(value, step) for step, value in self.values("eval", measure.name)
             if value == value]  # No NaN.
    if not found or measure.higher_is_better is None:
      return None
    # Of equal values, the first.
    choose = max if measure.higher_is_better else min
    return choose(found, key=lambda item: item[0])

  @property
  def images_per_second(self) -> float | None:
    """The median of the training steps."""
    found = [value for _, value in self.values("train", "images_per_second")]
    return self.summary.get("images_per_second") or (
        statistics.median(found) if found else None)

  @property
  def goodput(self) -> float | None:
    """The part of the time that was spent on training."""
    found = self.values("train", "goodput")
    return found[-1][1] if found else self.summary.get("goodput")


def main(args: argparse.Namespace) -> None:
  """Compares the runs of the command line."""
  # Slow to import; a mistake is reported at once.
  from metaformer_jax.tools import compare_page, compare_plot  # noqa: PLC0415

  runs = read([paths.given("RUN", run) for run in args.runs])
  folder = paths.local("--output", args.output)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    panels = compare_plot.panels(runs)
    compare_plot.draw(runs, panels, folder / "compare.png")
    page = compare_page.page(runs, differences(runs), panels)
    (folder / "compare.html").write_text(page, encoding="utf-8")
  except OSError as e:
    raise errors.ConfigError(
        f"--output: {folder} cannot be written: {e.strerror or e}") from e
  print(output.table([_row(run, runs) for run in runs], {
      "img/s": 0, "goodput": 2}))
  for name in ("compare.html", "compare.png"):
    print(folder / name)


def read(folders: Sequence[pathlib.Path]) -> list[Run]:
  """The runs in these folders, which are data: nothing in them is trusted.

  Raises:
    ConfigError: a folder is not that of a run, or is given twice; or its
      config.json or summary.json is damaged.
  """
  workdirs = []
  for path in folders:
    workdir = saved.find_workdir(path)
    if workdir is None:
      raise errors.ConfigError(
          f"{path}: is not the folder of a run; give folders that "
          "metaformer_jax.main has written, with a config.json")
    if workdir.resolve() in [known.resolve() for known in workdirs]:
      raise errors.ConfigError(f"{path}: is given twice")
    workdirs.append(workdir)
  return [_read(name, workdir) for name, workdir in
          zip(_names(workdirs), workdirs)]


def _names(workdirs: Sequence[pathlib.Path]) -> list[str]:
  """The part of each path that tells it from the others."""
  parts = [workdir.resolve().parts for workdir in workdirs]
  while len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 1:
    parts = [p[1:] for p in parts]
  while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
    parts = [p[:-1] for p in parts]
  return [errors.one_line(os.path.join(*p)) for p in parts]


def _read(name: str, workdir: pathlib.Path) -> Run:
  cfg = saved.read_run(workdir, None)
  try:
    records = writers.read(workdir / "metrics.jsonl")
  except OSError as e:
    raise errors.ConfigError(f"{workdir / 'metrics.jsonl'}: {e.strerror or e}"
                             ) from e
  run = Run(name, workdir, cfg, records, _numbers(workdir / "summary.json"))
  counted = _numbers(workdir / "result.json")  # Of a study.
  if {"n_params", "macs"} <= counted.keys():
    return dataclasses.replace(
        run, n_params=counted["n_params"], macs=counted["macs"])
  return _counted(run)


def _numbers(path: pathlib.Path) -> dict[str, float]:
  """The numbers in a JSON object; empty if there is no such file."""
  if not path.exists():
    return {}
  try:
    # Not standard JSON: a run that has diverged may have written NaN.
    found = json.loads(json_data.read_text(path, _MAX_SUMMARY_BYTES))
    return {key: value for key, value in found.items()
            if type(value) in (int, float) and abs(value) < 2**63}
  except (OSError, ValueError, AttributeError, RecursionError) as e:
    raise errors.ConfigError(f"{path}: is not what a run writes ({e})") from e


def _counted(run: Run) -> Run:
  """The run with what can be counted of its model."""
  if own.modules(run.cfg) and not own.is_remembered(run.workdir):
    return dataclasses.replace(run, n_params=run.summary.get("n_params"))
  from metaformer_jax import tasks  # noqa: PLC0415  Imports jax.
  from metaformer_jax.models import cost  # noqa: PLC0415

  try:
    cfg, task = tasks.create(run.cfg, files=False)
    found = cost.of_inputs(task.model, *task.init_inputs())
  except errors.ConfigError:  # Its modules have changed or moved.
    return dataclasses.replace(run, n_params=run.summary.get("n_params"))
  return dataclasses.replace(
      run, cfg=cfg, n_params=found.n_params, macs=found.macs)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
  """How the configs differ: a text for each run, by "section.key"."""
  return comparison.table([saved.flat(run.cfg) for run in runs])


def _row(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
  """The run's line of the printed table; fractions are in percent."""
  found = {"run": run.name, "state": run.state}
  for measure in dict.fromkeys(m for other in runs for m in other.measures):
    scale = 100 if measure.is_fraction else 1
    final, best = run.final(measure.name), run.best(measure)
    found[measure.name] = None if final is None else final * scale
    found[f"best {measure.name}"] = best and best[0] * scale
  return {**found, "parameters": run.n_params, "MACs": run.macs,
          "img/s": run.images_per_second, "goodput": run.goodput}


def parse() -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "compare")
  parser.add_argument("runs", nargs="+", metavar="RUN",
                      help="folder of a run, or of a checkpoint of it")
  parser.add_argument("--output", required=True,
                      help="folder of the page and the picture")
  return parser.parse_args()


def console() -> None:
  """The command metaformer-compare."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
