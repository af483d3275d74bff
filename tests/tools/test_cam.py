"""The tool that draws class activation maps."""

import argparse
import dataclasses
import functools
import io
import json

import command_line
import jax
import numpy as np
import numpy_layers as plain
import pytest
import small_models
from PIL import Image

import metaformer_jax
from metaformer_jax import errors, inference
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import typed
from metaformer_jax.convert import files, layouts
from metaformer_jax.data.transforms import classification as transforms
from metaformer_jax.models import activation_maps, registry
from metaformer_jax.ops import images as image_ops
from metaformer_jax.tools import cam


def test_overlay_blends_the_colours_of_the_map():
  image = np.full((2, 2, 3), 100, np.uint8)
  gray = np.array([[0, 0.5], [0.25, 1]])
  got = cam.overlay(image, gray, alpha=0.25, colormap="gray")
  # matplotlib's gray has 256 steps.
  want = (75 + 0.25 * np.minimum((gray * 256).astype(int), 255))[..., None]
  np.testing.assert_array_equal(got, np.broadcast_to(want.round(), (2, 2, 3)))
  # Resized bilinearly: half way between two pixels of a row.
  ramp = cam.overlay(np.zeros((1, 4, 3), np.uint8), np.array([[0, 1]]),
                     alpha=1.0, colormap="gray")[0, :, 0]
  np.testing.assert_array_equal(ramp, [0, 64, 192, 255])


def test_overlay_lies_where_the_map_was_seen():
  """A ramp over columns 2 to 6 of 8, and one that is partly beyond them."""
  black = np.zeros((2, 8, 3), np.uint8)
  ramp = np.arange(1, 5, dtype=np.float32)[None] / 4
  options = {"alpha": 1.0, "colormap": "gray"}
  got = cam.overlay(black, ramp, box=(2, 0, 6, 2), **options)[:, :, 0]
  np.testing.assert_array_equal(got, [[0, 0, 64, 128, 192, 255, 0, 0]] * 2)
  got = cam.overlay(black, ramp, box=(6, 0, 10, 2), **options)[:, :, 0]
  np.testing.assert_array_equal(got, [[0] * 6 + [64, 128]] * 2)


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (500, 32), (20, 20)])
@pytest.mark.parametrize("axis", [0, 1], ids=["x", "y"])
def test_the_box_is_what_the_evaluation_crops(size, axis):
  """A picture of its own coordinates shows them in the crop."""
  cfg = inference.published("poolformer_s12")
  transform = transforms.EvalTransform(cfg.data, cfg.task)
  n = size[axis]
  first, last = transform.box(*size)[axis::2]
  ramp = np.linspace(0, 255, n).astype(np.uint8)
  picture = np.empty((size[1], size[0], 3), np.uint8)
  picture[...] = ramp[:, None] if axis == 0 else ramp[:, None, None]
  seen = transform({"image": picture, "label": 0})["image"].mean((axis, 2))
  places = first + (np.arange(224) + 0.5) * (last - first) / 224 - 0.5
  within = (places > 1) & (places < n - 2)
  np.testing.assert_allclose(
      seen[within], places[within] * 255 / (n - 1), atol=4)


@pytest.mark.parametrize("text,number", [
    ("star", 1), ("Star", 2), ("SUN", 0), ("2", 4), ("3", 3)])
def test_a_class_is_named_or_numbered(text, number):
  """A name wins, then one in other case, then a number."""
  names = ("sun", "star", "Star", "moon", "2")
  assert cam.class_number(text, 5, names) == number


@pytest.mark.parametrize("text,names,message", [
    ("STAR", ("star", "Star"), "the name of the classes 0, 1; give a number"),
    ("crane", ("crane", "crane"), "of the classes 0, 1"),
    ("strar", ("star", "sun"), "there is no 'strar'; did you mean star"),
    ("star", None, "record no names, so give a number from 0 to 1"),
    ("2", ("star", "sun"), "2 is not one of the model's 2, from 0")])
def test_an_unknown_class_is_a_line(text, names, message):
  with pytest.raises(errors.ConfigError, match=message):
    cam.class_number(text, 2, names)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
  """A small row of the model table; its weights and an image as files."""
  spec = registry.get_spec("poolformer_s12")
  spec = dataclasses.replace(
      spec, name="tiny", num_classes=5, input_size=32,
      settings=dataclasses.replace(
          spec.settings, depths=(1, 1), dims=(8, 12),
          token_mixers=("pooling",) * 2))
  monkeypatch.setitem(registry._MODELS, "tiny", spec)
  model = metaformer_jax.create_model("tiny")
  variables = plain.drawn(model, small_models.images(1, 32, 32))
  files.write_safetensors(
      tmp_path / "weights.safetensors",
      layouts.to_torch(spec.family, variables, "timm"), {"format": "pt"})
  out = io.BytesIO()
  pixels = np.random.default_rng(2).integers(0, 256, (60, 80, 3), np.uint8)
  Image.fromarray(pixels).save(out, "PNG")
  (tmp_path / "picture").write_bytes(out.getvalue())
  return model, variables, spec, pixels


def arguments(folder, **changed):
  return argparse.Namespace(**{
      "model": ["tiny"], "weights": [str(folder / "weights.safetensors")],
      "image": str(folder / "picture"), "output": str(folder / "cam.png"),
      "label": None, "layer": None, "method": "gradcam", "allow_import": "",
      **changed})


@pytest.mark.parametrize("label,method", [
    (None, "gradcam"),
    pytest.param("2", "layercam", marks=pytest.mark.slow)])
