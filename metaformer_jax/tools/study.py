r"""Trains the variants of a study and compares them:

    python -m metaformer_jax.tools.study \
        --config=configs/study_fashion_mnist.py --workdir=runs/study

The config file defines VARIANTS, {name: (..., published value or None)},
get_config(name), and optionally SEEDS. Of several published values, in a tuple,
the first one is shown, that of the task's first measure. Each variant and seed
is a run in WORKDIR/NAME/seed_N, which is resumed if it was interrupted, and
skipped if it is finished. study.json, study.md and study.png in WORKDIR compare
all finished runs by the experiments' best_metric. With --part=0/4 to
--part=3/4, four hosts share the runs.
"""

import argparse
import ast
import fnmatch
import gc
import json
import pathlib
import re
import runpy
import statistics
from typing import Any

from metaformer_jax import cli, command, errors
from metaformer_jax.config import json_data, shipped, typed
from metaformer_jax.config.schema import Experiment
from metaformer_jax.config.tasks import Measure

_RESULT = "result.json"  # In the workdir of a finished run.
_MAX_RESULT_BYTES = 2**20


def main(args: argparse.Namespace) -> None:
  """Runs the part of the study that the command line names."""
  study = load(pathlib.Path(shipped.find(args.config)))
  names = fnmatch.filter(study["VARIANTS"], args.only)
  if not names:
    raise errors.ConfigError(
        f"--only: no variant matches {args.only!r}"
        f"{errors.did_you_mean(args.only, study['VARIANTS'])}")
  seeds = args.seeds or study.get("SEEDS", (0,))
  runs = [(name, seed) for seed in seeds for name in names]
  # All are checked before the first starts.
  experiments = [experiment(study, name, seed, args.set) for name, seed in runs]
  measure, *others = {cfg.best_measure for cfg in experiments}
  if others:
    raise errors.ConfigError(
        "config.checkpoint.best_metric: differs between the variants; set the "
        "same for all, by --set checkpoint.best_metric=NAME")
  workdir = pathlib.Path(args.workdir).expanduser()
  index, count = args.part
  for (name, seed), cfg in list(zip(runs, experiments))[index::count]:
    folder = workdir / name / f"seed_{seed}"
    if not (folder / _RESULT).is_file():
      print(f"{name}, seed {seed}", flush=True)
      _train(cfg, folder)
    report(study, workdir, measure)


def load(path: pathlib.Path) -> dict[str, Any]:
  """The names that a study's config file defines."""
  if not path.is_file():
    raise errors.ConfigError(f"--config: {path} is not a file")
  try:
    study = runpy.run_path(str(path))
  except Exception as e:  # The file is a program.
    raise errors.ConfigError(f"{path}: {type(e).__name__}: {e}") from e
  missing = {"VARIANTS", "get_config"} - study.keys()
  if missing:
    raise errors.ConfigError(
        f"{path}: has no {' and no '.join(sorted(missing))}; see "
        "configs/ablations.py")
  return study


def experiment(study: dict[str, Any], name: str, seed: int,
               settings: list[tuple[str, Any]]) -> Experiment:
  """The checked experiment of one run."""
  config = study["get_config"](name)
  config.seed = seed
  for key, value in settings:
    known = typed.keys()
    if key not in known:
      raise errors.ConfigError(f"--set: {key}: no such key"
                               f"{errors.did_you_mean(key, known)}")
    try:
      config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as e:
      raise errors.ConfigError(f"--set: {key}={value!r}: {e}") from e
  return cli.resolve(config)


def _train(cfg: Experiment, folder: pathlib.Path) -> None:
  cfg, task, mesh = cli.start(cfg)
  import jax  # noqa: PLC0415  Imported after the configs are checked.

  from metaformer_jax.models import cost  # noqa: PLC0415
  from metaformer_jax.training import loop  # noqa: PLC0415

  try:
    summary = loop.train_and_evaluate(cfg, task, mesh, folder)
  except errors.DivergedError as e:  # Also a result of the study.
    summary = {"diverged": str(e)}
  network = cost.of_inputs(task.model, *task.init_inputs())
  beside = folder / f"{_RESULT}.tmp"
  beside.write_text(json.dumps(
      {**summary, **network._asdict()}, indent=2) + "\n")
  beside.replace(folder / _RESULT)
  jax.clear_caches()
  gc.collect()


def collect(study: dict[str, Any], workdir: pathlib.Path,
            measure: Measure) -> list[dict[str, Any]]:
  """A row for each variant with finished runs, in the study's order.

  The values of the measure are in the row under its name; fractions are in
  percent.
  """
  rows = []
  scale = 100 if measure.is_fraction else 1
  for name, (*_, published) in study["VARIANTS"].items():
    if isinstance(published, tuple):
      published, *_ = published
    done = [_read_result(path, measure) for path in
            sorted((workdir / name).glob(f"seed_*/{_RESULT}"))]
    if not done:
      continue
    values = [scale * run[measure.name] for run in done if measure.name in run]
    rows.append({
        "variant": name, "n_params": done[0]["n_params"],
        "macs": done[0]["macs"], measure.name: values, "published": published,
        "diverged": len(done) - len(values)})
  return rows


