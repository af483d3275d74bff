r"""Measures the speed of a training step and of predictions on this machine:

    python -m metaformer_jax.tools.benchmark --model=poolformer_s12
    python -m metaformer_jax.tools.benchmark --model=caformer_s18 \
        --batch_size=256 --dtype=bfloat16 --against=timm --timm-python=PYTHON
    python -m metaformer_jax.tools.benchmark --config=configs/caformer.py:s18 \
        --config.optim.name=adamw --mode=train --batch_size=128 --trace=profile

The training step is the one that a run compiles, augmentation on the device,
optimizer and checks included; predictions are those of an evaluation. Images
and labels are random, and on the device. --model takes the recipe of DeiT on
ImageNet; of "semantic_fpn/poolformer_s12", "mask_rcnn/pvt_tiny", ... that of
the decoder. With --config, --config.KEY=VALUE overrides one value.

images/s is the median of the rounds; p50, p90 and p99 are milliseconds of a
batch for which the program waits. MFU is the part of the chip's bfloat16 peak
that the multiplications of the traced program (GFLOP of an image, with two for
a multiply-accumulate) would need; it is empty where the peak is not known. MiB
is the peak of a device, or without one of the process ("memory of"). JSON
(--json) has all of this in one object.

--against=timm measures timm's model of the same name in another interpreter, on
the same kind of device, in turns with ours, and prints how many times as fast
ours is over the pairs of neighbouring rounds. timm's step is the forward and
the backward pass and AdamW, without mixing and erasing; bfloat16 is autocast.
Then both use one device. --trace=FOLDER writes a profile for TensorBoard or
Perfetto, and prints where the time goes, in the kinds of operations and in the
parts of the model.

--compiled_for=v5litepod-8 measures nothing: the TPU's compiler, libtpu,
compiles the programs for a slice that is not here, and its counts are printed.
Of an image: GFLOP and MB read and written, also by kind of operation and by
part of the model; HBM is the part of these MB that is not in the memory next to
the cores. Of a chip: images, GiB at most, MB sent in a step, and the images/s
that the chip's published rates allow, with the rate that sets this limit.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import util
from typing import Any

from metaformer_jax import command, errors, recipes
from metaformer_jax.benchmark import workers
from metaformer_jax.config import paths, schema, typed
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import tasks as sections
from metaformer_jax.models import registry
from metaformer_jax.preflight import topologies
from metaformer_jax.recipes import classification
from metaformer_jax.tools import output

# The decoders of a backbone's name with --task.
_HEADS = {"classification": "", "segmentation": "semantic_fpn/",
          "detection": "retinanet/"}
_MODES, _FORMS = ("train", "infer"), ("eager", "channels_last", "compile")
_DIGITS = {"images/s": 1, "p50 ms": 2, "p90 ms": 2, "p99 ms": 2, "MiB": 0,
           "compile s": 1, "GFLOP": 3, "MFU": 3, "median": 2, "min": 2,
           "max": 2, "ms": 2, "share": 3, "MB": 1, "HBM": 1, "GiB": 2,
           "MB sent": 1, "a chip": 0}
_SHOWN = 25  # Rows of the largest parts; --json has all.


def of_model(name: str, task: str | None) -> schema.Experiment:
  """The experiment of --model and --task.

  Raises:
    ConfigError: there is no such model.
  """
  try:
    if "/" not in name:
      name = _HEADS[task or "classification"] + registry.get_spec(name).name
    if "/" in name:
      config = recipes.published(name)
    else:
      config = classification.imagenet(name, drop_path_rate=0.1)
      config.model.dtype = "float32"
    config.train.batch_size = 32
  except (ValueError, errors.ConfigError) as e:
    raise errors.ConfigError(f"--model: {e}") from e
  cfg = typed.typed(config)
  if task not in (None, cfg.task.name):
    raise errors.ConfigError(f"--task: {name} is for {cfg.task.name}, not "
                             f"{task}")
  return cfg


def experiment(args: argparse.Namespace,
               overrides: list[str]) -> schema.Experiment:
  """The experiment of the command line, as for a run.

  Raises:
    ConfigError: the command line or the config is wrong.
  """
  if not overrides:
    if args.model is None:
      raise errors.ConfigError("--model: is missing; give e.g. "
                               "--model=poolformer_s12, or --config")
    return of_model(args.model, args.task)
  # Needs packages that --model alone does not.
  from metaformer_jax import cli  # noqa: PLC0415

  sys.argv = [sys.argv[0], *overrides]
  is_config = any(re.match("--?config(_json)?(=|$)", arg) for arg in overrides)
  if is_config and (args.model or args.task):
    raise errors.ConfigError("--model and --task: cannot be combined with "
                             "--config, which names them")
  cfg, _ = cli.parse(elsewhere=True, otherwise=lambda: args.model and of_model(
      args.model, args.task))
  return cfg


def cases(cfg: schema.Experiment, args: argparse.Namespace,
          ) -> Iterator[tuple[str, schema.Experiment]]:
  """The experiment with each mode and batch size of the command line.

  Yields:
    (mode, experiment): checked, but for what needs jax.

  Raises:
    ConfigError: a value does not fit.
  """
  if args.dtype:
    cfg = _replaced(cfg, "model", dtype=args.dtype)
  if args.image_size:
    n = args.image_size
    key = {"classification": {"image_size": n},
           "segmentation": {"crop_size": (n, n), "scale": (4 * n, n)},
           "detection": {"scale": (n, n)}}.get(cfg.task.name)
    if key is None:
      raise errors.ConfigError("--image_size: is not known for a task of your "
                               "own; use --config.task.KEY=VALUE")
    cfg = _replaced(cfg, "task", **key)
  if args.against:  # timm uses one device.
    cfg = dataclasses.replace(cfg, mesh=schema.Mesh())
  for mode in args.mode:
    for n in args.batch_size or [cfg.train.batch_size]:
      changed = _replaced(cfg, "train", batch_size=n)
      if mode == "infer":  # A batch need not be divisible, as in training.
        changed = _replaced(changed, "train", accumulate=1)
        if hasattr(cfg.task, "loss_group"):
          changed = _replaced(changed, "task", loss_group=1)
      yield mode, config_lib.resolve(typed.as_dict(changed), files=False)


def _replaced(cfg: schema.Experiment, section: str,
              **values: Any) -> schema.Experiment:
  return dataclasses.replace(cfg, **{
      section: dataclasses.replace(getattr(cfg, section), **values)})


def measure(mode: str, cfg: schema.Experiment,
            args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
  """Measures one mode and batch size.

  Returns:
    Rows of "measured", "ratios", "failed" and "operations".

  Raises:
    UserError: our program cannot be measured.
  """
  case = _case(mode, cfg)
  found = {"measured": [], "ratios": [], "failed": [], "operations": []}
  with contextlib.ExitStack() as stack:
    ours = _ours(stack, case, cfg, args)
    others = list(_theirs(stack, case, cfg, args, ours.facts["platform"],
                          found))
    programs = [ours, *others]
    failed = workers.in_turns(programs, args.rounds, args.seconds,
                              lambda line: _say(case, line))
    for name, reason in failed.items():
      _fail(case, found, name, reason)
    for program in programs:
      if program.name not in failed:
        row = case | {"program": program.name} | program.row()
        found["measured"].append(row | _work(ours.facts, row["images/s"]))
    found["ratios"] = [case | workers.ratios(ours, other) for other in others
                       if other.name not in failed]
    if args.trace:
      folder = args.trace / "_".join(map(str, case.values())).replace("/", "_")
      _say(case, f"writing a profile into {folder}")
      found["operations"] = [case | row for row in ours.trace(folder)]
  return found


def compile_for(mode: str, cfg: schema.Experiment,
                args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
  """Compiles one mode and batch size for `--compiled_for`.

  Returns:
    As `measure`, of which only "measured" and "operations" have rows.

  Raises:
    ConfigError: the program does not fit the slice, or libtpu is missing.
  """
  from metaformer_jax.benchmark import compiled  # noqa: PLC0415  Imports jax.

  case = _case(mode, cfg) | {"program": args.compiled_for.name}
  _say(case, "compiling; a large model takes minutes")
  found = compiled.measure(cfg, mode, args.compiled_for,
                           lambda line: _say(case, f"warning: {line}"))
  return {"ratios": [], "failed": []} | {
      key: [case | row for row in rows] for key, rows in found.items()}


def _case(mode: str, cfg: schema.Experiment) -> dict[str, Any]:
  return {"model": _name(cfg), "mode": mode, "batch": cfg.train.batch_size,
          "dtype": cfg.model.dtype}


def _ours(stack: contextlib.ExitStack, case: Mapping[str, Any],
          cfg: schema.Experiment, args: argparse.Namespace) -> workers.Worker:
  """Our program, ready."""
  _say(case, "metaformer_jax: compiling")
  return stack.enter_context(workers.ours(
      typed.as_dict(cfg), case["mode"], case["batch"],
      1 if args.against else None, _environment(args)).running())


def _theirs(stack: contextlib.ExitStack, case: Mapping[str, Any],
            cfg: schema.Experiment, args: argparse.Namespace, platform: str,
            found: dict[str, list[dict[str, Any]]]) -> Iterator[workers.Worker]:
  """timm's programs that can be prepared; adds why others cannot."""
  for form in args.timm_forms if args.against else ():
    spec = workers.timm_spec(cfg, case["mode"])
    other = workers.theirs(args.timm_python, spec | {
        "form": form, "platform": platform})
    _say(case, f"{other.name}: preparing")
    try:
      yield stack.enter_context(other.running())
    except workers.WorkerError as e:
      _fail(case, found, other.name, errors.one_line(e))


