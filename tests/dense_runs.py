"""Runs of detection and segmentation as users start them, in processes.

A home is a folder with a tree of images, prepared/, which the tree was written
into by `tools.prepare`, and cfg.json.
"""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pods
import pytest
import small_runs
from flax import traverse_util

import metaformer_jax
from metaformer_jax import tasks
from metaformer_jax.checkpoints import manager
from metaformer_jax.config import resolve, saved, typed
from metaformer_jax.runtime import devices
from metaformer_jax.tools import prepare as prepare_tool
from metaformer_jax.training import backbone, loop

# Of runs that end in seconds, and compare well.
COMMON = {
    "data.source": "array_record", "optim.warmup_epochs": 0.0,
    "train.batch_size": 8, "eval.batch_size": 8, "checkpoint.every_steps": 4,
    "log.every_steps": 1, "log.tensorboard": False,
    "log.compilation_cache": ""}


def tool(name, *argv, n_devices=1, **kwargs) -> str:
  """Runs a tool to its end; returns what it printed."""
  done = subprocess.run(
      [sys.executable, "-m", f"metaformer_jax.tools.{name}", *map(str, argv)],
      env=pods.environment(n_devices), cwd=pods.ROOT, capture_output=True,
      text=True, timeout=300, check=False, **kwargs)
  assert done.returncode == 0, done.stderr
  return done.stdout


def prepare(home: pathlib.Path, source: str, tree: pathlib.Path, task: str,
            options: dict) -> pathlib.Path:
  """Makes a home of a folder that has the tree; returns it."""
  prepare_tool.main(prepare_tool.parse([
      f"--source={source}", f"--path={tree}", f"--output={home / 'prepared'}",
      "--shards=2"]))
  config = typed.default(task)
  options = {**COMMON, "data.path": str(home / "prepared"), **options}
  for key, value in options.items():
    section, _, name = key.partition(".")
    config[section][name] = value
  (home / "cfg.json").write_text(config.to_json())
  return home


def start(home: pathlib.Path, workdir: pathlib.Path, n_devices: int = 1,
          flags=()) -> subprocess.Popen:
  """Starts a process of a run, which adds to a log named after its workdir."""
  with (home / f"{workdir.name}.log").open("a") as stderr:
    return subprocess.Popen(
        [sys.executable, "-m", "metaformer_jax.main",
         f"--config_json={home / 'cfg.json'}", f"--workdir={workdir}", *flags],
        env=pods.environment(n_devices), cwd=pods.ROOT, stderr=stderr)


def finished(home: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
  """Runs to the end; returns the workdir."""
  codes = pods.finish([start(home, workdir)])
  assert codes == [0], (home / f"{workdir.name}.log").read_text()
  return workdir


def trained(home: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
  """As `finished`, in this process, on one device."""
  cfg = resolve.resolve(saved.read_json(home / "cfg.json"))
  mesh = devices.make_mesh(small_runs.changed(cfg, mesh={"data": 1}))
  cfg, task = tasks.create(cfg)
  loop.train_and_evaluate(cfg, task, mesh, workdir)
  return workdir


def flat(tree) -> dict[str, np.ndarray]:
  """Arrays by path."""
  return {name: np.asarray(x) for name, x in traverse_util.flatten_dict(
      dict(tree), sep="/").items()}


def require_equal(one, two) -> None:
  """Raises AssertionError unless two trees of arrays have the same values."""
  one, two = flat(one), flat(two)
  assert one.keys() == two.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(x, two[name], name)


def check_killed(home: pathlib.Path, whole: pathlib.Path,
                 measure: str) -> None:
  """A run killed after 11 steps and resumed ends like another, bit by bit."""
  workdir = home / "killed"
  process = start(home, workdir)
  pods.wait_for_step([process], workdir, 11)
  process.kill()
  process.wait()
  finished(home, workdir)
  assert "resumed" in (home / "killed.log").read_text()
  require_equal(*map(manager.read_variables, (whole, workdir)))
  losses = pods.losses(whole)
  assert losses == pods.losses(workdir)
  assert losses[max(losses)] < 0.9 * losses[1]  # Something is learned.
  measures = [pods.summary(path)[measure] for path in (whole, workdir)]
  assert measures[0] == measures[1] > 0


def check_tree_measures(workdir: pathlib.Path, source: str,
                        tree: pathlib.Path) -> None:
  """A tree measures what the files that were prepared from it do."""
  prepared, plain = (
      json.loads(tool("evaluate", f"--workdir={workdir}", *flags))
      for flags in ((), (f"--config.data.source={source}",
                         f"--config.data.path={tree}")))
  assert prepared == plain


def check_processes_measure(workdir: pathlib.Path) -> None:
  """2 processes with 4 devices each measure what 1 with 8 does."""
  one = json.loads(tool("evaluate", f"--workdir={workdir}", n_devices=8))
  processes = [subprocess.Popen(
      [sys.executable, "-m", "metaformer_jax.tools.evaluate",
       f"--workdir={workdir}", *flags], env=pods.environment(4), cwd=pods.ROOT,
      stdout=subprocess.PIPE, text=True) for flags in pods.flags_of(2)]
  found = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  assert json.loads(found[0].splitlines()[-1]) == one  # After Gloo's lines.


def check_processes_train(home: pathlib.Path, steps: int) -> None:
  """2 processes with 4 devices each train like 1 with 8."""
  runs, short = (home / "one", home / "two"), f"--config.train.steps={steps}"
  assert pods.finish([start(home, runs[0], 8, [short])]) == [0]
  processes = [start(home, runs[1], 4, [short, *flags])
               for flags in pods.flags_of(2)]
  assert pods.finish(processes) == [0, 0]
  one, two = (pods.losses(path) for path in runs)
  assert len(one) == steps
  assert one == pytest.approx(two, rel=1e-3)


def check_warm_start(workdir: pathlib.Path, last_layer: set[str]) -> None:
  """A run starts from all of another, as config.init.

  If the classes are others, it does so without the last layer.
  """
  loaded = metaformer_jax.load(workdir)
  shapes = jax.eval_shape(loaded.model.init, jax.random.key(0),
                          *loaded.task.init_inputs())
  want = flat(loaded.variables)
  for other_classes in (False, True):
    found = flat(backbone.read_weights(
        str(workdir), loaded.task.pretrained, shapes,
        whole=loaded.task.family, other_classes=other_classes))
    assert want.keys() - found.keys() == (last_layer if other_classes
                                          else set())
    assert all(np.array_equal(found[name], want[name]) for name in found)
