r"""Trains the variants of a study and compares them:

    python -m metaformer_jax.tools.study \
        --config=configs/study_fashion_mnist.py --workdir=runs/study
    python -m metaformer_jax.tools.study --config=configs/quickstart.py \
        --sweep optim.base_lr=4e-3,8e-3 --sweep model.drop_path_rate=0.0,0.1 \
        --seeds 0 1 --workdir=runs/rates

A config file may define VARIANTS and SEEDS. A row of VARIANTS is one of

    name: {"model.norm": "layer_norm"},            settings by "section.key"
    name: ({"model.norm": "layer_norm"}, 76.5),    and the published value
    name: (column, ..., 76.5),                     for get_config(name) to read

and settings are applied here to what get_config returns. A published value is
that of the task's first measure, in percent, or None. --sweep takes any config
file, with or without VARIANTS, or one variant, --config=FILE:NAME; several give
all combinations. Commas within brackets belong to a value.

Each variant and seed is a run in WORKDIR/NAME/seed_N, which is resumed if it
was interrupted, and skipped if it is finished. study.json, study.md and
study.png in WORKDIR compare all finished runs by the experiments' best_metric;
it may be gs://BUCKET/FOLDER.
With --part=0/4 to --part=3/4, four hosts share the runs.
"""

import argparse
import fnmatch
import gc
import io
import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from metaformer_jax import cli, command, errors, storage
from metaformer_jax.config import json_data, paths, saved, shipped
from metaformer_jax.config.schema import Experiment
from metaformer_jax.config.tasks import Measure
from metaformer_jax.tools import variants

_RESULT = "result.json"  # In the workdir of a finished run.
_MAX_RESULT_BYTES = 2**20


def main(args: argparse.Namespace) -> None:
  """Runs the part of the study that the command line names."""
  file = variants.read(shipped.find(args.config))
  seeds = list(dict.fromkeys(args.seeds or file.names.get("SEEDS", (0,))))
  if not (args.sweep or "VARIANTS" in file.names or len(seeds) > 1):
    raise errors.ConfigError(
        f"--config: {file.path} has no VARIANTS, so that there is nothing to "
        "compare; add --sweep KEY=VALUE,VALUE, or several --seeds")
  if both := {key for key, _ in args.set} & {key for key, _ in args.sweep}:
    raise errors.ConfigError(f"--set: {min(both)}: is swept, too; give one")
  study = variants.of(file, args.sweep)
  names = fnmatch.filter(study, args.only)
  if not names:
    raise errors.ConfigError(f"--only: no variant matches {args.only!r}"
                             f"{errors.did_you_mean(args.only, study)}")
  # All are checked before the first starts.
  experiments = {(name, seed): variants.experiment(
      file, name, study[name], seed, args.set)
      for seed in seeds for name in names}
  variants.require_different(
      {name: experiments[name, seeds[0]] for name in names})
  measure = _measure(experiments.values())
  workdir = paths.given("--workdir", args.workdir)
  for (name, seed), cfg in experiments.items():
    _require_same(cfg, workdir / name / f"seed_{seed}")
  index, count = args.part
  for (name, seed), cfg in list(experiments.items())[index::count]:
    folder = workdir / name / f"seed_{seed}"
    if not (folder / _RESULT).is_file():
      print(f"{name}, seed {seed}", flush=True)
      _train(cfg, folder)
    report(study, workdir, measure)
  print(f"\n{(workdir / 'study.md').read_text()}")
  print("\n".join(str(workdir / f"study.{kind}")
                  for kind in ("md", "json", "png")))


def _measure(experiments: Iterable[Experiment]) -> Measure:
  """What the variants are compared by."""
  measure, *others = {cfg.best_measure for cfg in experiments}
  if others:
    raise errors.ConfigError(
        "config.checkpoint.best_metric: differs between the variants; set the "
        "same for all, by --set checkpoint.best_metric=NAME")
  return measure


def _require_same(cfg: Experiment, folder: pathlib.Path) -> None:
  """Raises ConfigError if the folder's finished run is another experiment."""
  if not (folder / _RESULT).is_file():
    return
  path = folder / "config.json"
  try:
    found = saved.differences(cfg, path, complete=False)
  except (OSError, ValueError) as e:
    raise errors.ConfigError(
        f"--workdir: {path} cannot be used ({e}); choose a new folder") from e
  if found:
    raise errors.ConfigError(
        f"--workdir: {folder} has another experiment ({'; '.join(found)}); "
        "choose a new folder, or delete that one")


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
  storage.write(folder / _RESULT, json.dumps(
      {**summary, **network._asdict()}, indent=2) + "\n")
  jax.clear_caches()
  gc.collect()


