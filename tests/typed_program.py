"""What users write, for mypy: it checks that the types are these. Not run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, assert_type

import metaformer_jax
from metaformer_jax import errors, inference, testing
from metaformer_jax.config import schema, tasks
from metaformer_jax.data import loader
from metaformer_jax.data.sources import base
from metaformer_jax.models import options, settings, spec
from metaformer_jax.tasks import base as task_lib


class TestShift(testing.MixerTest):
  mixer = "my_mixers:Shift"
  size = (7, 7)


@dataclasses.dataclass(frozen=True)
class Section(tasks.Task):
  MEASURES = (tasks.Measure("error", higher_is_better=False),)

  delta: float = options.option(1.0, "errors below it count as squares")


class Photos:
  """A source; there is nothing to inherit."""

  n_classes = 2

  def __len__(self) -> int:
    return 10

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return {"image": b"", "label": index % 2}


def models() -> None:
  assert_type(metaformer_jax.list_models("caformer*"), list[str])
  row = metaformer_jax.get_spec("caformer_s18")
  assert_type(row, spec.ModelSpec)
  assert_type(row.top1, float | None)
  assert_type(row.override(drop_path_rate=0.1), settings.Family)
  assert_type(metaformer_jax.check_mixer(Section), None)
  assert_type(metaformer_jax.load_pretrained("caformer_s18", num_classes=2),
              dict[str, Any])


def predictions() -> None:
  loaded = metaformer_jax.load("caformer_s18", num_classes=10)
  assert_type(loaded, inference.Loaded)
  assert_type(loaded.predict("cat.jpg"), list[dict[str, Any]])
  assert_type(loaded.task, task_lib.Task)
  assert_type(loaded.cfg, schema.Experiment)
  for found in loaded.stream(["cat.jpg"]):
    if isinstance(found, errors.DataError):
      assert_type(found.exit_code, int)
    else:
      assert_type(found, dict[str, Any])


def data(cfg: schema.Experiment) -> task_lib.Data:
  assert_type(cfg.train.batch_size, int)
  assert_type(cfg.best_measure, tasks.Measure)
  source: base.Source = Photos()
  made = loader.create(
      cfg, "train", source, lambda record, rng=None: dict(record),
      n_devices=1, process_index=0, process_count=1)
  assert_type(made, loader.Loader)
  return made
