"""Runs with parts of a user's own: rebuilt from the workdir, never by data."""

import argparse
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pods
import pytest
import small_runs

import metaformer_jax
from metaformer_jax import errors, inference, tasks
from metaformer_jax.checkpoints import manager
from metaformer_jax.config import default, own, resolve, saved
from metaformer_jax.convert import files
from metaformer_jax.runtime import devices
from metaformer_jax.tools import convert
from metaformer_jax.training import evaluate

MODULE = """
import functools
import jax.numpy as jnp
from flax import linen as nn

class Scale(nn.Module):
  dim: int
  dtype: jnp.dtype | None = None
  by: float = 1.0

  @nn.compact
  def __call__(self, x, *, mask=None, train=False):
    scale = self.param("scale", nn.initializers.ones, (self.dim,))
    scale = scale.reshape(1, 1, 1, -1).astype(x.dtype)
    return x * scale * self.by

Twice = functools.partial(Scale, by=2.0)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  """A module of the user's own, in the working directory."""
  name = "own_" + tmp_path.name.replace("-", "_")
  (tmp_path / f"{name}.py").write_text(MODULE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(own, "_REMEMBERED", str(tmp_path / "own_runs"))
  yield name
  sys.modules.pop(name, None)


def experiment(module, **sections):
  config = default()
  config.model.update({
      "name": "poolformer_s12", "depths": (1, 1), "dims": (8, 16),
      "token_mixers": ("pooling", f"{module}:Twice"), "layer_scale_init": 0.1})
  config.data.source = "digits"
  config.task.image_size = 16
  config.train.update({"batch_size": 32, "steps": 4, "ema_decay": 0.5})
  config.checkpoint.update({"every_steps": 2, "keep_last": 5})
  config.log.tensorboard = False
  for section, keys in sections.items():
    config[section].update(keys)
  return tasks.create(resolve.resolve(config))


def state(cfg, task, workdir, step):
  restored, _ = small_runs.restore(cfg, task, workdir, step)
  return jax.tree.map(np.asarray, restored.trees())


@pytest.mark.slow
def test_a_run_is_resumed_evaluated_converted_and_loaded(
    module, caplog, monkeypatch):
  cfg, task = experiment(module)
  workdir = pathlib.Path("runs/own")
  small_runs.run(cfg, task, workdir)
  want = state(cfg, task, workdir, 4)

  # Resumed from step 2, with a module that has changed in a comment.
  shutil.rmtree(workdir / "checkpoints/4")
  path = pathlib.Path(f"{module}.py")
  path.write_text(MODULE + "# Changed.\n")
  with caplog.at_level(logging.WARNING, "metaformer_jax"):
    small_runs.run(cfg, task, workdir)
  assert f"the module {module} has changed since" in caplog.text
  jax.tree.map(np.testing.assert_array_equal, want,
               state(cfg, task, workdir, 4))

  # Loaded without a word about the model, and the same as the evaluation.
  loaded = metaformer_jax.load(workdir)
  assert loaded.model == task.model
  assert loaded.cfg == cfg
  mesh = devices.make_mesh(cfg)
  result = evaluate.evaluate_checkpoint(cfg, task, mesh, workdir, "last")
  data = task.make_data("eval")
  right = n = 0
  for batch in data.eval_batches():
    outputs = np.asarray(task.predict(loaded.variables, batch))
    right += ((outputs.argmax(-1) == batch["label"]) & batch["mask"]).sum()
    n += batch["mask"].sum()
  assert (n, right / n) == (297, pytest.approx(result["top1"], abs=1e-6))

  # Converted, with our names only, and loaded from the file.
  arguments = {"model": None, "input": str(workdir),
               "output": "own.safetensors", "num_classes": None,
               "head_21k": False, "in_chans": 3, "input_size": None,
               "allow_import": ""}
  for layout in ("official", "timm"):
    with pytest.raises(errors.ConfigError, match=f"the {layout} layout has no"):
      convert.main(argparse.Namespace(**arguments, layout=layout))
  convert.main(argparse.Namespace(**arguments, layout="flax"))
  with pytest.raises(errors.ConfigError, match="--allow_import="):
    metaformer_jax.load("own.safetensors")
  again = metaformer_jax.load("own.safetensors", allow_import=module)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables,
               again.variables)
  assert again.class_names == loaded.class_names

  # The model and its settings come from `config.init`.
  monkeypatch.setattr(manager, "log", logging.getLogger("unused"))
  config = default()
  config.init, config.data.source = str(workdir), "digits"
  taken, _ = tasks.create(resolve.resolve(config))
  assert taken.model == cfg.model and taken.task.image_size == 16


@pytest.mark.slow
@pytest.mark.parametrize("settings,words", [
    ({"token_mixers": ("pooling", "{module}:Scale")}, "token_mixers"),
    ({"pool_size": 7}, "pool_size")])
def test_other_settings_than_the_runs_are_an_error(module, settings, words):
  cfg, task = experiment(module)
  small_runs.run(cfg, task, pathlib.Path("runs/own"))
  settings = {k: tuple(s.format(module=module) for s in v)
              if isinstance(v, tuple) else v for k, v in settings.items()}
  with pytest.raises(errors.WeightsError, match=words):
    metaformer_jax.load("runs/own", **settings)
  with pytest.raises(errors.WeightsError, match=words):
    metaformer_jax.load_pretrained("poolformer_s12", "runs/own", **settings)


