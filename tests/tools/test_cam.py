"""Class activation maps, compared with finite differences of numpy heads."""

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
from PIL import Image

import metaformer_jax
from metaformer_jax import errors, inference
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import typed
from metaformer_jax.convert import files, layouts
from metaformer_jax.data.transforms import classification as transforms
from metaformer_jax.models import registry
from metaformer_jax.ops import images as image_ops
from metaformer_jax.tools import cam

CLASSES = np.array([3, 1])
TWO_STAGES = {"depths": (1, 2), "dims": (8, 12),
              "token_mixers": ("pooling", "pooling"), "num_classes": 5}
# Small models, one for each kind of head.
MODELS = {
    "poolformer_s12": TWO_STAGES,
    "poolformerv2_s12": TWO_STAGES | {"res_scale_init": ()},
    "caformer_s18": TWO_STAGES | {"res_scale_init": ()},
    "resnet18": {"depths": (1, 1), "widths": (8, 12), "num_classes": 5},
    "pvt_tiny": {"depths": (1, 2), "dims": (8, 12), "n_heads": (1, 3),
                 "mlp_ratios": (2, 2), "sr_ratios": (2, 1), "num_classes": 5},
    "deit_base_distilled_patch16_224": {
        "patch_size": 8, "dim": 12, "depth": 2, "n_heads": 3, "num_classes": 5},
    "mixer_b16_224": {"patch_size": 8, "dim": 12, "depth": 2,
                      "num_classes": 5},
    "resmlp_12_224": {"patch_size": 8, "dim": 12, "depth": 2,
                      "num_classes": 5},
}


def images(n=2, height=32, width=40):
  return np.random.default_rng(1).normal(
      size=(n, height, width, 3)).astype(np.float32)


@functools.cache
def drawn(name):
  """A small model, and variables other than 0 and 1."""
  model = metaformer_jax.create_model(name, **MODELS[name])
  variables = plain.drawn(model, images())

  def positive(path, v):
    name = path[-1].key
    return abs(v).astype(np.float32) + 0.5 if name == "var" else v

  return model, jax.tree_util.tree_map_with_path(positive, variables)


@functools.cache
def maps_of(name, stage=None):
  model, variables = drawn(name)
  maps = jax.jit(functools.partial(cam.grad_cam, model, stage=stage))(
      variables, images(), CLASSES)
  assert maps.dtype == np.float32
  return np.asarray(maps)


@functools.cache
def recorded(name):
  """Logits, features, the output of every module, parameters; float64."""
  model, variables = drawn(name)

  @jax.jit
  def run(variables, x):
    features = model.apply(variables, x, method="features")
    logits, state = model.apply(variables, x, capture_intermediates=True)
    return logits, features, state["intermediates"]

  return jax.tree.map(lambda v: np.asarray(v, np.float64), (
      *run(variables, images()), variables["params"]))


def attention(qkv, n_heads):
  """[N, 3 dim] -> [N, dim], before the projection."""
  q, k, v = (np.split(x, n_heads, axis=1) for x in np.split(qkv, 3, axis=1))
  heads = []
  for i in range(n_heads):
    weights = np.exp(q[i] @ k[i].T / q[i].shape[1] ** 0.5)
    heads.append(weights / weights.sum(1, keepdims=True) @ v[i])
  return np.concatenate(heads, 1)


def last_block(p, before, normed, n_heads):
  """A transformer block from the output of its first norm on; [N, dim]."""
  a = p["attn"]
  qkv = plain.dense(a["qkv"], normed) if "qkv" in a else np.concatenate(
      [plain.dense(a["q"], normed), plain.dense(a["kv"], normed)], axis=1)
  y = before + plain.dense(a["proj"], attention(qkv, n_heads))
  return y + plain.mlp(p["mlp"], plain.layer_norm(p["norm2"], y))


