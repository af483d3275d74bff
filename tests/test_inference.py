"""`metaformer_jax.load`: from names, files of every layout, and runs."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

import metaformer_jax
from metaformer_jax import errors, tasks
from metaformer_jax.config import default, resolve, saved, typed
from metaformer_jax.convert import files, layouts, rules
from metaformer_jax.runtime import devices
from metaformer_jax.tools import convert
from metaformer_jax.training import evaluate

STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
SMALL = {
    "poolformer_s12": STAGES,
    "caformer_s18": STAGES,
    "resnet50": {"depths": (1, 1, 1, 1), "widths": (4, 8, 8, 8)},
    "deit_small_distilled_patch16_224": {"depth": 1, "dim": 12, "n_heads": 2},
    "pvt_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8),
                 "n_heads": (1, 1, 2, 2)},
    "mixer_b16_224": {"depth": 1, "dim": 12},
    "resmlp_12_224": {"depth": 1, "dim": 12},
}
# Of the default tests, every layout of PoolFormer, one of other families: all
# are read and written by tests/convert.
CASES = [pytest.param(
    name, layout, marks=[pytest.mark.slow] * bool(
        i and name != "poolformer_s12"))
         for name in SMALL for i, layout in enumerate((
             *rules.RULES[metaformer_jax.get_spec(name).family], "flax"))]


def published(name, **model):
  """An experiment of a small form of a model, for images of 32 pixels."""
  return resolve.resolve({
      "model": {"name": name, **SMALL[name], **model},
      "data": {"source": "digits", "mean": (0.1, 0.2, 0.3)},
      "task": {"num_classes": 10, "image_size": 32,
               "class_names": [f"digit {i}" for i in range(10)]}})


def variables_of(cfg, seed=0):
  """Random values for all variables of the model."""
  _, task = tasks.create(cfg, files=False)
  shapes = jax.eval_shape(task.model.init, jax.random.key(0),
                          *task.init_inputs())
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: rng.uniform(0.05, 0.3, s.shape).astype(s.dtype), shapes)


def check_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, dict(got), dict(want))


def write(path, cfg, variables, layout, told=True):
  family = metaformer_jax.get_spec(cfg.model.name).family
  files.write_safetensors(
      path, layouts.to_torch(family, variables, layout),
      {saved.METADATA: typed.to_json(cfg)} if told else {})


@pytest.mark.parametrize("name,layout", CASES)
def test_every_family_and_layout(name, layout, tmp_path):
  cfg = published(name)
  variables = variables_of(cfg)
  path = tmp_path / "weights.safetensors"
  write(path, cfg, variables, layout)
  loaded = metaformer_jax.load(path)
  check_equal(loaded.variables, variables)
  assert loaded.class_names[3] == "digit 3"
  assert loaded.cfg.data.mean == (0.1, 0.2, 0.3)
  # The same, for who names the model.
  check_equal(metaformer_jax.load_pretrained(name, path), variables)
  if layout != "flax":  # The values are the same.
    return
  image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
  found, = loaded.predict(image)
  example = loaded.preprocess(image)["image"]
  assert example.shape == (32, 32, 3)
  x = (example / 255 - np.array(cfg.data.mean)) / np.array(cfg.data.std)
  want = np.asarray(jax.nn.softmax(loaded.model.apply(
      variables, jnp.asarray(x[None], jnp.float32))))[0]
  np.testing.assert_allclose(found["probabilities"], np.sort(want)[::-1],
                             rtol=2e-3)
  assert found["names"] == [f"digit {i}" for i in found["classes"]]


@pytest.mark.parametrize("settings", [
    {"pool_size": 5}, {"norm": "layer_norm"},
    *(pytest.param(settings, marks=pytest.mark.slow) for settings in (
        {"activation": "relu"},
        {"token_mixers": ("identity",) * 4}, {"pool_subtract": False},
        {"residual": False}, {"norm_eps": 1e-3}, {"head_norm_first": False},
        {"in_pad": 3}))], ids=lambda settings: next(iter(settings)))
def test_settings_that_the_weights_do_not_show(settings, tmp_path):
  """They are taken from the file; others are an error; layouts are refused."""
  (key, value), = settings.items()
  cfg = published("poolformer_s12", **settings)
  variables = variables_of(cfg)
  path = tmp_path / "weights.safetensors"
  write(path, cfg, variables, "flax")
  assert getattr(metaformer_jax.load(path).model, key) == value
  usual = getattr(metaformer_jax.get_spec("poolformer_s12").settings, key)
  for read in (lambda: metaformer_jax.load(path, **{key: usual}),
               lambda: metaformer_jax.load_pretrained(
                   "poolformer_s12", path, **{key: usual})):
    with pytest.raises(errors.WeightsError, match=f"model.{key}: "):
      read()
  arguments = convert_arguments(path, tmp_path / "out.safetensors")
  # timm computes PoolFormer's head in the other order.
  for layout in ("official", "timm")[:1 if key == "head_norm_first" else 2]:
    with pytest.raises(errors.ConfigError, match=f"cannot express.*{key}: "):
      convert.main(dataclasses.replace(arguments, layout=layout))
  convert.main(arguments)
  again = metaformer_jax.load(tmp_path / "out.safetensors")
  assert getattr(again.model, key) == value
  check_equal(again.variables, variables)


@dataclasses.dataclass(frozen=True)
class convert_arguments:
  input: pathlib.Path
  output: pathlib.Path
  layout: str = "flax"
  model: str | None = None
  num_classes: int | None = None
  head_21k: bool = False
  in_chans: int = 3
  input_size: int | None = None
  allow_import: str = ""


@pytest.mark.parametrize("settings", [
    {"mlp_ratio": 2.0}, {"mlp_bias": False}, {"layer_scale_init": 0.0},
    {"drop_path_rate": 0.3}], ids=lambda settings: next(iter(settings)))
def test_settings_that_show_or_do_not_matter_are_exported(settings, tmp_path):
  cfg = published("poolformer_s12", **settings)
  path = tmp_path / "weights.safetensors"
  write(path, cfg, variables_of(cfg), "flax")
  convert.main(convert_arguments(path, tmp_path / "out.safetensors", "timm"))


@pytest.mark.slow
def test_runs_of_every_kind_of_override(tmp_path):
  """The model of a run is that of its evaluation, whatever it changed."""
  config = default()
  config.update_from_flattened_dict({
      "model.name": "caformer_s18", "model.depths": (1, 1),
      "model.dims": (8, 16), "model.token_mixers": ("sepconv", "attention"),
      "model.conv_kernel_size": 5, "model.res_scale_init": (0.0, 0.9),
      "model.norm_eps": 1e-3, "model.head_norm_first": True,
      "model.norm": "batch_norm", "model.norm_bias": True,
      "data.source": "digits",
      "data.mean": (0.4,) * 3, "task.image_size": 16, "train.batch_size": 32,
      "train.steps": 2, "train.ema_decay": 0.5, "log.tensorboard": False})
  cfg, task = tasks.create(resolve.resolve(config))
  small_runs.run(cfg, task, tmp_path / "run")
  loaded = metaformer_jax.load(tmp_path / "run")
  assert loaded.cfg == cfg and loaded.model == task.model
  result = evaluate.evaluate_checkpoint(
      cfg, task, devices.make_mesh(cfg), tmp_path / "run", "last")
  right = n = 0
  predict = jax.jit(loaded.task.predict)
  for batch in loaded.task.make_data("eval").eval_batches():
    logits = np.asarray(predict(loaded.variables, batch))
    right += ((logits.argmax(-1) == batch["label"]) & batch["mask"]).sum()
    n += batch["mask"].sum()
  assert right / n == pytest.approx(result["top1"], abs=1e-6)
  same = metaformer_jax.load_pretrained("caformer_s18", tmp_path / "run")
  check_equal(same, loaded.variables)
  ten = metaformer_jax.load(tmp_path / "run", num_classes=7)
  assert ten.variables["params"]["head"]["fc2"]["bias"].shape == (7,)
  assert ten.class_names is None


@pytest.mark.parametrize("call,words", [
    (lambda path: metaformer_jax.load(path, model="resnet50"),
     "is of poolformer_s12, not resnet50"),
    (lambda path: metaformer_jax.load(path, pool_sise=3), "pool_sise"),
    (lambda path: metaformer_jax.load(path.with_name("none.safetensors")),
     "does not exist"),
    (lambda path: metaformer_jax.load_pretrained("resnet50", path),
     "config.model.name: poolformer_s12, resnet50")])
def test_what_does_not_fit_is_one_line(tmp_path, call, words):
  cfg = published("poolformer_s12")
  path = tmp_path / "weights.safetensors"
  write(path, cfg, variables_of(cfg), "timm")
  with pytest.raises(errors.ConfigError) as caught:
    call(path)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_metadata_is_what_convert_writes(tmp_path):
  cfg = published("poolformer_s12")
  path = tmp_path / "weights.safetensors"
  write(path, cfg, variables_of(cfg), "flax")
  convert.main(convert_arguments(path, tmp_path / "3.safetensors", "timm",
                                 num_classes=3, input_size=64))
  loaded = metaformer_jax.load(tmp_path / "3.safetensors")
  assert loaded.cfg.task.num_classes == 3 and loaded.class_names is None
  assert loaded.cfg.task.image_size == 64
  assert loaded.cfg.data.mean == (0.1, 0.2, 0.3)
  made = saved.read_weights(tmp_path / "3.safetensors")
  assert json.loads(typed.to_json(made))["model"]["name"] == "poolformer_s12"


def test_arrays_that_are_not_images_are_one_line(tmp_path):
  path = tmp_path / "weights.safetensors"
  cfg = published("poolformer_s12")
  write(path, cfg, variables_of(cfg), "flax")
  loaded = metaformer_jax.load(path)
  image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  first = image.transpose(2, 0, 1)
  for wrong, words in (
      (first, "[3, 40, 50] has its channels first; transpose(1, 2, 0)"),
      (np.stack([first, first]), "[3, 40, 50] has its channels first"),
      (image / 255, "float64, for which white is not defined"),
      (image.astype(np.float32), "(255 * image).round().astype('uint8')"),
      (jnp.asarray(first), "channels first"), (image[..., :2], "2 channels"),
      ([image, image[:0]], "has no pixels"), ([None], "this NoneType cannot")):
    with pytest.raises(errors.DataError) as e:
      loaded.predict(wrong)
    assert words in str(e.value) and "\n" not in str(e.value)
  # Of jax, and several in one array.
  want = loaded.preprocess(image)["image"]
  np.testing.assert_array_equal(
      loaded.preprocess(jnp.asarray(image))["image"], want)
  one, (also, _) = loaded.predict(image)[0], loaded.predict(
      jnp.stack([image, image]))
  np.testing.assert_allclose(one["probabilities"], also["probabilities"],
                             rtol=1e-5)
  assert loaded.predict(np.empty((0, 40, 50, 3), np.uint8)) == []


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (
        name in ("caformer_s18", "resnet50"))) for name in SMALL])
def test_models_refuse_what_is_not_normalised_images(name):
  """In one line, at their entry; the shapes are enough to see it."""
  model = metaformer_jax.create_model(name, num_classes=3, **SMALL[name])

  def init(*shape):
    return jax.eval_shape(model.init, jax.random.key(0),
                          jax.ShapeDtypeStruct(shape, jnp.float32))

  def apply(variables, *shape, dtype=jnp.float32, method="__call__"):
    return jax.eval_shape(functools.partial(model.apply, method=method),
                          variables, jax.ShapeDtypeStruct(shape, dtype))

  variables, gray = init(1, 32, 32, 3), init(1, 32, 32, 1)
  come_last = r"\[2, 3, 32, 32\]; the channels come last: .*0, 2, 3, 1"
  for method in ("__call__", "features"):
    for shape, message in (
        ((2, 3, 32, 32), come_last), ((2, 32, 32, 5), r"\[2, 32, 32, 5\]"),
        ((2, 32, 32, 1), r"\[2, 32, 32, 1\]"),
        ((32, 32, 3), r"\[32, 32, 3\]; there is no batch axis")):
      with pytest.raises(ValueError, match=(
          rf"^images are \[B, H, W, 3\], not {message}")):
        apply(variables, *shape, method=method)
    for dtype in (jnp.uint8, jnp.int32, jnp.bool_):
      with pytest.raises(ValueError, match="^images are normalised floats, not "
                         f"{jnp.dtype(dtype)}"):
        apply(variables, 2, 32, 32, 3, dtype=dtype, method=method)
  with pytest.raises(ValueError, match=come_last):
    init(2, 3, 32, 32)
  with pytest.raises(ValueError, match=r"^images are \[B, H, W, 1\], not"):
    apply(gray, 2, 32, 32, 3)
  assert apply(gray, 2, 32, 32, 1).shape == (2, 3)
  assert apply(variables, 2, 32, 32, 3, dtype=jnp.bfloat16).shape == (2, 3)
