"""tools.receptive_field: what it draws and measures, and mistakes in a line."""

import functools
import json
import sys

import jax
import numpy as np
import pytest
import shipped
from PIL import Image
from test_inference import STAGES, variables_of, write

import metaformer_jax
from metaformer_jax import errors, inference, tasks
from metaformer_jax.config import resolve
from metaformer_jax.models import receptive_field as fields
from metaformer_jax.tools import receptive_field


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  folder, paths = tmp_path_factory.mktemp("weights"), []
  for mixer in ("pooling", "attention"):
    cfg = resolve.resolve({
        "model": {"name": "poolformer_s12", **STAGES,
                  "token_mixers": (mixer,) * 4},
        "data": {"source": "digits"},
        "task": {"num_classes": 6, "image_size": 32}})
    paths.append(folder / f"{mixer}.safetensors")
    write(paths[-1], cfg, variables_of(cfg), "timm")
  return paths


def parse(monkeypatch, *argv):
  monkeypatch.setattr(sys, "argv", ["field", *map(str, argv)])
  return receptive_field.parse()


@pytest.mark.slow
def test_fields_of_pictures_are_side_by_side(weights, tmp_path, monkeypatch,
                                             capsys):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "image.png")
  receptive_field.main(parse(
      monkeypatch, *(f"--weights={path}" for path in weights),
      f"--image={tmp_path / 'image.png'}", "--image_size=40", "--layer=stage2",
      f"--output={tmp_path / 'field.png'}", "--json"))
  rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
  with Image.open(tmp_path / "field.png") as picture:
    cells = [np.asarray(picture)[-166:-6, x:x + 160][::4, ::4]
             for x in (6, 172)]
  for path, row, cell in zip(weights, rows, cells):
    loaded = metaformer_jax.load(path)
    data = loaded.cfg.data
    x = ((pixels[:, 10:50] / 255 - np.array(data.mean)) / np.array(data.std))
    want = np.asarray(jax.jit(functools.partial(
        fields.field, loaded.model, layer="stage2"))(
            loaded.variables, x[None].astype(np.float32)))
    assert (row["image"], row["layer"]) == ("40x40", "stage2")
    for mass in (50, 95):
      assert row[f"share_of_{mass}"] == pytest.approx(
          fields.share(want, mass / 100), abs=1 / 1600)
    # The picture's logarithm: a value of a thousandth is a quarter bright.
    drawn = np.asarray(receptive_field.draw(want)).astype(int)
    assert abs(cell - drawn).mean() < 0.5


def test_the_picture_has_four_decades():
  drawn = np.asarray(receptive_field.draw(
      np.array([[1e-5, 1e-4, 1e-2, 1.0]]) * 7, "gray"))[0, :, 0]
  np.testing.assert_allclose(drawn, [0, 0, 128, 255], atol=1)
  assert not np.asarray(receptive_field.draw(np.zeros((2, 2)), "gray")).any()


@pytest.mark.slow
def test_a_dense_model_has_the_field_of_its_backbone(monkeypatch):
  config = shipped.load("configs/segmentation_quickstart.py")
  cfg, task = tasks.create(resolve.resolve(config), files=False)
  variables = variables_of(cfg)
  found = receptive_field._field(
      inference.Loaded(cfg, task, variables), parse(
          monkeypatch, "--output=x.png", "--layer=stage1"))
  backbone = metaformer_jax.create_model(
      cfg.model.name, num_classes=0, **cfg.model.overrides())
  noise = jax.random.normal(jax.random.key(0), (8, 48, 48, 3))
  want = jax.jit(functools.partial(fields.field, backbone, layer="stage1"))(
      {"params": variables["params"]["backbone"]}, noise)
  np.testing.assert_allclose(found, want, atol=1e-4 * float(want.max()))


@pytest.mark.parametrize("argv,message", [
    ([], "command line: give --weights, or --model for random weights"),
    (["--model=resnt18"], "--model: unknown model 'resnt18'; did you mean"),
    (["--weights={weights}", "--layer=stage9"], "pooling.safetensors: the "
     "model has no layer 'stage9'; did you mean stage"),
    (["--weights={weights}", "--image={weights}"],
     "--image: .* cannot be used as an image: cannot identify"),
    (["--weights={weights}", "--output=field.jpg"], "--output: field.jpg does"),
    (["--weights={weights}", "--output=/no/folder/x.png", "--image_size=32"],
     "--output: /no/folder/x.png"),
])
def test_mistakes_are_a_line(weights, tmp_path, monkeypatch, argv, message):
  argv = [arg.format(weights=weights[0]) for arg in argv]
  args = parse(monkeypatch, f"--output={tmp_path / 'x.png'}", *argv)
  with pytest.raises(errors.ConfigError, match=message) as e:
    receptive_field.main(args)
  assert "\n" not in errors.one_line(e.value)