def _fail(case: Mapping[str, Any], found: dict[str, list[dict[str, Any]]],
          name: str, reason: str) -> None:
  _say(case, f"failed: {reason}")
  found["failed"].append({**case, "program": name, "error": reason})


def _name(cfg: schema.Experiment) -> str:
  """The model's name, with the decoder's if there is one."""
  name = cfg.model.name or cfg.task.name
  head = getattr(cfg.task, "head", None)
  return f"{head}/{name}" if head else name


def _environment(args: argparse.Namespace) -> dict[str, str]:
  """Of the process that measures ours."""
  env = dict(os.environ)
  if args.against:  # The GPU's memory is for several processes.
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if args.trace and util.find_spec("jax_plugins"):
    # In CUDA's graphs, operations have no names.
    env["XLA_FLAGS"] = (env.get("XLA_FLAGS", "")
                        + " --xla_gpu_enable_command_buffer=")
  return env


def _work(facts: Mapping[str, Any], rate: float) -> dict[str, Any]:
  """FLOP of an image, and the part of the chip's peak that is used."""
  flops, peak = facts["flops_per_image"], facts["peak_flops"]
  return {"GFLOP": flops / 1e9, "MFU": peak and flops * rate / peak,
          "device": facts["device"], "devices": facts["n_devices"]}


