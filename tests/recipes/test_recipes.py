"""Families of configs, their recipes, and the page that lists them."""

import ast
import re
import shutil

import command_line
import pytest
import shipped

import metaformer_jax
from metaformer_jax import errors, inference, recipes
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.recipes import classification, detection
from metaformer_jax.tools import summarize
from metaformer_jax.training import schedules

TABLE = {"s18": (1,), "s18_384": (2,), "m36": (3,)}
# Their variants are no classifiers of the table, as they are.
OTHERS = ("ablations", "study_fashion_mnist", "ade20k_semantic_fpn",
          "ade20k_upernet", "coco_retinanet", "coco_faster_rcnn",
          "coco_mask_rcnn")
FAMILIES = {path.stem: shipped.names_of(path) for path in shipped.FILES
            if "VARIANTS" in shipped.names_of(path)}


def test_a_variant_is_a_row():
  assert recipes.variant(TABLE, "s18_384") == (2,)


@pytest.mark.parametrize("name, message", [
    (None, "needs a variant, as in FILE.py:s18; valid: s18, s18_384, m36"),
    ("", "needs a variant, as in FILE.py:s18; valid: s18, s18_384, m36"),
    ("s18_385", "'s18_385' is not a variant; did you mean s18_384?"),
    ("xxl", "'xxl' is not a variant; valid: m36, s18, s18_384")])
def test_another_variant_is_refused(name, message):
  with pytest.raises(errors.ConfigError) as caught:
    recipes.variant(TABLE, name)
  assert str(caught.value) == message


def test_the_command_line_takes_variants():
  data = ["--config.data.source=digits", "--config.data.path=None",
          "--config.init=None", "--config.task.num_classes=10"]
  lines = [[f"--config=configs/{name}", *data] for name in (
      "caformer.py:s18_384", "resnet.py:50", "caformer.py",
      "deit.py:small_patch16", "ablations.py:identiy", "ablations.py")]
  fine, resnet, missing, unknown, typo, default = command_line.fork(lines)
  cfg, workdir = ast.literal_eval(fine.out)
  assert cfg["model"]["name"] == "caformer_s18_384"
  assert workdir == "runs/caformer_s18_384"
  assert ast.literal_eval(resnet.out)[1] == "runs/resnet_50"
  assert ast.literal_eval(default.out)[1] == "runs/ablations"
  for result, start in (
      (missing, "configs/caformer.py: needs a variant, as in FILE.py:s18; "
       "valid: s18, s18_384, s18_in21k, "),
      (unknown, "configs/deit.py: 'small_patch16' is not a variant; did you "
       "mean small_patch16_224?"),
      (typo, "configs/ablations.py: 'identiy' is not a variant; did you mean "
       "identity?")):
    command_line.check_refused(result)
    assert result.err.startswith(f"ConfigError: {start}")


@pytest.mark.parametrize("family, variant", [
    (family, variant) for family, found in FAMILIES.items()
    if family not in OTHERS for variant in found["VARIANTS"]])
def test_a_variant_names_the_model_and_its_published_accuracy(family, variant):
  found = FAMILIES[family]
  config = found["get_config"](variant)
  separator = "" if family == "resnet" else "_"
  spec = metaformer_jax.get_spec(f"{family}{separator}{variant}")
  assert config.model.name == spec.name
  assert config.task.num_classes == spec.num_classes
  cfg = config_lib.resolve(config, files=False)
  assert cfg.task.image_size == spec.input_size
  assert found["VARIANTS"][variant][-1] == spec.top1


def test_segmentation_recipes_are_the_official_ones():
  """The values that mmsegmentation's config files have."""
  found = FAMILIES["ade20k_semantic_fpn"]
  for variant in found["VARIANTS"]:
    cfg = config_lib.resolve(found["get_config"](variant), files=False)
    optim, resnet = cfg.optim, variant.startswith("resnet")
    assert optim.base_lr * cfg.train.batch_size / 1024 == pytest.approx(
        0.02 if resnet else 2e-4)
    assert optim.weight_decay == (5e-4 if resnet else 1e-4)
    assert optim.decay_all and optim.name == ("sgd" if resnet else "adamw")
    assert (cfg.train.steps, cfg.train.batch_size) == (40_000, 32)
    rate = schedules.create(cfg, 40_000, 20_210 / 32)
    for i in (0, 1, 20_000, 39_999):
      assert float(rate(i)) == pytest.approx(
          (0.02 if resnet else 2e-4) * (1 - i / 40_000) ** 0.9, rel=1e-5)
    every = round(cfg.eval.every_epochs * 20_210 / 32)
    assert every == 4000
    assert cfg.model.name == variant


@pytest.mark.parametrize("head", ("retinanet", "faster_rcnn", "mask_rcnn"))
@pytest.mark.parametrize("name", (
    "poolformer_s12", "resnet50", "pvt_tiny", "pvt_large", "caformer_s18"))