def test_the_tool_draws_what_the_function_gives(tiny, tmp_path, capsys, label,
                                                method):
  model, variables, spec, pixels = tiny
  cam.main(arguments(tmp_path, label=label, method=method, layer="stage1"))
  told = json.loads(capsys.readouterr().out)
  cfg = inference.published("tiny")
  assert cfg.task.crop_pct == 0.9 and cfg.task.interpolation == "bicubic"
  # floor(32 / 0.9) = 35 pixels for 60, and 46 for 80; then the centre.
  picture = np.asarray(Image.fromarray(pixels).resize(
      (46, 35), Image.Resampling.BICUBIC))[2:34, 7:39]
  x = image_ops.normalize(picture[None], spec.mean, spec.std)
  logits = np.asarray(jax.jit(model.apply)(variables, x)[0], np.float64)
  label = int(logits.argmax()) if label is None else int(label)
  want = np.exp(logits[label]) / np.exp(logits).sum()
  assert told["class"] == label
  np.testing.assert_allclose(told["probability"], want, rtol=1e-4)
  maps = jax.jit(functools.partial(
      activation_maps.maps, model, method=method, layer="stage1"))(
          variables, x, np.array([label]))
  (scaled,) = activation_maps.scaled(maps, 32, 32)
  # Over the picture itself: what the crop shows of it, and nothing else.
  with Image.open(told["output"]) as drawn_:
    got = np.asarray(drawn_).astype(int)
  left, right = 7 * 80 / 46, 39 * 80 / 46
  top, bottom = 2 * 60 / 35, 34 * 60 / 35
  want = cam.overlay(pixels, scaled, box=(left, top, right, bottom))
  assert got.shape == pixels.shape and abs(got - want).max() <= 1
  inside = np.zeros((60, 80), bool)
  inside[round(top):round(bottom), round(left):round(right)] = True
  np.testing.assert_array_equal(got[~inside], pixels[~inside])
  assert (got[inside] != pixels[inside]).any(-1).mean() > 0.9


@pytest.mark.slow
def test_models_are_side_by_side(tiny, tmp_path, capsys):
  """Each cell is what the tool draws for one of them."""
  weights = str(tmp_path / "weights.safetensors")
  pixels = tiny[3]
  cam.main(arguments(tmp_path, weights=[weights, weights], model=["tiny"] * 2))
  rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
  assert rows[0] == rows[1] and rows[0]["weights"] == weights
  cam.main(arguments(tmp_path, output=str(tmp_path / "one.png")))
  with Image.open(tmp_path / "one.png") as one, Image.open(
      tmp_path / "cam.png") as several:
    one, several = (np.asarray(picture) for picture in (one, several))
  # Enlarged twice, to 120 x 160, with 6 pixels around and captions above.
  cells = [several[-126:-6, x:x + 160] for x in (6, 172, 338)]
  np.testing.assert_array_equal(cells[0], pixels.repeat(2, 0).repeat(2, 1))
  for cell in cells[1:]:
    np.testing.assert_array_equal(cell, one.repeat(2, 0).repeat(2, 1))
  assert several.shape == (several.shape[0], 3 * 166 + 6, 3)
  assert (several[:-126] == 0).any()  # Captions.


@pytest.mark.parametrize("changed,message", [
    ({"output": "cam.jpg"}, "--output: cam.jpg does not end with .png"),
    ({"label": "5"}, "--class: 5 is not one of the model's 5"),
    ({"label": "-1"}, "--class: -1 is not"),
    ({"label": "cat"}, "--class: there is no 'cat'; the weights record no"),
    ({"model": []}, "--weights: .*does not record its model"),
    ({"model": ["tinyy"]}, "--weights: unknown model .tinyy.; did you mean"),
    ({"model": ["tiny"] * 3}, "--model: 3 names for 1 --weights; give one"),
    ({"layer": "stage4"}, "no layer 'stage4'.*did you mean stage"),
    ({"image": "no_file"}, "no_file cannot be used"),
    ({"image": "{folder}/weights.safetensors"}, "cannot identify an image"),
    ({"weights": ["{folder}/picture"]}, "picture"),
    ({"weights": ["x" * 5000]}, "--weights: .*too long"),
    ({"weights": ["{folder}/run"]}, "--weights: .*config.json"),
    ({"output": "/no/folder/cam.png"}, "--output: /no/folder"),
], ids=str)
def test_mistakes_are_a_line(tiny, tmp_path, changed, message):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{")
  changed = {k: [each.format(folder=tmp_path) for each in v]
             if isinstance(v, list) else v.format(folder=tmp_path)
             for k, v in changed.items()}
  with pytest.raises(errors.ConfigError, match=message):
    cam.main(arguments(tmp_path, **changed))


def test_a_run_tells_its_model_and_preprocessing(tiny, tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  config = typed.default()
  config.model.name, config.task.num_classes = "tiny", 5
  config.task.image_size, config.task.crop_pct = 24, 1.0
  config.data.source = "digits"
  cfg = config_lib.resolve(config)
  (run / "config.json").write_text(typed.to_json(cfg))
  assert inference.experiment(run) == (cfg, run)
  with pytest.raises(errors.ConfigError, match="is of tiny, not poolformer"):
    inference.experiment(run, "poolformer_s12")


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
  done = command_line.python(
      ["-m", "metaformer_jax.tools.cam", "--model=resnet18", "--method=cam"])
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith("ConfigError: command line: ")
  assert done.stderr.count("\n") == 1
