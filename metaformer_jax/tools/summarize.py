r"""Prints the table of models, that of the recipes, or a model's layers:

    python -m metaformer_jax.tools.summarize "caformer*"
    python -m metaformer_jax.tools.summarize --configs=configs
    python -m metaformer_jax.tools.summarize --model=poolformer_s12 --depth=1
    python -m metaformer_jax.tools.summarize \
        --config=configs/coco_mask_rcnn.py:resnet50 --json

Parameters and multiply-accumulates are those of the traced program; nothing is
computed. `--output` writes a page of this project: docs/models.md, or, with
--configs, docs/recipes.md.

The layers are modules to a depth of --depth, each with all that is below it,
for one image: of the model's size, or of the experiment's training. A row does
not count what other rows do, so that the last line is their sum. Bytes of
activations are those of all outputs of modules that call no others, which is
not what is in memory at one time. The heads of an R-CNN count for one region.
"""

import argparse
import fnmatch
import json
import pathlib
import runpy
import sys
from collections.abc import Iterator
from typing import Any

import jax

from metaformer_jax import cli, command, errors
from metaformer_jax import tasks as task_lib
from metaformer_jax.checkpoints import published
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import tasks
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import cost, registry
from metaformer_jax.tools import layer_table

_MODELS = f"""\
# Models

Written by `python -m metaformer_jax.tools.summarize --output=docs/models.md`. Parameters and GMACs (multiply-accumulates of one image, in 1e9) are counted on the traced program; GMACs in brackets and top-1 (ImageNet-1K, percent) are published, by the source named last.

## Published weights

A model's name stands for its published weights in `metaformer_jax.load("caformer_s18")`, `load_pretrained("caformer_s18")`, `--config.init=caformer_s18`, `tools.convert --input=caformer_s18` and `tools.cam --weights=caformer_s18`. A path that exists wins over a name, and `./caformer_s18` is always a path.

- Each file is a link in the column "weights". It is read from `{published.FOLDER}`, or the folder that `{published.VARIABLE}` names, and downloaded into it if it is not there. An interrupted download is continued. A file appears under its name when it is complete, has the size and the digest that its server tells, and every tensor of it fits the model.
- Files on huggingface.co are downloaded by `huggingface_hub` if that is installed (`pip install 'metaformer-jax[hub]'`): with its token, into its cache. `HF_ENDPOINT` names another hub.
- By hand: download the file on any machine, and put it into the folder. The name must be that of the model with `{"`, `".join(published.SUFFIXES)}`; the content decides the format.
- `HF_HUB_OFFLINE=1` forbids every download. Then, and without a network, one line names the file and its place.

## Table

"""  # noqa: E501

_MODEL_COLUMNS = ("model", "parameters", "frozen", "GMACs", "input", "crop",
                  "classes", "top-1", "weights", "source")

_RECIPES = """\
# Recipes

Written by `python -m metaformer_jax.tools.summarize --configs=configs --output=docs/recipes.md`. Each row is an experiment of `configs/`:

    python -m metaformer_jax.main --config=configs/caformer.py:s18 --config.data.path=/path/to/imagenet

- The files come with the package: where the working directory has no `configs/NAME.py`, that of the installed package is used, and its path is printed. So the commands are the same after `pip install`, with or without a checkout; a file of your own in `configs/` comes first.
- Top-1, mIoU, box and mask AP (percent) are published, by the source beside them, and were not measured here. Measured numbers are in [results.md](results.md).
- The peak learning rate is that of the batch size in the table; with another `--config.train.batch_size` it scales in proportion. Epochs: training + cool-down.
- The batches of ImageNet are for a TPU pod slice or several GPUs. `--config.train.accumulate=8` computes one in eight parts, to fit it on fewer devices.
- `--config.init` replaces the initial weights.
- The notes say what of a recipe is not published, and what is used instead.
"""  # noqa: E501

_RECIPE_COLUMNS = (
    "config", "model", "parameters", "image", "batch", "epochs", "optimizer",
    "peak rate", "drop path", "initial weights", "published", "notes")


# Names of the measures that are published, as papers write them.
_MEASURES = {"top1": "top-1", "miou": "mIoU", "box_ap": "box AP",
             "mask_ap": "mask AP"}


