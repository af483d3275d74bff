"""Names of classes that are given are never replaced by the data's."""

import pytest

from metaformer_jax import errors, tasks
from metaformer_jax.config import schema
from metaformer_jax.config import tasks as sections


def experiment(**task):
  return schema.Experiment(
      model=schema.Model(name="poolformer_s12"),
      task=sections.Segmentation(scale=(64, 56), crop_size=(48, 48), **task),
      data=schema.Data(source="scenes"))


def test_names_of_another_number_are_refused():
  cfg, task = tasks.create(experiment(class_names=("sky",)))
  assert (cfg.task.num_classes, cfg.task.class_names) == (1, ("sky",))
  with pytest.raises(errors.ConfigError, match=r"config\.task\.class_names: "):
    task.make_data("train")


def test_names_that_are_not_given_are_the_datas():
  cfg, _ = tasks.create(experiment())
  assert cfg.task.num_classes == len(cfg.task.class_names) == 11
  again, task = tasks.create(experiment(class_names=cfg.task.class_names))
  assert again.task == cfg.task
  task.make_data("train")
