"""Two processes that differ, or of which one fails alone: each says why."""

import pathlib
import shutil

import numpy as np
import pods
import pytest
from PIL import Image

import metaformer_jax
from metaformer_jax.config import schema, tasks


def ends(pod, folder, workdir, codes):
  """The last line of each process; no workdir was claimed."""
  assert pods.finish(pod, 120) == codes, pods.said(folder, workdir)
  return [pods.said(folder, workdir, i).splitlines()[-1]
          for i in range(len(pod))]


@pytest.mark.parametrize(("flags", "env", "reason"), [
    pytest.param(["--config.optim.base_lr=0.5"], {},
                 "config.optim.base_lr: 0.001 on process 0, 0.5 on process 1",
                 id="learning-rate"),
    pytest.param(["--config.train.steps=41"], {},
                 "config.train.steps: 40 on process 0, 41 on process 1",
                 id="length", marks=pytest.mark.slow),
    pytest.param(["--config.mesh.fsdp=2"], {},
                 "config.mesh.fsdp: 1 on process 0, 2 on process 1", id="mesh",
                 marks=pytest.mark.slow),
    pytest.param(["--workdir=elsewhere"], {}, "--workdir: ", id="workdir",
                 marks=pytest.mark.slow),
    pytest.param([], pods.environment(2) | {"JAX_NUM_CPU_DEVICES": "2"},
                 "environment's XLA_FLAGS: ", id="devices",
                 marks=pytest.mark.slow),
    pytest.param([], {"JAX_ENABLE_X64": "1"},
                 "option jax_enable_x64: False on process 0, True on process 1",
                 id="option", marks=pytest.mark.slow)])
def test_processes_that_differ_end_at_the_start(tmp_path, flags, env, reason):
  workdir = tmp_path / "run"
  pod = pods.start(pods.small(), workdir, 2, 1, tmp_path, last=flags,
                   last_env=env)
  one, other = ends(pod, tmp_path, workdir, [2, 2])
  assert one == other
  assert one.startswith("ConfigError: process 1 differs from process 0: ")
  assert reason in one
  assert not workdir.exists()


@pytest.mark.slow
def test_other_code_is_named(tmp_path):
  copy = tmp_path / "other" / "metaformer_jax"
  shutil.copytree(pathlib.Path(metaformer_jax.__file__).parent, copy,
                  ignore=shutil.ignore_patterns("__pycache__"))
  with (copy / "training/rng.py").open("a") as file:
    file.write("\n")
  workdir = tmp_path / "run"
  pod = pods.start(pods.small(), workdir, 2, 1, tmp_path, last_env={
      "PYTHONPATH": str(copy.parent), "PYTHONSAFEPATH": "1"})
  one, other = ends(pod, tmp_path, workdir, [2, 2])
  assert one == other and not workdir.exists()
  assert "process 0: other code of metaformer_jax/training/rng.py; all" in one


def images(root, n):
  """Class folders of n images in each class."""
  rng = np.random.default_rng(0)
  for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
    (root / name).mkdir(parents=True)
    for i in range(n):
      Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(
          root / name / f"{i}.png")
  return root


def on_folders(root, **sections):
  return pods.small(
      data=schema.Data(path=str(root)),
      task=tasks.Classification(image_size=16),
      train=schema.Train(batch_size=8, steps=200), **sections)


@pytest.mark.slow
def test_hosts_with_other_images_are_named(tmp_path):
  """The paths may differ, but not what is there."""
  root, workdir = images(tmp_path / "images", 5), tmp_path / "run"
  copy = tmp_path / "copy"
  shutil.copytree(root, copy)
  (copy / "train/cat/0.png").unlink()
  pod = pods.start(on_folders(root), workdir, 2, 1, tmp_path,
                   last=[f"--config.data.path={copy}"])
  one, other = ends(pod, tmp_path, workdir, [2, 2])
  assert one == other and not workdir.exists()
  assert ("number of examples of the training data: 10 on process 0, 9 on "
          "process 1; other file names of the training data") in one


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_host_on_which_no_image_can_be_read_tells_the_others(tmp_path, split):
  """Its files have the names and sizes of the others."""
  root, workdir = images(tmp_path / "images", 5), tmp_path / "run"
  copy = tmp_path / "copy"
  shutil.copytree(root, copy)
  for path in (copy / split).rglob("*.png"):
    path.write_bytes(b"x" * path.stat().st_size)
  cfg = on_folders(root, mesh=schema.Mesh(heartbeat_seconds=60))
  pod = pods.start(cfg, workdir, 2, 1, tmp_path,
                   last=[f"--config.data.path={copy}"])
  one, other = ends(pod, tmp_path, workdir, [1, 1])
  assert other.startswith("DataError: example ") and str(copy) in other
  assert one == other.replace("DataError: ", "DataError: process 1: ")


@pytest.mark.slow
def test_a_process_that_is_alone_ends_within_the_time(tmp_path):
  workdir = tmp_path / "run"
  cfg = pods.small(mesh=schema.Mesh(connect_seconds=3))
  pod = pods.start(cfg, workdir, 2, 1, tmp_path)
  pod[1].kill()
  assert pods.finish(pod, 60) == [1, -9]
  line, = pods.said(tmp_path, workdir).splitlines()
  assert line.startswith("WorkerLostError: --coordinator: 1 of 2 processes")
  assert "connect_seconds = 3; missing: 1;" in line
