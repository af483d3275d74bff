"""Folders of transformers and timm: weights read, written, and damaged."""

import json
import logging
import os
import shutil

import hub_cases
import jax
import numpy as np
import parity_cases
import pytest

import metaformer_jax
from metaformer_jax import errors, tasks
from metaformer_jax.checkpoints import pretrained
from metaformer_jax.config import resolve, saved
from metaformer_jax.convert import files, layouts
from metaformer_jax.tools import convert
from metaformer_jax.training import backbone

GOLDEN = hub_cases.GOLDEN
IMAGES = parity_cases.images(2, 32, 32)

# Folder: the model that it is, and whether it has class names.
FOLDERS = {
    "poolformer": ("poolformer_s12", True),
    "vit": ("vit_base_patch16_224", True),
    "deit": ("deit_base_distilled_patch16_224", True),
    "deit_distilled": ("deit_base_distilled_patch16_224", True),
    "resnet": ("resnet18", True),
    "pvt": ("pvt_tiny", False),
    "timm_vit": ("vit_base_patch16_224", True),
    "timm_distilled": ("deit_small_distilled_patch16_224", True),
}
BARE = {"poolformer_base": "poolformer_s12", "vit_base": "vit_base_patch16_224",
        "resnet_base": "resnet50", "timm_vit_base": "vit_base_patch16_224"}


def tool(*args):
  convert.main(convert.parse([str(arg) for arg in args]))


def check_close(got, want):
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


def head(variables):
  return {name for name in layouts.flatten(variables) if "/head" in name}


def refused(folder, **kwargs):
  with pytest.raises(errors.ConfigError) as e:
    metaformer_jax.load(folder, **kwargs)
  message = str(e.value)
  assert message.isprintable() and message.startswith(str(folder)), message
  return message


@pytest.mark.parametrize("name", FOLDERS)
def test_a_classifier_computes_what_it_did(name):
  loaded = metaformer_jax.load(GOLDEN / name)
  model, has_names = FOLDERS[name]
  assert loaded.cfg.model.name == model
  assert loaded.class_names == (hub_cases.NAMES if has_names else None)
  want = np.load(GOLDEN / "outputs.npz")[name]
  assert want.shape == (2, 5) and want.std() > 0.1
  check_close(jax.jit(loaded.model.apply)(loaded.variables, IMAGES), want)
  # The same for a caller who names the model; several have these settings.
  other = "deit_base_patch16_224" if name == "vit" else model
  variables = metaformer_jax.load_pretrained(other, GOLDEN / name)
  hub_cases.check_equal(layouts.flatten(variables),
                        layouts.flatten(loaded.variables))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (
        name in ("resnet_base", "timm_vit_base"))) for name in BARE])
def test_a_model_without_a_head(name, caplog):
  loaded = metaformer_jax.load(GOLDEN / name)
  assert loaded.cfg.model.name == BARE[name] and not head(loaded.variables)
  assert loaded.cfg.task.num_classes == 0 and loaded.class_names is None
  want = np.load(GOLDEN / "outputs.npz")[name]
  run = jax.jit(loaded.model.apply, static_argnames="method")
  if name == "poolformer_base":  # It ends before the last norm.
    found = run(loaded.variables, IMAGES, method="features")["stage4"]
    norm = loaded.variables["params"]["norm"]
    assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
  else:
    found = run(loaded.variables, IMAGES)
  check_close(found, want)
  hub_cases.check_equal(loaded.task.postprocess(want[0], {}),
                        {"features": want[0]})
  # A new head, if one is asked for; the rest stays.
  with caplog.at_level(logging.INFO, "metaformer_jax"):
    new = metaformer_jax.load(GOLDEN / name, num_classes=3)
  assert "has no params/head/bias, params/head/kernel" in caplog.text
  flat, old = layouts.flatten(new.variables), layouts.flatten(loaded.variables)
  assert head(new.variables) == flat.keys() - old.keys() == {
      "params/head/bias", "params/head/kernel"}
  assert flat["params/head/bias"].shape == (3,)
  hub_cases.check_equal({name: flat[name] for name in old}, old)


def test_a_file_without_a_head_needs_a_number_of_classes(tmp_path):
  path = tmp_path / "weights.safetensors"
  folder = GOLDEN / "vit_base"
  files.write_safetensors(path, hub_cases.tensors_of(folder), {})
  settings = saved.read_weights(folder).model.overrides()
  with pytest.raises(errors.WeightsError, match=r"has no head .*num_classes"):
    metaformer_jax.load_pretrained("vit_base_patch16_224", path, input_size=32,
                                   **settings)
  found = metaformer_jax.load_pretrained(
      "vit_base_patch16_224", path, input_size=32, num_classes=4, **settings)
  assert found["params"]["head"]["kernel"].shape == (8, 4)


