"""Every file in configs/ trains: loaded as shipped, shrunk, two steps.

PoolFormer-S24 also runs at full size, from the command line, on an ImageNet in
both forms that users have; only `config.data` differs between the two.
"""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
import tiny_imagenet

from metaformer_jax import config as config_lib
from metaformer_jax.data import sources
from metaformer_jax.tasks import classification
from metaformer_jax.training import loop, sharding

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
  root = tmp_path_factory.mktemp("imagenet")
  tiny_imagenet.write_folder(root / "folder")
  return root


def write_idx(folder):
  """The four files, of a few random images."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  for prefix in ("train", "t10k"):
    images = rng.integers(0, 256, (20, 28, 28), np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
      header = bytes((0, 0, 8, values.ndim)) + np.array(
          values.shape, ">u4").tobytes()
      (folder / f"{prefix}-{name}-ubyte").write_bytes(
          header + values.tobytes())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_trains(path, imagenet, tmp_path):
  config = runpy.run_path(str(path))["get_config"]()
  config.model.depths = (1, 1)
  config.model.dims = (8, 16)
  config.model.token_mixers = ("pooling",) * 2
  config.mesh.data = 1
  config.data.image_size = 32
  config.data.workers = 0
  config.train.batch_size = 16
  config.train.steps = 2
  config.eval.batch_size = 16
  config.log.compilation_cache = ""
  if config.data.source == "folder":
    config.data.path = str(imagenet / "folder")
  elif config.data.source == "idx":
    write_idx(tmp_path / "idx")
    config.data.path = str(tmp_path / "idx")
  cfg = config_lib.resolve(config)
  task = classification.create(cfg)
  summary = loop.train_and_evaluate(cfg, task, sharding.make_mesh(cfg),
                                    tmp_path / "run")
  n_eval = len(sources.create(cfg.data, "eval"))
  assert summary["step"] == 2 and summary["n_examples"] == n_eval
  # Two steps of a tiny rate: the loss is still near that of chance.
  chance = np.log(cfg.model.num_classes)
  assert abs(summary["loss"] / chance - 1) < 0.5


@pytest.mark.parametrize("form", ["folder", "tfds"])
def test_s24_trains_on_imagenet(form, imagenet, tmp_path):
  if form == "tfds":
    pytest.importorskip("tensorflow_datasets")
    script = [sys.executable, str(ROOT / "tests" / "tiny_imagenet.py")]
    tars = imagenet / "tars"
    subprocess.run([*script, "tars", tars], check=True)
    subprocess.run([*script, "tfds", tars, imagenet / "tfds"], check=True,
                   capture_output=True)
  data = {
      "folder": [f"--config.data.path={imagenet / 'folder'}"],
      "tfds": ["--config.data.source=tfds", "--config.data.name=imagenet2012",
               f"--config.data.path={imagenet / 'tfds'}"]}[form]
  done = subprocess.run(
      [sys.executable, "-m", "metaformer_jax.main",
       "--config=configs/poolformer_s24.py", f"--workdir={tmp_path}",
       "--config.train.steps=2", "--config.train.batch_size=4",
       "--config.eval.batch_size=4",
       # Shared by the two forms: the program is the same.
       f"--config.log.compilation_cache={imagenet / 'cache'}", *data],
      cwd=ROOT, capture_output=True, text=True,
      env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr and "Warning" not in done.stderr
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["step"] == 2
  assert summary["n_examples"] == tiny_imagenet.N_VAL
  assert summary["n_params"] == 21_388_968
  assert abs(summary["loss"] / np.log(1000) - 1) < 0.3
