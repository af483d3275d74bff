r"""Lists, verifies and deletes the checkpoints of a run:

    python -m metaformer_jax.tools.checkpoints list --workdir=runs/quickstart
    python -m metaformer_jax.tools.checkpoints verify --workdir=runs/quickstart
    python -m metaformer_jax.tools.checkpoints prune --workdir=runs/quickstart \
        --keep_last=1 --keep_best=1 --dry_run

`list` compares the names and sizes of a step's files with its manifest;
`verify` reads every byte; its exit code is 1 if a step is not intact. No device
is used.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
from typing import Any

from metaformer_jax import command, errors
from metaformer_jax.checkpoints import manifest, steps
from metaformer_jax.config import paths, saved, schema, tasks
from metaformer_jax.runtime import workdir as workdir_lib


def main(args: argparse.Namespace) -> int:
  """Runs a command; returns the exit code."""
  workdir = paths.given("--workdir", args.workdir)
  folder = workdir / "checkpoints"
  if not folder.is_dir():
    raise errors.ConfigError(f"--workdir: {workdir} holds no checkpoints")
  return args.command(args, workdir, folder)


def list_steps(args: argparse.Namespace, workdir: pathlib.Path,
               folder: pathlib.Path) -> int:
  """Prints a line for each step, those set aside included."""
  good, bad = steps.survey(folder)
  ranked = manifest.ranked(good, _best_measure(args, workdir))
  rows = []
  for step in sorted(good | bad):
    if step in bad:
      rows.append(_failed(step, bad[step]))
      continue
    found = good[step]
    marks = [mark for mark, marked in (("last", max(good)),
                                       ("best", (ranked or [None])[-1]))
             if step == marked]
    rows.append({
        "step": step, "state": "complete", "position": found.record["position"],
        "bytes": found.n_bytes, "time": found.time, "metrics": found.metrics,
        "marks": marks})
  rows += [{"step": int(path.name.partition(".")[0]), "state": "set aside",
            "path": str(path)} for path in steps.damaged(folder)]
  rows += [{"step": int(path.name), "state": "unfinished", "path": str(path)}
           for path in steps.unfinished(folder)]
  _show(args, rows)
  return 0


def verify(args: argparse.Namespace, workdir: pathlib.Path,
           folder: pathlib.Path) -> int:
  """Prints a line for each step, or for --step; returns 1 if any is damaged."""
  found = steps.found(folder)
  if args.step is not None:
    if args.step not in found:
      raise errors.ConfigError(
          f"--step: {workdir} holds no checkpoint {args.step}; it holds "
          f"{', '.join(map(str, found)) or 'none'}")
    found = [args.step]
  if not found:
    raise errors.ConfigError(f"--workdir: {workdir} holds no checkpoints")
  rows = []
  for step in found:
    try:
      n_bytes = manifest.verify(folder / str(step)).n_bytes
      rows.append({"step": step, "state": "intact", "bytes": n_bytes})
    except manifest.DamagedError as e:
      rows.append(_failed(step, e))
  _show(args, rows)
  return int(any(row["state"] != "intact" for row in rows))


def prune(args: argparse.Namespace, workdir: pathlib.Path,
          folder: pathlib.Path) -> int:
  """Deletes complete steps; those that are kept must be intact."""
  for path in (folder, folder / steps.DAMAGED):
    if path.is_symlink():
      raise errors.ConfigError(
          f"--workdir: {path} is a link, and links are not followed to delete "
          "files; give the folder itself")
  if not (workdir / "config.json").is_file():
    raise errors.ConfigError(
        f"--workdir: {workdir} is not a run: it has no config.json")
  with (contextlib.nullcontext() if args.dry_run
        else workdir_lib.hold(workdir)):
    good, _ = steps.survey(folder)
    kept = manifest.kept(good, args.keep_last, args.keep_best,
                         _best_measure(args, workdir))
    leaving = [folder / str(step) for step in sorted(good.keys() - kept)]
    for step in sorted(kept) if leaving else ():
      try:
        manifest.verify(folder / str(step))
      except manifest.DamagedError as e:
        raise errors.ConfigError(
            f"{folder / str(step)}: would be kept, but {e}; nothing is deleted"
        ) from e
    aside = steps.damaged(folder) if args.damaged else []
    for path in () if args.dry_run else leaving + aside:
      try:
        (steps.drop if path in aside else steps.remove)(path)
      except OSError as e:
        raise errors.StorageError(
            f"{path}: cannot be deleted: {e.strerror}") from e
  state = "to be deleted" if args.dry_run else "deleted"
  rows = [{"step": int(path.name.partition(".")[0]), "state": state,
           "path": str(path)} for path in leaving + aside]
  rows += [{"step": step, "state": "kept"} for step in sorted(kept)]
  _show(args, rows)
  return 0


def _failed(step: int, error: manifest.DamagedError) -> dict[str, Any]:
  partial = isinstance(error, manifest.PartialError)
  return {"step": step, "state": "partial" if partial else "damaged",
          "problem": str(error)}


def _best_measure(args: argparse.Namespace,
                  workdir: pathlib.Path) -> tasks.Measure:
  """The measure of the run's task that the flag names, else the run's own."""
  cfg = schema.Experiment()
  if (workdir / "config.json").exists():
    try:
      cfg = saved.read_run(workdir)
    except errors.ConfigError as e:
      if not args.best_metric:
        raise errors.ConfigError(f"{e}; give --best_metric") from e
  if not args.best_metric:
    return cfg.best_measure
  checkpoint = dataclasses.replace(cfg.checkpoint, best_metric=args.best_metric)
  try:
    return dataclasses.replace(cfg, checkpoint=checkpoint).best_measure
  except errors.ConfigError as e:
    raise errors.ConfigError(
        str(e).replace("config.checkpoint.best_metric", "--best_metric")) from e


def _show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
  for row in rows:
    if args.json:
      print(json.dumps(row))
      continue
    parts = [f"{row['step']:>9}", f"{row['state']:<9}"]
    if "position" in row:
      parts.append(f"{row['position']:,} examples")
    if "bytes" in row:
      parts.append(f"{row['bytes'] / 1e6:,.1f} MB")
    parts += [str(row[key]) for key in ("time", "problem", "path")
              if key in row]
    parts += [f"{k}={v:.5g}" for k, v in row.get("metrics", {}).items()]
    print("  ".join(parts + row.get("marks", [])))


def _count(low: int):
  def parse(value: str) -> int:
    if not value.isdecimal() or int(value) < low:
      raise argparse.ArgumentTypeError(f"{value!r} is not a count from {low}")
    return int(value)
  return parse


class _Command(argparse.ArgumentParser):
  """The arguments of one command; errors are one line, too."""

  error = command.Parser.error


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "checkpoints")
  commands = parser.add_subparsers(required=True, metavar="COMMAND",
                                   parser_class=_Command)

  def add(name, command):
    sub = commands.add_parser(name, help=command.__doc__)
    sub.set_defaults(command=command)
    sub.add_argument("--workdir", required=True, help="of the run")
    sub.add_argument("--json", action="store_true",
                     help="print a JSON object for each line")
    return sub

  def rank(sub):
    sub.add_argument("--best_metric", help="measure by which the best are "
                     "chosen; the run's config.checkpoint.best_metric by "
                     "default")

  rank(add("list", list_steps))
  add("verify", verify).add_argument(
      "--step", type=_count(0), help="verify only this one")
  pruning = add("prune", prune)
  rank(pruning)
  pruning.add_argument("--keep_last", type=_count(1), required=True,
                       help="number of newest to keep")
  pruning.add_argument("--keep_best", type=_count(0), required=True,
                       help="number of best to keep as well")
  pruning.add_argument("--damaged", action="store_true",
                       help="also delete the steps that were set aside")
  pruning.add_argument("--dry_run", action="store_true",
                       help="only print what would be deleted")
  return parser.parse_args(argv)


def console() -> None:
  """The command metaformer-checkpoints."""
  command.start_logging()
  with command.one_line_errors():
    raise SystemExit(main(parse()))


if __name__ == "__main__":
  console()
