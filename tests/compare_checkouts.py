r"""Compares the programs of two checkouts of this repository:

    git worktree add /tmp/before REVISION
    python tests/compare_checkouts.py /tmp/before .

For each of the experiments below, the training and the evaluation step are
lowered by the code of either checkout, on eight fake devices. The texts must be
equal, with symbols numbered in the order in which they appear. If they are not,
both run one step of the model with fewer blocks, on the same batch: parameters,
gradients, metrics and the outputs of the evaluation must be equal bit for bit.

Not a part of the test suite: it is for changes that must not change a number.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# Keys that have moved: for a checkout that lacks the first, the second is set.
RENAMED = {
    "task.num_classes": "model.num_classes",
    "task.image_size": "data.image_size",
    **{f"task.{key}": f"train.{key}" for key in (
        "loss", "bce_threshold", "label_smoothing", "mixup", "cutmix",
        "erasing")},
}

_SMALL = {"data.source": "digits", "task.num_classes": 10,
          "task.image_size": 64, "train.batch_size": 32, "train.steps": 100,
          # Some models have others, which older checkouts did not use.
          "data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225)}
_MIXED = {"task.mixup": 0.8, "task.cutmix": 1.0, "task.erasing": 0.25}

EXPERIMENTS = {
    "poolformer, adamw, mixing, drop path": {
        "model.name": "poolformer_s12", "model.drop_path_rate": 0.1, **_MIXED},
    "poolformer, bfloat16, fsdp": {
        "model.name": "poolformer_s24", "model.dtype": "bfloat16",
        "mesh.fsdp": 4, "mesh.min_size": 1024},
    "hybrid with position embedding, accumulate": {
        "model.name": "metaformer_ppaa_s12_224", "train.accumulate": 4},
    "poolformer, batch norm, ema": {
        "model.name": "poolformer_s12", "model.norm": "batch_norm",
        "train.ema_decay": 0.99},
    "identityformer": {"model.name": "identityformer_s12"},
    "randformer": {"model.name": "randformer_s12", "model.drop_path_rate": 0.1},
    "convformer, layer-wise decay": {
        "model.name": "convformer_s18", "optim.layer_decay": 0.8},
    "caformer, lamb, head dropout": {
        "model.name": "caformer_s18", "model.head_drop_rate": 0.4,
        "model.drop_path_rate": 0.15, "optim.name": "lamb",
        "optim.schedule_per": "epoch"},
    "resnet, sgd, bce, ema": {
        "model.name": "resnet50", "optim.name": "sgd", "task.loss": "bce",
        "task.bce_threshold": 0.2, "train.ema_decay": 0.9},
    "deit, clipping": {
        "model.name": "deit_small_patch16_224", "optim.clip_norm": 1.0},
    "pvt, accumulate, fsdp": {
        "model.name": "pvt_tiny", "train.accumulate": 2, "mesh.fsdp": -1,
        "mesh.data": 2},
    "mlp-mixer": {"model.name": "mixer_b16_224"},
    "resmlp, drop path": {
        "model.name": "resmlp_12_224", "model.drop_path_rate": 0.1},
}


def with_few_blocks(settings):
  """The experiment with one block in each stage, or two in all."""
  is_pyramid = not settings["model.name"].startswith(
      ("deit", "mixer", "resmlp"))
  return settings | ({"model.depths": (1, 1, 1, 1)} if is_pyramid else
                     {"model.depth": 2})


def experiment(settings):
  """The experiment, task and mesh of the checkout that is imported."""
  from metaformer_jax import tasks  # noqa: PLC0415
  try:
    from metaformer_jax.config import resolve as config_lib  # noqa: PLC0415
    from metaformer_jax.config import typed  # noqa: PLC0415
    from metaformer_jax.runtime import devices  # noqa: PLC0415
  except ImportError:
    from metaformer_jax import config as config_lib  # noqa: PLC0415
    from metaformer_jax.training import sharding as devices  # noqa: PLC0415
    typed = config_lib

  known, config = typed.keys(), typed.default()
  config.update_from_flattened_dict({
      key if key in known else RENAMED[key]: value
      for key, value in (_SMALL | settings).items()})
  made = tasks.create(config_lib.resolve(config))
  if not isinstance(made, tuple):
    made = config_lib.resolve(config), made
  cfg, task = made
  return cfg, task, devices.make_mesh(cfg)


def programs(cfg, task, mesh):
  """{name: (function, arguments)} to lower; arguments are abstract."""
  import jax  # noqa: PLC0415

  from metaformer_jax.training import step  # noqa: PLC0415
  try:
    from metaformer_jax.training import program  # noqa: PLC0415
  except ImportError:
    program = step
  built = program.build(cfg, task, mesh, 1500)
  arguments = program.abstract_arguments(cfg, task, mesh, built)
  if isinstance(arguments, list):
    arguments, = arguments
  state, batch, flags = arguments
  evaluators = {} if program is not step else {
      "evaluators": task.make_evaluators()}
  rngs = {name: jax.random.key(i) for i, name in enumerate(
      ("augment", "dropout", "drop_path"))}

  def evaluate(state, batch, flags):
    batch = {**batch, "mask": ~batch["replaced"]}
    return (step.eval_step(state.eval_variables(), batch, task=task,
                           **evaluators), step.notes(batch, flags))

  def gradients(state, batch, flags):
    del flags
    return step.gradients(task, state, batch, rngs, cfg.train.accumulate)[0]

  return built, (state, batch, flags), {
      "train": built.step, "eval": jax.jit(evaluate),
      "gradients": jax.jit(gradients)}


def normalized(text):
  """The text of a program, with symbols numbered in order of appearance."""
  numbers = {}
  return re.sub(r"@[\w.$-]+", lambda match: numbers.setdefault(
      match[0], f"@{len(numbers)}"), text)


def probe(settings, out, run):
  """Writes the texts of an experiment's programs, or what they compute."""
  import jax  # noqa: PLC0415
  import numpy as np  # noqa: PLC0415

  cfg, task, mesh = experiment(with_few_blocks(settings) if run else settings)
  built, abstract, functions = programs(cfg, task, mesh)
  if not run:
    for name in ("train", "eval"):
      text = functions[name].lower(*abstract).as_text()
      (out / name).write_text(normalized(text))
    return
  rng = np.random.default_rng(0)
  _, batch, flags = abstract
  batch = {name: jax.device_put(
      rng.integers(0, 2 if x.dtype == bool else 10, x.shape).astype(x.dtype),
      x.sharding) for name, x in batch.items()}
  flags = jax.device_put(np.zeros(flags.shape, flags.dtype), flags.sharding)
  found = {}
  for name in ("gradients", "eval", "train"):  # The last one donates the state.
    state = jax.jit(built.create, out_shardings=built.shardings)()
    found[name] = functions[name](state, batch, flags)
  leaves = jax.tree_util.tree_leaves_with_path(found)
  np.savez(out / "values.npz", **{
      jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves})