def _table(columns: tuple[str, ...], cells: Iterator[list[str]],
           ) -> Iterator[str]:
  yield f"| {' | '.join(columns)} |"
  yield "|---" * len(columns) + "|"
  for row in cells:
    yield f"| {' | '.join(row)} |"


def rows(pattern: str) -> Iterator[str]:
  """The lines of the table for the models that match a shell pattern."""
  return _table(_MODEL_COLUMNS, _model_rows(pattern))


def _model_rows(pattern: str) -> Iterator[list[str]]:
  specs = sorted(map(registry.get_spec, registry.list_models(pattern)),
                 key=lambda s: (s.name.partition("_")[0], s.n_params))
  counted = {}  # Names that share a network share its cost.
  for spec in specs:
    network = (spec.module, repr(spec.settings), spec.num_classes,
               spec.input_size)
    if network not in counted:
      counted[network] = cost.of_model(registry.create_model(spec.name),
                                       spec.input_size)
    found = counted[network]
    published = "" if spec.gmacs is None else f" ({spec.gmacs:.1f})"
    yield [
        spec.name, f"{found.n_params:,}", f"{found.n_frozen:,}",
        f"{found.macs / 1e9:.2f}{published}",
        f"{spec.input_size} x {spec.input_size}", f"{spec.crop_pct:g}",
        f"{spec.num_classes:,}",
        "" if spec.top1 is None else f"{spec.top1:.1f}", _weights(spec.name),
        spec.source]


def _weights(name: str) -> str:
  """The name of a model's published file, as a link to it."""
  place = published.place(name)
  return f"[{place.name}]({place.url})" if place else "not published"


def recipes(folder: pathlib.Path) -> Iterator[str]:
  """The lines of the page of all config files in a folder and its subfolders.

  Files without variants share the first table. A family's section begins with
  its docstring; its file defines VARIANTS, {name: settings, or (..., published
  result, a tuple of several, or None)}, and optionally SOURCE, of the results,
  and NOTES, {pattern of names: text}.

  Raises:
    ConfigError: a file cannot be run, or an experiment is not valid.
  """
  single, families = [], []
  for path in sorted(folder.rglob("*.py")):
    try:
      found = runpy.run_path(str(path))
    except Exception as e:  # The file is a program.
      raise errors.ConfigError(f"{path}: {type(e).__name__}: {e}") from e
    group = families if "VARIANTS" in found else single
    group.append((path.relative_to(folder.parent).as_posix(), found))
  yield "## Files without variants\n"
  yield from _table(_RECIPE_COLUMNS, (
      _recipe_row(path, path, found, found["get_config"](), {})
      for path, found in single))
  for path, found in families:
    yield f"\n## {path}\n\n{_linked(found['__doc__'].strip())}\n"
    yield from _table(_RECIPE_COLUMNS, (
        _recipe_row(path, f"{path}:{name}", found, found["get_config"](name), {
            "published": row[-1] if isinstance(row, tuple) else None,
            "notes": "; ".join(
                text for pattern, text in found.get("NOTES", {}).items()
                if fnmatch.fnmatchcase(name, pattern))})
        for name, row in found["VARIANTS"].items()))


def _linked(text: str) -> str:
  return text.replace("docs/results.md", "[docs/results.md](results.md)")


def _recipe_row(path: str, argument: str, found: dict[str, Any], config,
                variant: dict[str, Any]) -> list[str]:
  """The cells of one experiment.

  Args:
    path: of the config file, for messages.
    argument: of --config.
    found: what the file defines.
    config: its experiment.
    variant: "published" and "notes"; empty for a file without variants.
  """
  try:
    cfg = config_lib.resolve(config, files=False)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"{path}: {e}") from e
  spec = registry.get_spec(cfg.model.name)
  is_published = _settings(cfg) == {"num_classes": spec.num_classes}
  result = variant.get("published", spec.top1 if is_published else None)
  if result is not None:
    results = result if isinstance(result, tuple) else (result,)
    names = [_MEASURES[m.name] for m in cfg.task.MEASURES
             if m.name in _MEASURES]
    result = ", ".join(f"{x:.1f} {name}" for x, name in zip(results, names))
    result += f" ({found.get('SOURCE', spec.source)})"
  elif "docs/results.md" in found["__doc__"]:
    result = "[measured](results.md)"
  optim, train = cfg.optim, cfg.train
  length = f"{train.epochs:g}"
  if train.steps is not None:
    length = f"{train.steps:,} steps"
  elif optim.cooldown_epochs:
    length += f" + {optim.cooldown_epochs:g}"
  n_params = spec.n_params if is_published else _n_params(cfg)
  return [
      f"`{argument}`", cfg.model.name, f"{n_params:,}",
      " x ".join(map(str, cfg.task.input_size)), f"{train.batch_size:,}",
      length, optim.name, f"{optim.base_lr * train.batch_size / 1024:.3g}",
      f"{cfg.model.drop_path_rate:g}", f"`{cfg.init}`" if cfg.init else "",
      result or "", variant.get("notes", "")]