@pytest.mark.parametrize("name, kept", [
    ("vit_base", {"params/head/kernel", "params/head/bias"}),
    pytest.param("poolformer_base", {
        "params/head/kernel", "params/head/bias", "params/norm/scale",
        "params/norm/bias"}, marks=pytest.mark.slow),
    ("deit_distilled", {"params/head/kernel", "params/head_dist/kernel",
                        "params/head/bias", "params/head_dist/bias"})])
def test_a_run_starts_from_a_folder(name, kept, caplog):
  cfg = resolve.resolve({"init": str(GOLDEN / name),
                         "data": {"source": "digits"}})
  made = saved.read_weights(GOLDEN / name)
  assert cfg.model == made.model
  assert cfg.task.image_size == made.task.image_size
  cfg, task = tasks.create(cfg)
  assert cfg.task.num_classes == 10  # The data's.
  fresh = jax.jit(task.model.init)(jax.random.key(0), *task.init_inputs())
  weights = backbone.read_weights(cfg.init, task.pretrained, fresh)
  with caplog.at_level(logging.INFO, "metaformer_jax"):
    started = layouts.flatten(pretrained.warm_start(fresh, weights))
  fresh, weights = layouts.flatten(fresh), layouts.flatten(weights)
  assert fresh.keys() - weights.keys() == kept
  assert all(leaf in caplog.text for leaf in kept)
  hub_cases.check_equal(started, {**fresh, **weights})


INDEX = {"vit": "model.safetensors.index.json",
         "resnet": "pytorch_model.bin.index.json"}


def move(index):
  places = index["weight_map"]
  key = sorted(places)[0]
  places[key] = next(v for v in places.values() if v != places[key])


@pytest.mark.parametrize("name", INDEX)
@pytest.mark.parametrize("change, says", [
    (lambda i: {"a": 1}, "has no weight_map"),
    (lambda i: [1], "has no weight_map"),
    (lambda i: {"weight_map": {}}, "has no weight_map"),
    (lambda i: i["weight_map"].popitem() and None, "which the index does not"),
    (move, "which the index does not say"), (move, " has no "),
    (lambda i: i["weight_map"].update(x="model-3.bin"), "model-3.bin does not"),
    *((lambda i, path=path: i["weight_map"].update(x=path), "is not the name")
      for path in ("../model.safetensors", "/etc/passwd", "a/b", "", "..",
                   ".hidden", "a\\b", "a\0b", ["a"], "x\n")),
])
def test_an_index_that_is_not_of_its_files(name, change, says, tmp_path):
  folder = hub_cases.changed(tmp_path, name, change, INDEX[name])
  with pytest.raises(errors.WeightsError) as e:
    metaformer_jax.load_pretrained(FOLDERS[name][0], folder)
  assert says in str(e.value) and str(e.value).isprintable()


def test_files_of_an_index_may_be_links(tmp_path):
  """As in the cache of huggingface_hub; an index cannot lead elsewhere."""
  folder = tmp_path / "snapshot"
  folder.mkdir()
  for path in (GOLDEN / "vit").iterdir():
    (folder / path.name).symlink_to(path)
  hub_cases.check_equal(hub_cases.tensors_of(folder),
                        hub_cases.tensors_of(GOLDEN / "vit"))


def test_damaged_folders(tmp_path):
  folder = hub_cases.changed(tmp_path, "vit")
  (folder / "model-00001-of-00002.safetensors").unlink()
  assert "00001-of-00002.safetensors does not exist" in refused(folder)
  folder = hub_cases.changed(tmp_path, "poolformer")
  (folder / "model.safetensors").unlink()
  assert "has a config.json, but no weights" in refused(folder)
  folder = hub_cases.changed(tmp_path, "pvt")
  data = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(data[:-5])
  assert "model.safetensors: " in refused(folder)
  (folder / "model.safetensors").write_bytes(data)
  (folder / "preprocessor_config.json").write_text("[]")
  assert "preprocessor_config.json: is not a section" in refused(folder)
  (folder / "config.json").write_text('{"model_type": "pvt", "depths": NaN}')
  assert "NaN, which is not JSON" in refused(folder)
  with pytest.raises(errors.ConfigError, match="its folder, which has a conf"):
    metaformer_jax.load(GOLDEN / "pvt/model.safetensors")
  # Without a config.json, for who names the model.
  bare = tmp_path / "bare"
  bare.mkdir()
  shutil.copy(GOLDEN / "pvt/model.safetensors", bare)
  settings = saved.read_weights(GOLDEN / "pvt").model.overrides()
  found = metaformer_jax.load_pretrained("pvt_tiny", bare, num_classes=5,
                                         input_size=32, **settings)
  assert found["params"]["head"]["bias"].shape == (5,)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (
        name in BARE and name != "vit_base")) for name in (*FOLDERS, *BARE)])
