"""Every experiment in configs/ trains: loaded as shipped, shrunk, two steps.

PoolFormer-S24 also runs at full size, from the command line, on an ImageNet in
both forms that users have; only `config.data` differs between the two.
"""

import json
import os
import pathlib
import subprocess
import sys

import ade_tree
import coco_tree
import fast_compilation
import numpy as np
import pytest
import shipped
import tiny_imagenet

import metaformer_jax
from metaformer_jax import tasks
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.data import sources
from metaformer_jax.runtime import devices
from metaformer_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]


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


def shrink(config):
  """Sets what makes any config small enough to run here."""
  config.model.name = config.model.name or config.init
  config.init = None
  hparams = vars(metaformer_jax.get_spec(config.model.name).settings)
  if "token_mixers" in hparams:  # A MetaFormer: of four stages, the last two.
    settings = {**hparams, **{k: v for k, v in config.model.items()
                              if k in hparams and v is not None}}
    config.model.depths = (1, 1)
    config.model.dims = (8, 16)
    config.model.token_mixers = settings["token_mixers"][-2:]
    config.model.res_scale_init = settings["res_scale_init"][-2:]
    config.model.position_embeddings = ()
  elif "depths" in hparams:
    config.model.depths = (1, 1, 1, 1)
  else:
    config.model.depth = 1
  config.mesh.data = 1
  if config.task.name == "segmentation":
    config.task.crop_size = (32, 32)
    config.task.scale = (64, 48)
    config.task.eval_canvases = 1
    config.task.fpn_dim = config.task.head_dim = config.task.auxiliary_dim = 8
  elif config.task.name == "detection":
    config.task.scale = (128, 96)
    config.task.fpn_dim = config.task.head_dim = config.task.box_dim = 8
    config.task.candidates = config.task.train_candidates = 20
    config.task.proposals = config.task.roi_samples = 16
  else:
    config.task.image_size = 32
  config.data.workers = 0
  config.train.batch_size = 16
  config.train.steps = 2
  config.eval.batch_size = 16
  config.log.compilation_cache = ""


def trains(argument, imagenet, folder):
  """Runs a config for two steps and an evaluation."""
  config = shipped.load(argument)
  shrink(config)
  if config.data.source == "folder":
    config.data.path = str(imagenet / "folder")
    config.task.num_classes = None
  elif config.data.source == "idx":
    write_idx(folder / "idx")
    config.data.path = str(folder / "idx")
  elif config.data.source == "ade20k":
    ade_tree.make(folder / "ade", n_train=16, n_val=4, seed=0)
    config.data.path = str(folder / "ade")
  elif config.data.source == "coco":
    config.data.path = str(coco_tree.make(folder, n_train=16, n_val=4))
    config.task.update({"num_classes": None, "class_names": None,
                        "category_ids": None})
  elif config.data.source == "scenes":
    config.data.eval_split = "test[:4]"
  cfg, task = tasks.create(config_lib.resolve(config))
  summary = loop.train_and_evaluate(cfg, task, devices.make_mesh(cfg),
                                    folder / "run")
  n_eval = len(sources.create(cfg.data, "eval"))
  assert summary["step"] == 2 and summary["n_examples"] == n_eval
  if cfg.task.name == "segmentation":
    assert 0 <= summary["miou"] <= summary["pixel_accuracy"] <= 1
    return
  if cfg.task.name == "detection":
    assert 0 <= summary["box_ap"] <= summary["box_ap50"] <= 1
    return
  # Two steps of a tiny rate: the loss is still near that of chance.
  chance = np.log(cfg.task.num_classes)
  assert abs(summary["loss"] / chance - 1) < 0.5


@pytest.mark.configs
@pytest.mark.parametrize("argument", shipped.CONFIGS)
def test_every_config_trains(argument, imagenet, tmp_path):
  trains(argument, imagenet, tmp_path)


ABLATIONS = shipped.names_of(ROOT / "configs" / "ablations.py")


@pytest.mark.parametrize("variant", ABLATIONS["VARIANTS"])
def test_ablation_is_the_papers_model(variant):
  """A variant that is also in the table of models is the same network."""
  config = ABLATIONS["get_config"](variant)
  settings = {k: v for k, v in config.model.items()
              if v is not None and k not in (
                  "name", "drop_path_rate", "dtype")}
  model = metaformer_jax.create_model("poolformer_s12", **settings)
  named = {"identity": "metaformer_id_s12", "baseline": "poolformer_s12",
           "pppa": "metaformer_pppa_s12_224", "ppaa": "metaformer_ppaa_s12_224",
           "pppf": "metaformer_pppf_s12_224", "ppff": "metaformer_ppff_s12_224"}
  if variant in named:
    assert model == metaformer_jax.create_model(named[variant])
  else:
    assert model != metaformer_jax.create_model("poolformer_s12")


@pytest.mark.configs
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
      "folder": [f"--config.data.path={imagenet / 'folder'}",
                 "--config.task.num_classes=None"],
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
      env={**os.environ, "PYTHONPATH": str(ROOT),
           "XLA_FLAGS": fast_compilation.XLA_FLAGS})
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr and "Warning" not in done.stderr, (
      done.stderr)
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["step"] == 2
  assert summary["n_examples"] == tiny_imagenet.N_VAL
  n_classes = len(tiny_imagenet.SYNSETS) if form == "folder" else 1000
  assert summary["n_params"] == 21_388_968 - 513 * (1000 - n_classes)
  assert abs(summary["loss"] / np.log(n_classes) - 1) < 0.3