def features_and_head(name, i):
  """Features [h, w, dim] of image i; the function from them to the logits."""
  _, features, modules, p = recorded(name)
  stage = max(features)
  x = features[stage][i]

  def linear(y):
    return plain.dense(p["head"], y)

  if name == "poolformer_s12":
    def head(x):
      x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
      return linear((x * p["norm"]["scale"] + p["norm"]["bias"]).mean((0, 1)))
  elif name == "poolformerv2_s12":
    def head(x):
      return linear(plain.layer_norm(p["norm"], x.mean((0, 1))))
  elif name == "caformer_s18":
    def head(x):
      y = plain.layer_norm(p["norm"], x.mean((0, 1)))
      y = np.maximum(plain.dense(p["head"]["fc1"], y), 0)**2
      return plain.dense(p["head"]["fc2"],
                         plain.layer_norm(p["head"]["norm"], y, 1e-5))
  elif name == "resnet18":
    def head(x):
      return linear(x.mean((0, 1)))
  elif name == "mixer_b16_224":
    def head(x):
      return linear(plain.layer_norm(p["norm"], x).mean((0, 1)))
  elif name == "resmlp_12_224":
    def head(x):
      return linear((p["norm"]["alpha"] * x + p["norm"]["beta"]).mean((0, 1)))
  else:
    # With class tokens: before the attention of the last block.
    pvt = name == "pvt_tiny"
    if pvt:
      p, modules = {**p, **p["stage2"]}, modules["stage2"]
    (before,), (normed,) = (modules["block1"]["__call__"],
                            modules["block2"]["norm1"]["__call__"])
    before, normed = before[i], normed[i]
    n = len(normed) - x.shape[0] * x.shape[1]
    x = normed[n:].reshape(x.shape)

    def head(x):
      tokens = np.concatenate([normed[:n], x.reshape(-1, x.shape[-1])])
      y = last_block(p["block2"], before, tokens, n_heads=3)
      y = plain.layer_norm(p["norm"], y[:n])
      if pvt:
        return linear(y[0])
      return (linear(y[0]) + plain.dense(p["head_dist"], y[1])) / 2
  return x, head


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "poolformer_s12"))
    for name in MODELS])
def test_map_is_the_papers_with_alpha_by_finite_differences(name):
  """1e-4 of the largest: alpha of float64 heads in numpy."""
  maps, logits = maps_of(name), recorded(name)[0]
  for i, label in enumerate(CLASSES):
    x, head = features_and_head(name, i)
    np.testing.assert_allclose(head(x), logits[i], rtol=0, atol=1e-4)
    # Moving a channel at all pixels gives the sum of the pixels' gradients.
    step = 1e-5 * np.eye(x.shape[-1])
    alpha = np.array([(head(x + e) - head(x - e))[label] for e in step]) / 2e-5
    alpha /= x.shape[0] * x.shape[1]
    want = np.maximum(x @ alpha, 0)
    assert maps[i].shape == want.shape and want.max() > 0
    np.testing.assert_allclose(maps[i], want, rtol=0, atol=1e-4 * want.max())
    # The map of another class differs.
    other = np.maximum(x @ np.roll(alpha, 1), 0)
    assert abs(maps[i] - other).max() > 1e-2 * want.max()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_any_stage_by_the_gradient_of_a_bias(stage):
  """A bias of the stage's last MLP moves a channel at all pixels."""
  name = "poolformer_s12"
  model, variables = drawn(name)
  _, features, *_ = recorded(name)
  block = {"stage1": "block1", "stage2": "block2"}[stage]

  @jax.jit
  @jax.grad
  def gradient(params, x, label):
    return model.apply({"params": params}, x)[0, label]

  maps = maps_of(name, stage)
  for i, label in enumerate(CLASSES):
    found = gradient(variables["params"], images()[i:i + 1], label)
    found = found[stage][block]["mlp"]["fc2"]["bias"]
    scale = variables["params"][stage][block]["layer_scale2"]["scale"]
    x = features[stage][i]
    alpha = np.asarray(found / scale, np.float64) / (x.shape[0] * x.shape[1])
    want = np.maximum(x @ alpha, 0)
    np.testing.assert_allclose(maps[i], want, rtol=0, atol=1e-4 * want.max())


def test_default_is_the_predicted_class():
  model, variables = drawn("resnet18")
  logits = recorded("resnet18")[0]
  predicted = logits.argmax(-1)
  draw = jax.jit(functools.partial(cam.grad_cam, model))
  np.testing.assert_array_equal(
      draw(variables, images()), draw(variables, images(), predicted))


def test_features_in_bfloat16_give_nearly_the_same():
  want = maps_of("poolformer_s12")
  model, variables = drawn("poolformer_s12")
  model = model.clone(dtype=jax.numpy.bfloat16)
  maps = jax.jit(functools.partial(cam.grad_cam, model))(
      variables, images(), CLASSES)
  assert maps.dtype == np.float32
  np.testing.assert_allclose(maps, want, rtol=0, atol=0.1 * want.max())