def _settings(cfg: Experiment) -> dict[str, Any] | None:
  """What a classifier sets of its network, without its dropout."""
  if not isinstance(cfg.task, tasks.Classification):
    return None
  settings = cfg.model.overrides() | {"num_classes": cfg.task.num_classes}
  return {k: v for k, v in settings.items()
          if k not in ("drop_path_rate", "head_drop_rate")}


def _n_params(cfg: Experiment) -> int:
  """The parameters of the whole network of an experiment."""
  settings = _settings(cfg)
  if settings is not None:  # Its classes may be those of the user's data.
    return cost.of_model(registry.create_model(cfg.model.name, **settings),
                         cfg.task.image_size).n_params
  _, task = task_lib.create(cfg, files=False)
  params = jax.eval_shape(task.model.init, jax.random.key(0),
                          *task.init_inputs())["params"]
  return sum(x.size for x in jax.tree.leaves(params))


def page(args: argparse.Namespace) -> str:
  """The page, or the table alone, that the command line asks for."""
  if args.configs:
    folder = pathlib.Path(args.configs)
    if not any(folder.rglob("*.py")):
      raise errors.ConfigError(f"--configs: {folder} has no config files")
    return f"{_RECIPES}\n" + "\n".join(recipes(folder)) + "\n"
  if not registry.list_models(args.pattern):
    raise errors.ConfigError(f"no model matches {args.pattern!r}"
                             "; see metaformer_jax.list_models()")
  table = "\n".join(rows(args.pattern)) + "\n"
  return _MODELS + table if args.output else table


def layers(args: argparse.Namespace) -> str:
  """The layers of --model, or of the command line's experiment."""
  if not args.model:
    cfg, _ = cli.parse(elsewhere=True)
    summary = layer_table.of_experiment(cfg, args.depth)
  else:
    try:
      summary = layer_table.of_model(args.model, args.depth)
    except ValueError as e:
      raise errors.ConfigError(f"--model: {e}") from e
  text = (json.dumps(summary, indent=2) if args.json
          else layer_table.text(summary))
  return text + "\n"


def main(args: argparse.Namespace) -> None:
  """Prints or writes what the command line asks for."""
  text = layers(args) if args.model or _has_config() else page(args)
  if args.output:
    pathlib.Path(args.output).write_text(text)
  else:
    print(text, end="")


def parse() -> argparse.Namespace:
  """The tool's own part of the command line; the rest is the experiment's."""
  parser = command.Parser(__doc__, "summarize", allow_abbrev=False)
  parser.add_argument("pattern", nargs="?", default="*",
                      help="shell pattern of model names, all by default")
  parser.add_argument("--configs", help="a folder of config files; instead of "
                      "the models, their experiments are listed")
  parser.add_argument("--model", help="a model's layers")
  parser.add_argument("--depth", type=command.positive, default=2,
                      help="of the modules that have rows, 2 by default; with "
                      "--model, or --config and --config.KEY=VALUE")
  parser.add_argument("--json", action="store_true", help="layers as JSON")
  parser.add_argument("--output", help="a file to write instead of printing")
  args = command.own_arguments(parser)
  if args.model and _has_config():
    parser.error("--model cannot be combined with --config; set "
                 "--config.model.name")
  if not _has_config() and sys.argv[1:]:
    parser.error(f"unrecognized arguments: {' '.join(sys.argv[1:])}")
  return args


def _has_config() -> bool:
  return bool(cli.given("config") or cli.given("config_json"))


def console() -> None:
  """The command metaformer-summarize."""
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