def test_data_imports_nothing(module, tmp_path):
  """Copies of a run, its JSON and its weights name a module with a trap."""
  cfg, task = experiment(module)
  workdir = pathlib.Path("runs/own")
  small_runs.run(cfg, task, workdir)
  sys.modules.pop(module)
  trap = tmp_path / "executed"
  path = pathlib.Path(f"{module}.py")
  path.write_text(f"open({str(trap)!r}, 'w').close()\n{MODULE}")
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  files.write_safetensors(tmp_path / "file.safetensors", {
      "params/x": np.zeros(1, np.float32)}, {
          saved.METADATA: (workdir / "config.json").read_text()})
  json_path = copy / "config.json"
  config = default()
  config.data.source = "digits"

  def init_of(path):
    changed = config.copy_and_resolve_references()
    changed.init = str(path)
    return tasks.create(resolve.resolve(changed))

  for read in (lambda: metaformer_jax.load(copy),
               lambda: metaformer_jax.load(copy / "checkpoints"),
               lambda: metaformer_jax.load(copy / "checkpoints/4"),
               lambda: metaformer_jax.load(tmp_path / "file.safetensors"),
               lambda: metaformer_jax.load_pretrained("poolformer_s12", copy),
               lambda: inference.experiment(copy),
               lambda: saved.read_run(copy),
               lambda: saved.read_json(json_path),
               lambda: saved.read_json(json_path, ["own", module[:-1]]),
               lambda: init_of(copy),
               lambda: init_of(tmp_path / "file.safetensors")):
    with pytest.raises(errors.ConfigError) as caught:
      read()
    assert f"--allow_import={module}" in str(caught.value)
  # Where the run was made, but of another experiment.
  tree = json.loads((workdir / "config.json").read_text())
  tree["seed"] += 1
  (workdir / "config.json").write_text(json.dumps(tree))
  with pytest.raises(errors.ConfigError, match="--allow_import="):
    metaformer_jax.load(workdir)
  assert module not in sys.modules and not trap.exists()
  metaformer_jax.load(copy, allow_import=module)
  assert trap.exists()


@pytest.mark.parametrize("key", [
    "model.name", "model.norm", "model.activation", "data.source", "task.name"])
def test_every_path_of_a_json_file_needs_permission(tmp_path, key):
  section, name = key.split(".")
  path = tmp_path / "config.json"
  tree = {"model": {"name": "poolformer_s12"}, "data": {"source": "digits"}}
  tree.setdefault(section, {})[name] = "evil.module:Thing"
  path.write_text(json.dumps(tree))
  with pytest.raises(errors.ConfigError, match=r"--allow_import=evil\.module"):
    saved.read_json(path)
  cfg = resolve.resolve(saved.read_json(path, ["evil"]))
  with pytest.raises(errors.ConfigError, match="there is no module 'evil'"):
    tasks.create(cfg)


@pytest.mark.parametrize("path,words", [
    ("no_such_module:Thing", "there is no module 'no_such_module'"),
    ("{module}:Scales", "did you mean Scale"),
    ("{module}:MODULE", "has no 'MODULE'"),
    ("{module}:nn", "is a module, which cannot be called"),
    ("{module}:jnp.zeros_like", "mixer(x, *, mask=None, train=False) -> x"),
    ("{module}", "is not a choice or an import path"),
    ("{module}:", "is not a choice or an import path"),
])
def test_a_wrong_path_is_one_line(module, path, words):
  with pytest.raises(errors.ConfigError) as caught:
    experiment(module, model={"token_mixers": (
        "pooling", path.format(module=module))})
  assert words in str(caught.value) and "\n" not in str(caught.value)
  assert "token_mixers" in str(caught.value)


def test_a_module_that_fails_is_one_line(module):
  pathlib.Path(f"{module}.py").write_text("import nothing_like_this\n")
  with pytest.raises(errors.ConfigError, match="cannot be imported: Module"):
    experiment(module)
  pathlib.Path(f"{module}.py").write_text("def f(:\n")
  with pytest.raises(errors.ConfigError, match="SyntaxError"):
    experiment(module)


@pytest.mark.slow
def test_all_processes_need_the_module(module, tmp_path):
  """One of two has no such module; then, another one."""
  config = tmp_path / "config.py"
  config.write_text(
      "from metaformer_jax.config import default\n"
      "def get_config():\n"
      "  config = default()\n"
      "  config.model.name = 'poolformer_s12'\n"
      "  config.model.depths, config.model.dims = (1,), (8,)\n"
      f"  config.model.token_mixers = ('{module}:Twice',)\n"
      "  config.data.source = 'digits'\n"
      "  config.task.image_size = 16\n"
      "  config.train.batch_size = 8\n"
      "  config.mesh.heartbeat_seconds = 5\n"
      "  return config\n")
  other = tmp_path / "other"
  other.mkdir()
  for code, words in ((None, f"there is no module '{module}'"),
                      (f"{MODULE}# Another.\n",
                       f"other code of the module {module};")):
    if code:
      (other / f"{module}.py").write_text(code)
    flags = pods.flags_of(2)
    processes = [subprocess.Popen(
        [sys.executable, "-m", "metaformer_jax.main", f"--config={config}",
         f"--workdir={tmp_path / 'runs'}", *flags[i]], cwd=cwd, text=True,
        stderr=subprocess.PIPE, env=pods.environment(1))
        for i, cwd in enumerate((tmp_path, other))]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert all(words in line for line in said), said
    assert not (tmp_path / "runs").exists()
