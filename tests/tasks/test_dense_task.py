"""A dense task runs through the same loop as classification."""

import functools

import jax
import numpy as np
import pytest
from dense_task import (
  CANVASES,
  MODEL,
  DenseTask,
  PixelAccuracy,
  Section,
  Squares,
)

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager
from metaformer_jax.config import schema, tasks
from metaformer_jax.runtime import devices
from metaformer_jax.tasks import classification
from metaformer_jax.training import evaluate, loop


def run(workdir, task=None, init=None, steps=1, ema_decay=0.0, **optim):
  """Trains the dense task; returns (summary, parameters)."""
  cfg = schema.Experiment(
      task=Section(), init=init and str(init),
      optim=schema.Optim(warmup_epochs=0.0, **optim),
      train=schema.Train(batch_size=8, steps=steps, ema_decay=ema_decay),
      eval=schema.Eval(every_epochs=1e3), mesh=schema.Mesh(data=1),
      log=schema.Log(tensorboard=False))
  summary = loop.train_and_evaluate(cfg, task or DenseTask(),
                                    devices.make_mesh(cfg), workdir)
  return summary, manager.read_variables(workdir)["params"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """The workdir of a run of classification."""
  workdir = tmp_path_factory.mktemp("classification")
  cfg = schema.Experiment(
      model=schema.Model(name="poolformer_s12", **MODEL),
      data=schema.Data(source="digits"),
      task=tasks.Classification(num_classes=10, image_size=16),
      train=schema.Train(batch_size=8, steps=2), mesh=schema.Mesh(data=1),
      log=schema.Log(tensorboard=False))
  loop.train_and_evaluate(cfg, classification.create(cfg)[1],
                          devices.make_mesh(cfg), workdir)
  return workdir


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """The parameters that a run starts with."""
  workdir = tmp_path_factory.mktemp("start")
  return run(workdir, base_lr=1e-30, min_lr=0.0)[1]


@pytest.mark.slow
def test_it_learns_from_two_canvases(tmp_path):
  settings = {"steps": 60, "base_lr": 2.56, "ema_decay": 0.5}
  summary, _ = run(tmp_path / "a", **settings)
  assert summary["pixel_accuracy"] > 0.95
  # Whatever is in the padding: the same training and the same measures.
  other, _ = run(tmp_path / "b", DenseTask(Squares(padding=255)), **settings)
  assert other["n_pixels"] == summary["n_pixels"]
  assert other["pixel_accuracy"] == pytest.approx(summary["pixel_accuracy"],
                                                  abs=2e-3)


@pytest.mark.slow
def test_a_canvas_that_is_not_declared_is_an_error(tmp_path):
  data = Squares(canvases=(CANVASES[0], (32, 32)))
  with pytest.raises(ValueError, match=r"batch of .*\(8, 32, 32, 3\).*but the"):
    run(tmp_path, DenseTask(data), steps=2)


@pytest.mark.slow
def test_warm_start_fills_the_backbone_only(
    tmp_path, pretrained, start, caplog):
  caplog.set_level("INFO", "metaformer_jax")
  _, params = run(tmp_path, init=pretrained, base_lr=1e-30, min_lr=0.0)
  want = manager.read_variables(pretrained)["params"]
  jax.tree.map(np.testing.assert_array_equal, params["backbone"],
               {k: v for k, v in want.items() if k.startswith("stage")})
  np.testing.assert_array_equal(params["head"]["kernel"],
                                start["head"]["kernel"])
  assert "params/head/bias, params/head/kernel" in caplog.text


@pytest.mark.slow
def test_layer_wise_decay_counts_the_layers_of_the_backbone(tmp_path, start):
  settings = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0,
              "min_lr": 0.0, "schedule": "constant", "base_lr": 128.0}
  _, plain = run(tmp_path / "plain", **settings, layer_decay=1.0)
  _, scaled = run(tmp_path / "scaled", **settings, layer_decay=0.5)
  for path, power in (("backbone/stage1/downsample/conv", 3),
                      ("backbone/stage1/block1/mlp/fc1", 2), ("head", 0)):
    a, b, c = (functools.reduce(dict.__getitem__, path.split("/"), tree)
               ["kernel"] for tree in (start, plain, scaled))
    assert np.abs(b - a).max() > 1e-4
    np.testing.assert_allclose(c - a, (b - a) * 0.5**power, atol=2e-6)


def test_layer_wise_decay_without_layers_is_an_error(tmp_path):
  task = DenseTask()
  task.pretrained = task.pretrained._replace(path="encoder")
  with pytest.raises(errors.ConfigError, match="no blocks in 'encoder'"):
    run(tmp_path, task, layer_decay=0.5)


def test_evaluators_of_one_measure_are_an_error():
  evaluators = {"a": PixelAccuracy(), "b": PixelAccuracy()}
  for evaluator in evaluators.values():
    evaluator.reset()
    evaluator.update(np.array([3.0, 4.0]))
  with pytest.raises(errors.ConfigError, match="b reports 'pixel_accuracy', a"):
    evaluate.collect(evaluators)