def _say(case: Mapping[str, Any], text: str) -> None:
  print(f"benchmark: {' '.join(map(str, case.values()))}: {text}",
        file=sys.stderr, flush=True)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
  """Measures every case, and prints the tables."""
  if bool(args.against) != bool(args.timm_python):
    raise errors.ConfigError("--against=timm: needs --timm-python, the "
                             "interpreter that has timm, and the other way "
                             "round")
  if args.compiled_for:
    if args.against or args.trace:
      raise errors.ConfigError("--compiled_for: measures nothing; leave out "
                               "--against and --trace")
    args.compiled_for = topologies.parse(args.compiled_for, "--compiled_for")
    os.environ.update(topologies.ENVIRONMENT)
  if args.trace:
    args.trace = _folder(args.trace)
  every = list(cases(experiment(args, overrides), args))
  for mode, cfg in every if args.against else ():
    workers.timm_spec(cfg, mode)  # What is wrong is said first.
  found = {}
  for mode, cfg in every:
    for key, rows in (compile_for if args.compiled_for else measure)(
        mode, cfg, args).items():
      found[key] = found.get(key, []) + rows
  if args.json:
    print(json.dumps(found))
    return
  print("\n\n".join(tables(found)))


def tables(found: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
  """What --json prints as one object, as tables."""
  from metaformer_jax.benchmark import profiles  # noqa: PLC0415  Imports jax.

  yield output.table(found["measured"], _DIGITS)
  if found["ratios"]:
    yield output.table(found["ratios"], _DIGITS)
  for case in found["measured"] if found["operations"] else ():
    own = [row for row in found["operations"]
           if all(row[key] == case[key] for key in ("mode", "batch"))]
    if case["program"].startswith("timm"):
      continue
    unit, of = ("HBM", "an image") if "HBM" in own[0] else ("ms", "a call")
    name = f"{case['model']} {case['mode']} {case['batch']}: {unit} of {of}"
    yield (f"{name} by kind of operation\n"
           + output.table(profiles.by(own, "kind", unit=unit), _DIGITS))
    parts = profiles.by(own, "phase", "part", unit=unit)
    yield (f"{name} by part, the {_SHOWN} largest of {len(parts)}\n"
           + output.table(parts[:_SHOWN], _DIGITS))


def _folder(value: str) -> pathlib.Path:
  """Makes the folder of --trace."""
  folder = paths.local("--trace", value)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.ConfigError(f"--trace: {value} cannot be made: {e}") from e
  return folder


def parse() -> tuple[argparse.Namespace, list[str]]:
  """The command line, and the flags of a run: config and overrides."""
  parser = command.Parser(
      __doc__, "benchmark", allow_abbrev=False,
      epilog="--config, --config_json and overrides are as for a run.")
  parser.add_argument("--model", help="a name of list_models(), also after a "
                      "decoder's, as semantic_fpn/poolformer_s12")
  parser.add_argument("--task", choices=sections.TASKS, help="with a name "
                      "alone: segmentation takes semantic_fpn, detection "
                      "retinanet")
  parser.add_argument("--batch_size", type=_sizes, help="images of a call, on "
                      "all devices; several by commas. Default: the config's, "
                      "or 32")
  parser.add_argument("--mode", type=_names(_MODES), default=_MODES,
                      help="train, infer or both, the default: train,infer")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                      help="of the computation. Default: the config's, or "
                      "float32")
  parser.add_argument("--image_size", type=command.positive, help="side of the "
                      "images in pixels. Default: the model's")
  parser.add_argument("--rounds", type=command.positive, default=5,
                      help="measurements of each program (5)")
  parser.add_argument("--seconds", type=float, default=2.0,
                      help="about how long each of them takes (2)")
  parser.add_argument("--against", choices=("timm",), help="also measure timm")
  parser.add_argument("--timm-python", help="an interpreter that has timm")
  parser.add_argument("--timm-forms", type=_names(_FORMS), default=_FORMS,
                      help=f"of timm's; default: {','.join(_FORMS)}")
  parser.add_argument("--trace", help="a folder for profiles")
  parser.add_argument("--compiled_for", metavar="SLICE", help="a TPU slice, as "
                      "v5litepod-8: compile for it, and measure nothing")
  parser.add_argument("--json", action="store_true", help="instead of tables")
  args, rest = parser.parse_known_args()
  if rest and not any(re.match("--?config", arg) for arg in rest):
    parser.error(f"{rest[0]!r} is not a flag")
  return args, rest


def _sizes(text: str) -> list[int]:
  return [command.positive(part) for part in text.split(",")]


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
  """Reads some of the known names, by commas."""

  def read(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
      if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    return names

  return read


def console() -> None:
  """The command metaformer-benchmark."""
  with command.one_line_errors():
    main(*parse())


if __name__ == "__main__":
  console()