def test_impossible_maps_are_refused():
  model, variables = drawn("resnet18")
  with pytest.raises(ValueError, match=r"no stage 'stage3'.*mean stage"):
    cam.grad_cam(model, variables, images(), stage="stage3")
  with pytest.raises(ValueError, match="without a head"):
    cam.grad_cam(model.clone(num_classes=0), variables, images())


def test_overlay_blends_the_colours_of_the_scaled_map():
  image = np.full((2, 2, 3), 100, np.uint8)
  got = cam.overlay(image, np.array([[0, 2], [1, 4]]), alpha=0.25,
                    colormap="gray")
  gray = np.array([[0, 0.5], [0.25, 1]])
  # matplotlib's gray has 256 steps.
  want = (75 + 0.25 * np.minimum((gray * 256).astype(int), 255))[..., None]
  np.testing.assert_array_equal(got, np.broadcast_to(want.round(), (2, 2, 3)))
  # A map of 0 has the colour of 0, and is not divided by its maximum.
  np.testing.assert_array_equal(
      cam.overlay(image, np.zeros((1, 1)), alpha=0.25, colormap="gray"), 75)
  # Resized bilinearly: half way between two pixels of a row.
  ramp = cam.overlay(np.zeros((1, 4, 3), np.uint8), np.array([[0, 1]]),
                     alpha=1.0, colormap="gray")[0, :, 0]
  np.testing.assert_array_equal(ramp, [0, 64, 192, 255])


def test_overlay_lies_where_the_map_was_seen():
  """A ramp over columns 2 to 6 of 8, and one that is partly beyond them."""
  black = np.zeros((2, 8, 3), np.uint8)
  ramp = np.arange(1, 5, dtype=np.float32)[None]
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
  variables = plain.drawn(model, images(1, 32, 32))
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
      "model": "tiny", "weights": str(folder / "weights.safetensors"),
      "image": str(folder / "picture"), "output": str(folder / "cam.png"),
      "label": None, "stage": None, "allow_import": "", **changed})


@pytest.mark.parametrize("label", [None, "2"])
def test_the_tool_draws_what_the_function_gives(tiny, tmp_path, capsys, label):
  model, variables, spec, pixels = tiny
  cam.main(arguments(tmp_path, label=label))
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
  maps = jax.jit(functools.partial(cam.grad_cam, model))(
      variables, x, np.array([label]))
  # Over the picture itself: what the crop shows of it, and nothing else.
  with Image.open(told["output"]) as drawn_:
    got = np.asarray(drawn_).astype(int)
  left, right = 7 * 80 / 46, 39 * 80 / 46
  top, bottom = 2 * 60 / 35, 34 * 60 / 35
  want = cam.overlay(pixels, maps[0], box=(left, top, right, bottom))
  assert got.shape == pixels.shape and abs(got - want).max() <= 1
  inside = np.zeros((60, 80), bool)
  inside[round(top):round(bottom), round(left):round(right)] = True
  np.testing.assert_array_equal(got[~inside], pixels[~inside])
  assert (got[inside] != pixels[inside]).any(-1).mean() > 0.9


@pytest.mark.parametrize("changed,message", [
    ({"output": "cam.jpg"}, "--output: cam.jpg does not end with .png"),
    ({"label": "5"}, "--class: 5 is not one of the model's 5"),
    ({"label": "-1"}, "--class: -1 is not"),
    ({"label": "cat"}, "--class: there is no 'cat'; the weights record no"),
    ({"model": None}, "--weights: .*does not record its model"),
    ({"model": "tinyy"}, "--weights: unknown model .tinyy.; did you mean tiny"),
    ({"stage": "stage4"}, "no stage 'stage4'.*did you mean stage"),
    ({"image": "no_file"}, "no_file cannot be used as an image"),
    ({"image": "{folder}/weights.safetensors"}, "cannot identify an image"),
    ({"weights": "{folder}/picture"}, "picture"),
    ({"weights": "x" * 5000}, "--weights: .*too long"),
    ({"weights": "{folder}/run"}, "--weights: .*config.json"),
    ({"output": "/no/folder/cam.png"}, "--output: /no/folder"),
], ids=str)
def test_mistakes_are_a_line(tiny, tmp_path, changed, message):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{")
  changed = {k: v.format(folder=tmp_path) if isinstance(v, str) else v
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
      ["-m", "metaformer_jax.tools.cam", "--model=resnet18", "--class=cat"])
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith("ConfigError: command line: ")
  assert done.stderr.count("\n") == 1
