"""Running out of memory, for real, is one line that says what to do; code 2.

The arrays have more bytes than a process can address, so that no memory is
taken, whatever the machine has.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import line_task
import numpy as np
import pytest
import small_runs

from metaformer_jax import errors, inference
from metaformer_jax.runtime import devices
from metaformer_jax.training import evaluate

ROOT = pathlib.Path(__file__).parents[2]
HUGE = 2**46


def huge(x):
  """0, by way of an array that cannot be allocated."""
  values = jnp.arange(HUGE, dtype=jnp.float32) * x.mean()
  return 0 * jax.lax.sort(values)[HUGE // 2]


class Huge(line_task.LineTask):
  """Needs too much memory at one place."""

  def __init__(self, where):
    self._where = where

  def _more(self, where, x):
    return x + huge(x) if where == self._where else x

  def loss(self, variables, batch, rngs, train):
    return super().loss(
        variables, {"x": self._more("step", batch["x"])}, rngs, train)

  def predict(self, variables, batch):
    return self._more("evaluation", super().predict(variables, batch))

  def make_data(self, split):
    where = self._where

    class Points(line_task.Points):
      def train_batches(self, position):
        for i, batch in enumerate(super().train_batches(position)):
          if where == "batch" and i == 1:
            batch["x"] = np.ones((HUGE, 8), np.float32)
          yield batch

    return Points()

  def preprocess(self, image):
    return {"x": np.float32(image.mean())}

  def postprocess(self, outputs, example):
    return {"y": outputs}


def check(error, *says):
  assert isinstance(error, errors.ConfigError) and error.exit_code == 2
  assert "\n" not in str(error)
  for words in says:
    assert words in str(error)


@pytest.mark.parametrize("where,says", [
    ("step", ("config.train.batch_size: a step of 8 images",
              "config.train.accumulate = 1", "does not fit in memory",
              "RESOURCE_EXHAUSTED")),
    ("batch", ("config.train.batch_size: a step of 8 images",
               "Unable to allocate")),
    ("evaluation", ("config.eval.batch_size: 1024 images at a time",
                    "reduce it", "RESOURCE_EXHAUSTED"))])
def test_a_run_says_what_does_not_fit(tmp_path, where, says):
  cfg = small_runs.line(train={"steps": 2})
  with pytest.raises(errors.OutOfMemoryError) as e:
    small_runs.run(cfg, Huge(where), tmp_path)
  check(e.value, *says)


def test_evaluations_and_predictions_say_it_too(tmp_path):
  cfg = small_runs.line(train={"steps": 2})
  small_runs.run(cfg, line_task.LineTask(), tmp_path)
  with pytest.raises(errors.OutOfMemoryError) as e:
    evaluate.evaluate_checkpoint(
        cfg, Huge("evaluation"), devices.make_mesh(cfg), tmp_path, "last")
  check(e.value, "config.eval.batch_size: 1024 images")
  variables = line_task.LineTask.model.init(jax.random.key(0), np.ones(1))
  loaded = inference.Loaded(cfg, Huge("evaluation"), variables)
  with pytest.raises(errors.OutOfMemoryError) as e:
    loaded.predict([np.zeros((1, 1, 3), np.uint8)] * 3, batch_size=2)
  check(e.value, "batch_size: 2 images at a time do not fit", "reduce it")


@pytest.mark.parametrize("error,caught", [
    (MemoryError(), True), (OSError(12, "Cannot allocate memory"), True),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"), True),
    (OSError(28, "No space left on device"), False),
    (RuntimeError("INTERNAL: of the compiler"), False),
    (errors.DataError("RESOURCE_EXHAUSTED"), False)])
def test_only_memory_is_memory(error, caught):
  with (pytest.raises(errors.OutOfMemoryError if caught else type(error)) as e,
        errors.fitting_memory("key: advice")):
    raise error
  assert not caught or str(e.value).startswith("key: advice (")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["train", "eval"])
def test_a_machine_with_little_memory(tmp_path, size):
  """As users run it, with a limit of the address space instead of the RAM."""
  sizes = {"train": 16, "eval": 16} | {size: 8192}
  done = subprocess.run([
      "sh", "-c", 'ulimit -v 8388608; exec "$@"', "sh", sys.executable, "-m",
      "metaformer_jax.main", "--config=configs/quickstart.py",
      f"--workdir={tmp_path}", "--config.model.depths=(1,)",
      "--config.model.dims=(1024,)", "--config.model.token_mixers=('pooling',)",
      "--config.train.steps=1",
      *(f"--config.{k}.batch_size={v}" for k, v in sizes.items())],
      cwd=ROOT, capture_output=True, text=True, check=False,
      env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS":
           "--xla_backend_optimization_level=0"})
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith(f"OutOfMemoryError: config.{size}.batch_size: ")
