"""Values left at None follow from the model, the weights or the data."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import metaformer_jax
from metaformer_jax import errors, tasks
from metaformer_jax.config import default, resolve, saved
from metaformer_jax.convert import files


def config_of(**keys):
  config = default()
  config.data.source = "digits"
  config.model.name = "poolformer_s12"
  config.update_from_flattened_dict(keys)
  return config


@pytest.mark.parametrize("name", [
    "poolformer_s12", "poolformer_m48", "caformer_s18_384", "pvt_tiny",
    "mixer_b16_224", "resnet50"])
def test_preprocessing_is_the_models(name):
  cfg = resolve.resolve(config_of(**{"model.name": name}))
  spec = metaformer_jax.get_spec(name)
  assert (cfg.task.image_size, cfg.task.crop_pct, cfg.task.interpolation,
          cfg.data.mean, cfg.data.std) == (
              spec.input_size, spec.crop_pct, spec.interpolation, spec.mean,
              spec.std)


def test_what_is_set_stays():
  cfg = resolve.resolve(config_of(**{
      "task.image_size": 64, "task.crop_pct": 0.5, "data.mean": (0.1,) * 3,
      "task.interpolation": "bilinear"}))
  assert cfg.task.image_size == 64 and cfg.task.crop_pct == 0.5
  assert cfg.data.mean == (0.1,) * 3 and cfg.task.interpolation == "bilinear"
  assert cfg.data.std == metaformer_jax.get_spec("poolformer_s12").std


def folders(root, train, val=None):
  for split, names in (("train", train), ("val", val or train)):
    for name in names:
      (root / split / name).mkdir(parents=True)
      Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(
          root / split / name / "0.png")
  return config_of(**{"data.source": "folder", "data.path": str(root)})


def test_classes_are_counted_and_named(tmp_path):
  cfg, _ = tasks.create(resolve.resolve(folders(
      tmp_path, ["zebra", "ant", "cat"], ["cat"])))
  assert cfg.task.num_classes == 3
  assert cfg.task.class_names == ("ant", "cat", "zebra")
  cfg, task = tasks.create(resolve.resolve(config_of(**{
      "model.depths": (1,), "model.dims": (8,), "task.image_size": 16,
      "model.token_mixers": ("pooling",)})))
  assert (cfg.task.num_classes, cfg.task.class_names) == (
      10, tuple("0123456789"))
  assert task.model.num_classes == 10


@pytest.mark.parametrize("n", [2, 4, 1000])
def test_another_number_of_classes_is_an_error_both_ways(tmp_path, n):
  config = folders(tmp_path, ["zebra", "ant", "cat"])
  config.task.num_classes = n
  for files_ in (True, False):  # Before jax is imported; as the data is opened.
    with pytest.raises(errors.ConfigError, match=(
        rf"config\.task\.num_classes: {n}, but the train\w* data has ")):
      tasks.create(resolve.resolve(config, files=files_))[1].make_data("train")


def test_names_that_do_not_fit_their_number():
  with pytest.raises(errors.ConfigError, match="class_names: 2 names, but"):
    resolve.resolve(config_of(**{
        "task.class_names": ("a", "b"), "task.num_classes": 10}))


def test_a_data_set_that_is_elsewhere_cannot_be_counted():
  config = config_of(**{"data.source": "folder", "data.path": "/no/such"})
  with pytest.raises(errors.ConfigError, match="classes cannot be counted"):
    tasks.create(resolve.resolve(config, files=False), files=False)
  config.task.num_classes = 7
  cfg, _ = tasks.create(resolve.resolve(config, files=False), files=False)
  assert cfg.task.num_classes == 7 and cfg.task.class_names is None


def test_the_model_is_that_of_the_weights(tmp_path):
  made = config_of(**{
      "model.pool_size": 5, "model.dims": (8, 16, 24, 32),
      "task.image_size": 48, "data.std": (0.5,) * 3})
  tree = json.loads(made.to_json_best_effort())
  path = tmp_path / "weights.safetensors"
  files.write_safetensors(path, {"x": np.zeros(1, np.float32)}, {
      saved.METADATA: json.dumps(tree)})
  run = tmp_path / "run"
  run.mkdir()
  (run / "config.json").write_text(json.dumps(tree))
  for init in (path, run):
    config = default()
    config.data.source, config.init = "digits", str(init)
    config.model.drop_path_rate = 0.2
    cfg = resolve.resolve(config)
    assert cfg.model.name == "poolformer_s12" and cfg.model.pool_size == 5
    assert cfg.model.dims == (8, 16, 24, 32)
    assert cfg.model.drop_path_rate == 0.2
    assert cfg.task.image_size == 48 and cfg.data.std == (0.5,) * 3
    assert cfg.task.crop_pct == 0.9


def test_weights_that_do_not_record_their_model(tmp_path):
  path = tmp_path / "weights.safetensors"
  files.write_safetensors(path, {"x": np.zeros(1, np.float32)}, {})
  config = default()
  config.data.source = "digits"
  with pytest.raises(errors.ConfigError, match="name: is missing; name a"):
    resolve.resolve(config)
  config.init = str(path)
  with pytest.raises(errors.ConfigError, match="nor is named after a model"):
    resolve.resolve(config)
  pathlib.Path(path).write_bytes(b"\1" * 100)
  with pytest.raises(errors.ConfigError, match=str(path)):
    resolve.resolve(config)