def collect(study: dict[str, variants.Variant], workdir: pathlib.Path,
            measure: Measure) -> list[dict[str, Any]]:
  """A row for each variant with finished runs, in the study's order.

  The values of the measure are in the row under its name; fractions are in
  percent.
  """
  rows = []
  scale = 100 if measure.is_fraction else 1
  for name, variant in study.items():
    done = [_read_result(folder / _RESULT, measure) for folder in
            sorted((workdir / name).glob("seed_*"))
            if (folder / _RESULT).is_file()]
    if not done:
      continue
    values = [scale * run[measure.name] for run in done if measure.name in run]
    rows.append({
        "variant": name, "n_params": done[0]["n_params"],
        "macs": done[0]["macs"], measure.name: values,
        "published": variant.published, "diverged": len(done) - len(values)})
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


def report(study: dict[str, variants.Variant], workdir: pathlib.Path,
           measure: Measure) -> None:
  """Writes the table and the plot of all finished runs."""
  from metaformer_jax.tools import study_plot  # noqa: PLC0415  Slow to import.

  rows = collect(study, workdir, measure)
  workdir.mkdir(parents=True, exist_ok=True)
  storage.write(workdir / "study.json", json.dumps(rows, indent=2) + "\n")
  storage.write(workdir / "study.md", table(rows, measure))
  picture = io.BytesIO()
  study_plot.draw(rows, measure, _title(measure), picture)
  storage.write(workdir / "study.png", picture.getvalue())


def _title(measure: Measure) -> str:
  """Of a column: top-1 for top1."""
  return re.sub(r"^top(\d+)$", r"top-\1", measure.name)


def table(rows: Sequence[dict[str, Any]], measure: Measure) -> str:
  """The measure's mean over the seeds, least and most, as Markdown."""
  lines = [("variant", "parameters", "MACs", _title(measure), "least - most",
            "runs", "published")]
  for row in rows:
    values = row[measure.name]
    mean = f"{statistics.mean(values):.2f}" if values else "diverged"
    spread = f"{min(values):.2f} - {max(values):.2f}" if values else ""
    runs = str(len(values) + row["diverged"])
    if values and row["diverged"]:
      runs += f", {row['diverged']} diverged"
    published = "" if row["published"] is None else f"{row['published']:.1f}"
    lines.append((row["variant"], f"{row['n_params']:,}", f"{row['macs']:,}",
                  mean, spread, runs, published))
  widths = [max(map(len, column)) for column in zip(*lines)]
  head, *body = ["| " + " | ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths))) + " |"
      for line in lines]
  rule = "|".join("-" * (width + 1) + ("-" if i == 0 else ":")
                  for i, width in enumerate(widths))
  return "\n".join([head, f"|{rule}|", *body]) + "\n"


def _part(text: str) -> tuple[int, int]:
  index, _, count = text.partition("/")
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise argparse.ArgumentTypeError(f"{text!r} is not INDEX/COUNT, e.g. 0/4")
  return int(index), int(count)


def _parsed(parse_text: Callable[[str], Any]) -> Callable[[str], Any]:
  """Of a flag: its ValueErrors as those of the parser."""

  def parsed(text):
    try:
      return parse_text(text)
    except ValueError as e:
      raise argparse.ArgumentTypeError(str(e)) from e

  return parsed


def parse() -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "study")
  parser.add_argument("--config", required=True,
                      help="the study's file, or FILE:VARIANT")
  parser.add_argument("--workdir", required=True, help="folder of the runs")
  parser.add_argument("--sweep", type=_parsed(variants.parse_sweep),
                      action="append", default=[],
                      metavar="KEY=VALUE,VALUE", help="runs each value")
  parser.add_argument("--set", type=_parsed(variants.parse_setting),
                      action="append", default=[],
                      metavar="KEY=VALUE", help="changes every run's config")
  parser.add_argument("--only", default="*", help="shell pattern of variants")
  parser.add_argument("--seeds", type=int, nargs="+", help="instead of SEEDS")
  parser.add_argument("--part", type=_part, default=(0, 1),
                      help="INDEX/COUNT: this host's share of the runs")
  return parser.parse_args()


def console() -> None:
  """The command metaformer-study."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