def test_detection_recipes_are_the_official_ones(name, head):
  """The values that mmdetection's config files have, and its rates."""
  cfg = config_lib.resolve(detection.HEADS[head](name), files=False)
  optim, resnet, rcnn = cfg.optim, name == "resnet50", head != "retinanet"
  n_warmup, weight_decay, drop_path = {
      "caformer_s18": (1000, 0.05, 0.2), "pvt_tiny": (500, 1e-4, 0.1),
  }.get(name, (500, 1e-4, 0.0))
  batch, peak = 16, 0.01 if resnet else 1e-4
  if rcnn and name != "caformer_s18":
    batch, peak = (8, peak * 2 / 1.4) if name == "pvt_large" else (16, peak * 2)
  assert cfg.task.head == head
  assert optim.name == ("sgd" if resnet else "adamw")
  assert (optim.weight_decay, optim.clip_norm) == (weight_decay, None)
  assert optim.decay_all == (name != "caformer_s18")
  assert (cfg.model.drop_path_rate or 0) == drop_path
  assert cfg.task.frozen_batch_norm == bool(cfg.train.freeze) == resnet
  assert (cfg.train.batch_size, cfg.task.loss_group) == (batch, batch // 8)
  per_epoch = 117_266 / batch
  rate = schedules.create(cfg, round(12 * per_epoch), per_epoch)
  for i in (0, 1, 250, n_warmup - 1, n_warmup, 58_633 - 1, 58_633, 80_621 - 1,
            80_621, 87_949):
    want = peak * 0.1 ** ((i >= 8 * per_epoch) + (i >= 11 * per_epoch))
    if i < n_warmup:  # mmcv's LrUpdaterHook.get_warmup_lr.
      want *= 1 - (1 - i / n_warmup) * (1 - 0.001)
    assert float(rate(i)) == pytest.approx(want, rel=1e-5), i


@pytest.mark.parametrize("head", ("retinanet", "faster_rcnn", "mask_rcnn"))
def test_published_detector(head):
  cfg = inference.published(f"{head}/resnet18")
  assert (cfg.task.head, cfg.model.name, cfg.init) == (head, "resnet18", None)
  assert cfg.task.class_names[80 - 1] == "toothbrush"
  assert cfg.task.category_ids[80 - 1] == 90 and cfg.data.mean is not None


@pytest.mark.parametrize("name", (
    "semantic_fpn/pvt_tiny", "semantic_fpn/resnet18", "upernet/caformer_s18"))
def test_published_segmenter(name):
  cfg = inference.published(name)
  head, _, backbone = name.partition("/")
  assert (cfg.task.head, cfg.model.name, cfg.init) == (head, backbone, None)
  assert cfg.task.class_names[150 - 1] == "flag" and cfg.data.mean is not None


@pytest.mark.parametrize("name, says", (
    ("semantic_fpm/pvt_tiny", "'semantic_fpm' is not a decoder; did you mean "
     "semantic_fpn?"),
    ("retinanets/pvt_tiny", "did you mean retinanet?"),
    ("upernet/caformer_s1", "unknown model 'caformer_s1'")))
def test_unknown_decoder(name, says):
  with pytest.raises(errors.ConfigError, match=re.escape(says)):
    inference.published(name)


def test_notes_are_of_variants():
  for found in FAMILIES.values():
    for pattern in found.get("NOTES", {}):
      assert summarize.fnmatch.filter(found["VARIANTS"], pattern), pattern


def test_recipes_do_not_depend_on_names():
  """What differs between families is a parameter."""
  rates = {"drop_path_rate": 0.2, "head_drop_rate": 0.1}
  for recipe, arguments in (
      (classification.metaformer_baseline, {}),
      (classification.metaformer_in21k, {}),
      (classification.metaformer_finetune, {"init": "x", "base_lr": 1e-4})):
    conv, caf = (recipe(name, **rates, **arguments).to_dict()
                 for name in ("convformer_s18", "caformer_s18"))
    assert conv.pop("model") == {**caf.pop("model"), "name": "convformer_s18"}
    assert conv == caf
  lamb = classification.metaformer_baseline(
      "convformer_s18", **rates, optimizer="lamb", base_lr=2e-3,
      warmup_epochs=20.0)
  assert (lamb.optim.name, lamb.optim.base_lr, lamb.optim.warmup_epochs) == (
      "lamb", 2e-3, 20.0)
  assert classification.poolformer("poolformer_s12").train.batch_size == 4096
  assert classification.poolformer(
      "poolformer_s12", batch_size=1024).train.batch_size == 1024


PAGE = (shipped.ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.configs  # Traces every model of segmentation.
def test_the_page_is_what_the_tool_prints(monkeypatch, capsys):
  monkeypatch.chdir(shipped.ROOT)
  monkeypatch.setattr("sys.argv", ["summarize", "--configs=configs"])
  summarize.main(summarize.parse())
  assert capsys.readouterr().out == PAGE


def test_the_page_has_every_config():
  rows = [line.split("`")[1] for line in PAGE.splitlines()
          if line.startswith("| `configs/")]
  assert sorted(rows) == sorted(shipped.CONFIGS)


@pytest.mark.slow
def test_the_page_has_what_the_tool_prints_of_classifiers(tmp_path):
  for path in shipped.FILES:
    if not path.stem.startswith(("ade20k", "coco")):
      target = tmp_path / path.relative_to(shipped.ROOT)
      target.parent.mkdir(exist_ok=True)
      shutil.copy(path, target)
  lines = "\n".join(summarize.recipes(tmp_path / "configs")).splitlines()
  assert not {*lines} - {*PAGE.splitlines()}


@pytest.mark.parametrize("text, says", [
    ("import nonsense", "x.py: ModuleNotFoundError"),
    ("from metaformer_jax.config import default\n"
     "def get_config():\n"
     "  config = default()\n"
     "  config.model.name = 'poolformer_s13'\n"
     "  return config", "x.py: config.model.name: unknown model"),
    (None, "has no config files")])
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch, text,
                                                   says):
  folder = tmp_path / "mine"
  (folder / "more").mkdir(parents=True)
  if text:
    (folder / "more" / "x.py").write_text(text)
  monkeypatch.setattr("sys.argv", ["summarize", f"--configs={folder}"])
  with pytest.raises(errors.ConfigError, match=says):
    summarize.main(summarize.parse())