def test_there_and_back_is_bit_equal(name, tmp_path):
  layout = "timm" if name.startswith("timm") else "huggingface"
  folder = tmp_path / "a b"
  tool(f"--input={GOLDEN / name}", f"--output={folder}", f"--layout={layout}")
  want, got = map(metaformer_jax.load, (GOLDEN / name, folder))
  hub_cases.check_equal(layouts.flatten(got.variables),
                        layouts.flatten(want.variables))
  for section in ("model", "task", "data"):
    assert getattr(got.cfg, section) == getattr(want.cfg, section)
  if name in FOLDERS:  # Others come back with a prefix, without a pooler.
    hub_cases.check_equal(hub_cases.tensors_of(folder),
                          hub_cases.tensors_of(GOLDEN / name))
  before, after = (json.loads((path / "config.json").read_text())
                   for path in (GOLDEN / name, folder))
  for config in (before, after):
    config |= config.pop("pretrained_cfg", {}) | config.pop("model_args", {})
  different = {key for key in before.keys() & after
               if before[key] != after[key]}
  # Names like LABEL_0 are written, and a class with a head that has no classes.
  assert different <= {
      "pvt": {"id2label", "label2id"}, "vit": set(), "timm_vit_base": set(),
  }.get(name, {"architectures", "id2label", "label2id"} if name in BARE
        else set())


def test_what_a_folder_records_wins_over_its_config(tmp_path):
  folder = tmp_path / "folder"
  tool(f"--input={GOLDEN / 'poolformer'}", f"--output={folder}",
       "--layout=huggingface", "--num_classes=3")
  config = json.loads((folder / "config.json").read_text())
  assert config["id2label"] == {f"{i}": f"LABEL_{i}" for i in range(3)}
  (folder / "config.json").write_text(json.dumps(config | {"pool_size": 3}))
  loaded = metaformer_jax.load(folder)
  assert loaded.model.pool_size == 5 and loaded.cfg.task.num_classes == 3
  assert loaded.variables["params"]["head"]["bias"].shape == (3,)
  assert "| Classes | 3 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("args, says", [
    ("--output=x.pth", "x.pth does not end with .safetensors; folders"),
    ("--layout=official", "does not end with .safetensors; folders are"),
    ("--output=used", "used: exists and is not an empty folder"),
    ("--output=used/file", "used/file: exists and is not an empty folder"),
    ("--layout=timm", "timm cannot express this model in a config.json ("),
    ("--output=no/folder", "folder: cannot be written: No such file"),
    ("--num_classes=-1", "num_classes must be"),
])
def test_a_folder_that_cannot_be_written(args, says, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "used").mkdir()
  (tmp_path / "used/file").write_text("")
  with pytest.raises(errors.ConfigError) as e:
    tool(f"--input={GOLDEN / 'poolformer'}", "--output=new",
         "--layout=huggingface", *args.split())
  assert says in str(e.value) and str(e.value).isprintable()
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "used"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"),
                                   KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_interrupted_write_leaves_no_folder(step, calls, error, tmp_path,
                                               monkeypatch):
  real, left = getattr(os, step), [calls]

  def fail(*args):
    left[0] -= 1
    if not left[0]:
      raise error
    return real(*args)

  monkeypatch.setattr(os, step, fail)
  arguments = (tmp_path / "new", "a.safetensors", {"a": np.zeros(3)}, {},
               {"config.json": "{}", "README.md": ""})
  if step == "replace" and calls == 3:  # One for the weights, one for all.
    files.write_folder(*arguments)
    assert len(os.listdir(tmp_path / "new")) == 3
    return
  expected = errors.WeightsError if error.args else KeyboardInterrupt
  with pytest.raises(expected, match="No space" if error.args else None):
    files.write_folder(*arguments)
  assert os.listdir(tmp_path) == []