def _read_result(path: pathlib.Path, measure: Measure) -> dict[str, Any]:
  """What `_train` has written; ConfigError if it is anything else."""
  try:
    found = json.loads(json_data.read_text(path, _MAX_RESULT_BYTES))
    numbers = [found["n_params"], found["macs"],
               *(found[name] for name in (measure.name,) if name in found)]
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    numbers = [None]
  if not all(type(n) in (int, float) and abs(n) < 2**63 for n in numbers):
    raise errors.ConfigError(
        f"{path}: is not the result of a run; delete it to repeat the run")
  return found


def report(study: dict[str, Any], workdir: pathlib.Path,
           measure: Measure) -> None:
  """Writes the table and the plot of all finished runs."""
  rows = collect(study, workdir, measure)
  (workdir / "study.json").write_text(json.dumps(rows, indent=2) + "\n")
  (workdir / "study.md").write_text(table(rows, measure))
  _plot(rows, measure, workdir / "study.png")


def _title(measure: Measure) -> str:
  """Of a column: top-1 for top1."""
  return re.sub(r"^top(\d+)$", r"top-\1", measure.name)


def table(rows: list[dict[str, Any]], measure: Measure) -> str:
  """The measure's mean over the seeds, least and most, as Markdown."""
  lines = [f"| variant | parameters | MACs | {_title(measure)} | least - most "
           "| runs | published |", "|---" * 7 + "|"]
  for row in rows:
    values = row[measure.name]
    mean = f"{statistics.mean(values):.2f}" if values else "diverged"
    spread = f"{min(values):.2f} - {max(values):.2f}" if values else ""
    runs = str(len(values) + row["diverged"])
    if values and row["diverged"]:
      runs += f", {row['diverged']} diverged"
    published = "" if row["published"] is None else f"{row['published']:.1f}"
    lines.append(
        f"| {row['variant']} | {row['n_params']:,} | {row['macs']:,} | {mean} "
        f"| {spread} | {runs} | {published} |")
  return "\n".join(lines) + "\n"


def _plot(rows: list[dict[str, Any]], measure: Measure,
          path: pathlib.Path) -> None:
  """The measure, on a log scale, against parameters and MACs.

  Of a fraction that should be high, the error, 100 - percent, is drawn.
  Variants are numbered from the best; bars go from the least to the most of the
  seeds, crosses are published values.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
  from matplotlib.figure import Figure  # noqa: PLC0415

  is_error = measure.is_fraction and measure.higher_is_better

  def drawn(value):
    return 100 - value if is_error else value

  found_of = {row["variant"]: [drawn(value) for value in row[measure.name]]
              for row in rows if row[measure.name]}
  rows = sorted((row for row in rows if row["variant"] in found_of),
                key=lambda row: statistics.mean(found_of[row["variant"]]),
                reverse=measure.higher_is_better and not is_error)
  figure = Figure(figsize=(13, 6), layout="constrained")
  FigureCanvasAgg(figure)
  for axes, key, label in zip(
      figure.subplots(1, 2, sharey=True), ("n_params", "macs"),
      ("parameters, millions", "MACs of one image, millions")):
    for i, row in enumerate(rows, 1):
      found, x = found_of[row["variant"]], row[key] / 1e6
      mean = statistics.mean(found)
      axes.errorbar(
          x, mean, [[mean - min(found)], [max(found) - mean]], fmt="o",
          capsize=3, alpha=0.7,
          label=f"{i}  {row['variant']}  {mean:.2f}")
      axes.annotate(str(i), (x, mean), xytext=(6 + 11 * (i % 4), -3),
                    fontsize=7, textcoords="offset points")
      if row["published"] is not None:
        axes.plot(x, drawn(row["published"]), "kx")
    axes.set_xlabel(label)
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
  figure.axes[0].set_ylabel(
      _title(measure) + (" error" if is_error else "")
      + (", percent" if measure.is_fraction else ""))
  figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=7,
                loc="outside right upper")
  figure.savefig(path, dpi=100)


def _part(text: str) -> tuple[int, int]:
  index, _, count = text.partition("/")
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise argparse.ArgumentTypeError(f"{text!r} is not INDEX/COUNT, e.g. 0/4")
  return int(index), int(count)


def _setting(text: str) -> tuple[str, Any]:
  key, found, value = text.partition("=")
  if not found:
    raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return key, value  # A string without quotation marks.


def parse() -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "study")
  parser.add_argument("--config", required=True, help="the study's file")
  parser.add_argument("--workdir", required=True, help="folder of the runs")
  parser.add_argument("--only", default="*", help="shell pattern of variants")
  parser.add_argument("--seeds", type=int, nargs="+", help="instead of SEEDS")
  parser.add_argument("--part", type=_part, default=(0, 1),
                      help="INDEX/COUNT: this host's share of the runs")
  parser.add_argument("--set", type=_setting, action="append", default=[],
                      metavar="KEY=VALUE", help="changes every run's config")
  return parser.parse_args()


def console() -> None:
  """The command metaformer-study."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
