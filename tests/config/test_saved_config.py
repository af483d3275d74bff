"""The config.json of a run, and its comparison with another experiment."""

import dataclasses
import json

import pytest
import small_runs

from metaformer_jax import errors
from metaformer_jax.config import saved, schema, tasks, typed


@pytest.fixture
def differences(tmp_path):
  """Calls `differences` with the text of a config.json."""

  def compare(cfg, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    return saved.differences(cfg, path)

  return compare


DEFAULT = schema.Experiment()


def test_differences_are_what_changes_the_numbers(differences):
  text = typed.to_json(DEFAULT)
  assert differences(DEFAULT, text) == []
  assert differences(small_runs.changed(
      DEFAULT, optim={"base_lr": 0.5}, model={"depths": (1, 2, 3, 4)},
      task={"mixup": 0.8}), text) == [
          "model.depths: None -> [1, 2, 3, 4]", "optim.base_lr: 0.001 -> 0.5",
          "task.mixup: 0.0 -> 0.8"]
  assert differences(small_runs.changed(
      DEFAULT, log={"every_steps": 1}, mesh={"fsdp": 2, "rules": (("a", 0),)},
      data={"workers": 3, "threads": 1, "path": "/new"},
      compile={"scan": True, "remat": ("block",)},
      eval={"batch_size": 7}, checkpoint={"keep_last": 9},
      task={"eval_labels": "real", "real_path": "/new"}), text) == []


def test_absent_keys_had_the_defaults_of_newer_ones(differences):
  tree = json.loads(typed.to_json(DEFAULT))
  del tree["optim"]["beta1"], tree["train"], tree["seed"]
  older = json.dumps(tree)
  assert differences(DEFAULT, older) == []
  assert differences(small_runs.changed(DEFAULT, optim={"beta1": 0.5}),
                     older) == ["optim.beta1: 0.9 -> 0.5"]


OLD_KEYS = {"task": "classification", "train": {"mixup": 0.8}}


@pytest.mark.parametrize("tree, keys", [
    (OLD_KEYS, "task, train.mixup"),
    ({"optim": {"epsilon": 1}, "seed": 0}, "optim.epsilon"),
    ({"model": 3}, "model"),
    ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, "a, b, c and 2 more")])
def test_keys_of_another_version(tree, keys, differences, tmp_path):
  says = (f"was written by another version of metaformer_jax: there is no key "
          f"{keys}$")
  with pytest.raises(ValueError, match=says):
    differences(DEFAULT, json.dumps(tree))
  with pytest.raises(errors.ConfigError, match=f"config.json: {says}"):
    saved.read_run(tmp_path)


def test_read_run_returns_the_experiment(tmp_path):
  cfg = dataclasses.replace(
      DEFAULT, task=tasks.Classification(mixup=0.5, num_classes=7),
      mesh=schema.Mesh(rules=(("a", 0),)), init="no/longer/there")
  (tmp_path / "config.json").write_text(typed.to_json(cfg))
  assert saved.read_run(tmp_path) == cfg


@pytest.mark.parametrize("text, says", [
    (None, "is not a file"), ("{", "Expecting property name"),
    ("[]", "is not a section of keys"), ('{"seed": -1}', "config.seed: -1 is")])
def test_read_run_refuses_what_is_not_an_experiment(text, says, tmp_path):
  path = tmp_path / "config.json"
  if text is not None:
    path.write_text(text)
  with pytest.raises(errors.ConfigError) as caught:
    saved.read_run(tmp_path)
  assert str(caught.value).startswith(f"{path}: ")
  assert says in str(caught.value)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", "null", '{"seed": NaN}', '{"seed": 0, "seed": 0}',
    "[" * 10_000, '{"a":' * 10_000, '{"seed": ' + "1" * 5000 + "}"],
    ids=lambda text: text[:9])
def test_differences_with_what_is_not_an_experiment(text, differences):
  with pytest.raises(ValueError):
    differences(DEFAULT, text)
