"""Valid configs become typed experiments; others are refused in one line.

`DATA` in a case is the folder of the fixture `data`. The command line is tested
in test_cli.py, what a workdir keeps in test_saved_config.py.
"""

import dataclasses
import json
import math

import ade_tree
import coco_tree
import ml_collections
import pytest
import shipped
import source_files

from metaformer_jax import cli, errors
from metaformer_jax.config import derived, schema, tasks, typed
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.models import options

NAN, INF = math.nan, math.inf
DIGITS = {"data.source": "digits", "model.name": "poolformer_s12"}
IMAGES = {"data.source": "folder", "data.path": "DATA"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder for the sources folder and idx."""
  root = tmp_path_factory.mktemp("data")
  source_files.write_empty(root)
  ade_tree.make(root, n_train=1, n_val=1)
  coco_tree.make(root, n_train=1, n_val=1)
  (root / "empty").mkdir()
  return root


def _load(argument, data):
  """A shipped config as a dict, its data in place."""
  config = shipped.load(argument).to_dict()
  if config["data"]["source"] in ("folder", "idx", "ade20k"):
    config["data"]["path"] = str(data)
  if config["data"]["source"] == "ade20k":
    config["init"] = None  # That of ResNet is a file.
  if config["data"]["source"] == "coco":
    config["data"]["path"] = str(data / "coco")
    config["task"] |= {"class_names": None, "category_ids": None}
  config["task"]["num_classes"] = None  # The folder has one class.
  return config


def _tree(flat, data):
  """{"a.b": 1} -> {"a": {"b": 1}}."""
  tree = {}
  for key, value in flat.items():
    *sections, name = key.split(".")
    holder = tree
    for section in sections:
      holder = holder.setdefault(section, {})
    if isinstance(value, str):
      value = value.replace("DATA", str(data))
    holder[name] = value
  return tree


def _refusal(config):
  with pytest.raises(errors.ConfigError) as caught:
    cli.resolve(config)
  message = str(caught.value)
  assert len(message.splitlines()) == 1, message
  return message


def _case(changes, *says):
  return pytest.param(changes, says, id=str(changes)[:60])


# One key at a wrong value, and what the message says after "config.KEY: ".
WRONG = [_case({**DIGITS, key: value}, f"config.{key}: {value!r}", *says)
         for key, value, *says in [
    # Types.
    ("train.batch_size", True, "is not an int"),
    ("train.batch_size", 8.0, "is not an int"),
    ("train.batch_size", "8", "is not an int"),
    ("train.batch_size", None, "is not a"),
    ("train.batch_size", (8,), "is not an int"),
    ("train.steps", "all", "is not an int"),
    ("optim.base_lr", True, "is not a float"),
    ("optim.base_lr", "1e-3", "is not a float"),
    ("optim.base_lr", None, "is not a float"),
    ("optim.clip_norm", {}, "is not a float"),
    ("log.tensorboard", 1, "is not a bool"),
    ("log.tensorboard", None, "is not a bool"),
    ("data.path", 3, "is not a str"),
    ("task", None, "is not a section of keys"),
    ("task", "classification", "is not a section of keys"),
    ("task.name", None, "is not a task"),
    ("task.name", {}, "is not a task"),
    ("model.depths", "2262", "is not a tuple"),
    ("model.depths", (2, 2, 6, 2.0), "holds 2.0, which is not an int"),
    ("model.depths", (2, 2, 6, True), "holds True, which is not an int"),
    ("model.depths", (2, 2, 6, (2,)), "holds (2,), which is not an int"),
    ("task.crop_area", None, "is not a tuple"),
    ("data.mean", (0, 0, "0"), "holds '0', which is not a float"),
    ("mesh.rules", "ab", "is not a tuple"),
    ("mesh.rules", ("a", 0), "is not a tuple of tuples"),
    # Numbers.
    ("optim.base_lr", NAN, "is not a finite number"),
    ("optim.base_lr", -INF, "is not a finite number"),
    ("optim.base_lr", 0.0, "is not above 0"),
    ("optim.weight_decay", -0.1, "is below the least, 0"),
    ("optim.beta1", 1.0, "is above the largest, 0.9999"),
    ("optim.clip_norm", 0.0, "is not above 0"),
    ("optim.warmup_epochs", -1.0, "is below the least, 0"),
    ("model.layer_scale_init", NAN, "is not a finite number"),
    ("model.drop_path_rate", 1.0, "is above the largest, 0.999"),
    ("task.num_classes", 0, "is below the least, 1"),
    ("model.pool_size", 4, "is even", "nearest: 5"),
    ("model.pool_size", -1, "is below the least, 1"),
    ("model.dims", (64, 0, 320, 512), "holds 0, which is below the least, 1"),
    ("train.batch_size", 0, "is below the least, 1"),
    ("train.steps", -5, "is below the least, 1"),
    ("train.accumulate", 0, "is below the least, 1"),
    ("task.label_smoothing", 1.0, "is above the largest, 0.999"),
    ("seed", 2**31, "is above the largest, 2147483647"),
    ("task.crop_pct", 1.01, "is above the largest, 1"),
    ("task.crop_area", (0.5,), "has 1 items, not 2"),
    ("task.crop_area", (1.0, 0.5), "is not in ascending order"),
    ("task.crop_area", (0.5, INF), "holds inf"),
    ("data.std", (0.1, 0.0, 0.1), "holds 0.0, which is not above 0"),
    ("data.mean", (0.5, 0.5, 127.0), "holds 127.0", "the largest, 1"),
    ("data.workers", -2, "is below the least, -1"),
    ("task.image_size", 1, "kernel, 7", "nearest: 3"),
    ("mesh.data", -2, "is below the least, -1"),
    ("mesh.fsdp", 0, "-1 takes the rest"),
    # Choices.
    ("data.source", "tdfs", "did you mean tfds?"),
    ("data.source", "imagenet", "valid: ade20k, array_record, coco, digits"),
    ("task.interpolation", "cubic", "did you mean bicubic?"),
    ("task.train_interpolation", "rand", "did you mean random?"),
    ("model.norm", "layernorm", "did you mean layer_norm?"),
    ("model.activation", "geluu", "did you mean gelu?"),
    ("model.dtype", "int8", "valid: bfloat16, float32"),
    ("task.name", "classificaton", "did you mean classification?"),
    ("compile.remat", ("bloc",), "holds 'bloc'", "did you mean block?"),
    ("compile.scan", 1, "is not a bool"),
    ("model.token_mixers", ("pooling",) * 3 + ("atention",),
     "holds 'atention'", "did you mean attention?"),
    ("model", None, "is not a section"),
    ("optim", 3, "is not a section"),
    ("log", ("every_steps", 1), "is not a section"),
]]

# Mistakes across several keys, or on disk.
TOGETHER = [_case(*row) for row in [
    ({"sed": 1}, "config.sed: no such key; did you mean seed?"),
    ({"optim.baselr": 1.0}, "config.optim.baselr: no such key; ", "base_lr?"),
    ({"model.xyz": 1}, "config.model.xyz: no such key; valid: "),
    ({"seed": -1, "optim.eps": NAN, "model.dimz": 3},
     "config.seed: -1", "; also config.model.dimz: ", "config.optim.eps: nan"),
    ({"model.name": "poolformers12"}, "config.model.name: ",
     "'poolformers12'; did you mean poolformer_s12?"),
    ({"model.depths": (1, 2)}, "config.model.depths: has 2 stages, dims has 4"),
    ({"model.depths": (), "model.dims": (), "model.token_mixers": ()},
     "depths: has 0 stages"),
    ({"model.position_embeddings": (5,)},
     "config.model.position_embeddings: there is no stage 5; nearest: 4"),
    ({"model.res_scale_init": (1.0,)}, "res_scale_init has 1"),
    ({"model.in_patch_size": 231}, "config.task.image_size: 224", "231"),
    ({"train.batch_size": 98, "train.accumulate": 8},
     "config.train.batch_size: 98", "accumulate = 8", "nearest: 96"),
    ({"mesh.data": 3, "mesh.fsdp": 2}, "config.train.batch_size: 1024",
     "6 devices", "nearest: 1026"),
    ({"mesh.data": 8, "train.batch_size": 16, "train.accumulate": 4},
     "config.train.batch_size: 16", "8 devices x 4", "nearest: 32"),
    ({"mesh.data": -1, "mesh.fsdp": -1}, "config.mesh: ", "both -1"),
    ({"compile.remat": ("none", "block")}, "config.compile.remat: ",
     "2 values for 4 stages", "nearest: ('none', 'block', 'block', 'block')"),
    ({"compile.remat": ("none",) * 5}, "config.compile.remat: ",
     "5 values for 4 stages", "nearest: ('none', 'none', 'none', 'none')"),
    ({"compile.scan": True, "model.drop_rate": 0.1},
     "config.compile.scan: True", "config.model.drop_rate = 0.1"),
    ({"model.name": "resnet18", "model.depths": None, "model.dims": None,
      "model.token_mixers": None, "compile.scan": True,
      "compile.remat": ("block",)},
     "config.compile.scan: True is for models of the family metaformer, and "
     "resnet18 is resnet; nearest: False", "config.compile.remat: ('block',)"),
    ({"model.name": "my_models:Net", "compile.scan": True},
     "config.compile.scan: True", "my_models:Net is a user's own"),
    ({"mesh.rules": (("a", 0),) * 1001, "train.freeze": ("a",) * 1001},
     "config.mesh.rules: has 1001 patterns, more than 1000",
     "config.train.freeze: has 1001 patterns, more than 1000"),
    ({"mesh.rules": (("a", "b"),)}, "config.mesh.rules: ('a', 'b')"),
    ({"mesh.rules": (("a", 0, 1),)}, "config.mesh.rules: ('a', 0, 1)"),
    ({"mesh.rules": (("a",),)}, "config.mesh.rules: ('a',)"),
    ({"optim.warmup_epochs": 300.0}, "config.optim.warmup_epochs: 300.0",
     "config.train.epochs = 300.0"),
    ({"data.source": "tfds"}, "config.data.name: None", "imagenet2012"),
    ({"data.source": "folder"}, "config.data.path: None", "train/"),
    ({"data.path": "DATA/trian"}, "config.data.path: DATA/trian",
     "did you mean train?"),
    ({**IMAGES, "data.path": "DATA/empty"}, "config.data.train_split: DATA",
     "'train'", "; also config.data.eval_split: DATA", "'val'"),
    ({**IMAGES, "data.train_split": "tran"}, "config.data.train_split: ",
     "'tran'", "did you mean train?"),
    ({**IMAGES, "data.eval_split": "test"}, "config.data.eval_split", "'test'"),
]]
HOSTILE = [_case(*row) for row in [
    ({"optim.base_lr": 10**400}, "config.optim.base_lr: 1"),
    ({"train.batch_size": 10**400, "train.accumulate": 3},
     "config.train.batch_size: 1"),
    ({"data.path": "a\nb"},
     "config.data.path: "),
    ({"a\nb": 1}, "no such key"),
    ({"mesh.rules": (("a" * 9000, 0),)}, "is longer than 8192 characters"),
    ({"model.depths": (1,) * 9000}, "has more than 8192 items"),
    ({"data.path": "a\0b"}, "config.data.path: 'a\\x00b' holds a NUL"),
    ({"mesh.rules": (("a", -2),)},
     "config.mesh.rules: ('a', -2)"),
    ({"mesh.rules": (("a", True),)},
     "config.mesh.rules: ('a', True)"),
    ({"eval.every_epochs": 1e308},
     "config.eval.every_epochs: 1e+308"),
    ({"task.crop_pct": 1e-300},
     "config.task.crop_pct: 1e-300"),
]]


@pytest.mark.parametrize("changes, says", WRONG + TOGETHER + HOSTILE)
def test_malformed_config_is_refused(changes, says, data):
  message = _refusal(_tree({**DIGITS, **changes}, data))
  for part in says:
    assert part.replace("DATA", str(data)) in message


@pytest.mark.parametrize("config", [None, 3, "seed", [("seed", 1)]])
def test_config_must_be_a_mapping(config):
  assert _refusal(config).startswith(f"config: {config!r} is not a section")


@pytest.mark.parametrize("argument", shipped.CONFIGS)
def test_shipped_config_is_valid(argument, data):
  cfg = cli.resolve(_load(argument, data))
  assert isinstance(cfg, schema.Experiment)


@pytest.mark.parametrize("path", shipped.FILES, ids=lambda path: path.stem)
def test_config_file_says_how_to_run_it(path):
  name = path.relative_to(shipped.ROOT).as_posix()
  assert f"--config={name}" in path.read_text()


def test_what_python_does_not_print_is_refused():
  huge, shown = 10**5000, "<int that is too large to print>"
  message = _refusal({
      huge: 1, None: 2, "x" * 999: 3, "seed": huge,
      "mesh": {"rules": (("a", huge),)}, "data": {"mean": (0, 0, huge)}})
  for part in (f"config.{shown}: no such key", "config.None: no such key",
               f"config.{'x' * 200}: no such key", f"config.seed: {shown} is",
               "config.mesh.rules: ", f"holds {shown}, which is too large"):
    assert part in message


def test_default_is_an_experiment_but_for_its_data():
  config = typed.default()
  config.model.name = "poolformer_s12"
  assert "config.data.path: None" in _refusal(config)
  config.data.source = "digits"
  expected = derived.fill(schema.Experiment(
      data=schema.Data(source="digits"),
      model=schema.Model(name="poolformer_s12")))
  frozen = ml_collections.FrozenConfigDict(config)
  for given in (config, _tree(DIGITS, ""), frozen):
    assert cli.resolve(given) == expected


def test_values_arrive_in_their_type():
  config = typed.default()
  config.model.name = "poolformer_s12"
  config.data.source = "digits"
  config.train.steps = 3
  config.optim.base_lr = 1
  config.optim.clip_norm = 2
  config.log.tensorboard = False
  config.model.name = "poolformer_s24"
  config.model.depths = [1, 1, 1, 1]
  config.data.mean = (0, 0.5, 1)
  config.mesh.rules = [["kernel", -1], ("bias", 0)]
  cfg = config_lib.resolve(config)
  for found, value in [
      (cfg.train.steps, 3), (cfg.optim.base_lr, 1.0),
      (cfg.optim.clip_norm, 2.0), (cfg.log.tensorboard, False),
      (cfg.model.name, "poolformer_s24"), (cfg.model.depths, (1, 1, 1, 1)),
      (cfg.data.mean, (0.0, 0.5, 1.0)),
      (cfg.mesh.rules, (("kernel", -1), ("bias", 0)))]:
    assert repr(found) == repr(value)  # 1 is not 1.0, nor True.


def test_optional_keys_stay_none():
  optional = {key: value for key, value in typed.flatten(
      typed.default().to_dict()) if value is None}
  assert {"model.depths", "model.norm", "data.name", "train.steps",
          "optim.clip_norm"} <= optional.keys()
  cfg = config_lib.resolve(_tree({**optional, **DIGITS}, ""))
  found = dict(typed.flatten(dataclasses.asdict(cfg)))
  follow = {"model.name", "data.mean", "data.std", "task.image_size",
            "task.crop_pct", "task.interpolation"}
  assert {key for key in optional if found[key] is not None} == follow
  assert cfg.model.overrides() == {}


def test_describe_and_json_have_every_key():
  keys = typed.keys()
  lines = typed.describe()
  assert [line.partition("=")[0] for line in lines] == keys
  assert all(line.partition("  ")[2] for line in lines)
  saved = set()
  for section in tasks.TASKS.values():
    tree = json.loads(typed.to_json(schema.Experiment(task=section())))
    saved |= {key for key, _ in typed.flatten(tree)}
  assert saved == {*keys}


@pytest.mark.parametrize("key, says", [
    ("train.mixup", "did you mean config.task.mixup?"),
    ("optim.image_size", "did you mean config.task.image_size?"),
    ("task.mixupp", "did you mean mixup?")])
def test_nearest_key_may_be_in_another_section(key, says):
  assert _refusal(_tree({**DIGITS, key: 0.1}, "")) == (
      f"config.{key}: no such key; {says}")


@pytest.mark.parametrize("name, says", [
    ("topp1", "did you mean top1?"), ("", "valid: loss, top1, top5"),
    ("score", "valid: loss, top1, top5")])
def test_best_metric_must_be_a_measure_of_the_task(name, says):
  assert _refusal(_tree({**DIGITS, "checkpoint.best_metric": name}, "")) == (
      f"config.checkpoint.best_metric: {name!r} is not a measure of "
      f"classification; {says}")


def test_default_best_metric_is_the_first_of_the_task():
  cfg = schema.Experiment()
  assert cfg.best_measure == ("top1", True, True)
  lowest = dataclasses.replace(
      cfg, checkpoint=schema.Checkpoint(best_metric="loss"))
  assert lowest.best_measure == ("loss", False, False)


@dataclasses.dataclass(frozen=True)
class Points(tasks.Task):
  """The section of a second task."""

  MEASURES = (tasks.Measure("map", True),)

  name: str = options.option("points", "what is learned")
  max_points: int = options.option(100, "per image", low=1)


def test_key_of_another_task_says_whose_it_is(monkeypatch):
  monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "points": Points})
  points = {**DIGITS, "task.name": "points"}
  for changes, owner in (({**points, "task.mixup": 0.1}, "classification"),
                         ({**DIGITS, "task.max_points": 3}, "points")):
    *_, key = changes
    chosen = changes.get("task.name", "classification")
    assert _refusal(_tree(changes, "")) == (
        f"config.{key}: is a key of the task {owner}, but config.task.name is "
        f"{chosen}")
  assert "config.task.max_points: 0 is below the least, 1" in _refusal(
      _tree({**points, "task.max_points": 0}, ""))
  cfg = config_lib.resolve(_tree({**points, "task.max_points": 3}, ""))
  assert cfg.task == Points(max_points=3) and cfg.best_measure.name == "map"
  assert {"task.mixup", "task.max_points"} <= {*typed.keys()}