def start(checkout, settings, out, run):
  """Runs `probe` with the code of a checkout."""
  out.mkdir(parents=True, exist_ok=True)
  flags = "--xla_force_host_platform_device_count=8"
  env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu",
                      "XLA_FLAGS": flags}
  command = [sys.executable, __file__, f"--probe={out}", json.dumps(settings)]
  return subprocess.Popen([*command, *(["--run"] if run else [])], env=env,
                          cwd=checkout)


def compare_values(folders):
  """Lists the arrays that differ."""
  import numpy as np  # noqa: PLC0415

  old, new = (np.load(folder / "values.npz") for folder in folders)
  names = [re.sub(r"\W", "", name) for name in old.files]
  others = {re.sub(r"\W", "", name): name for name in new.files}
  if set(names) != set(others):
    return sorted(set(names) ^ set(others))
  return [name for name, key in zip(names, old.files)
          if old[key].tobytes() != new[others[name]].tobytes()]


def compare(checkouts, settings, out):
  """How the programs of two checkouts compare; and whether they are equal."""
  for run in (False, True):
    folders = [out / side for side in ("old", "new")]
    with contextlib.ExitStack() as stack:
      processes = [stack.enter_context(start(*each, run)) for each in zip(
          checkouts, itertools.repeat(settings), folders)]
    if any(process.returncode for process in processes):
      return "cannot be lowered or run", False
    if not run:
      different = [name for name in ("train", "eval") if len(
          {(folder / name).read_text() for folder in folders}) > 1]
      lines = len((folders[0] / "train").read_text().splitlines())
      if not different:
        return f"the same text, {lines} lines of the training step", True
  bad = compare_values(folders)
  if bad:
    return f"{len(bad)} arrays differ: {', '.join(bad[:3])}", False
  return f"another text ({', '.join(different)}), all values bit-equal", True


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("old", nargs="?")
  parser.add_argument("new", nargs="?")
  parser.add_argument("--only", default="", help="part of a name")
  parser.add_argument("--keep", help="folder for the texts")
  parser.add_argument("--probe", help=argparse.SUPPRESS)
  parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.probe:
    probe(json.loads(args.old), pathlib.Path(args.probe), args.run)
    return 0
  checkouts = [pathlib.Path(path).absolute() for path in (args.old, args.new)]
  all_equal = True
  with tempfile.TemporaryDirectory() as temporary:
    for i, (name, settings) in enumerate(EXPERIMENTS.items()):
      if args.only in name:
        found, equal = compare(checkouts, settings,
                               pathlib.Path(args.keep or temporary) / str(i))
        all_equal &= equal
        print(f"{'ok' if equal else 'DIFFERS':<8} {name}: {found}", flush=True)
  return 0 if all_equal else 1


if __name__ == "__main__":
  raise SystemExit(main())
