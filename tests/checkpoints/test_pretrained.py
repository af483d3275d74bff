"""`load_pretrained`: files of weights into models that differ from them."""

import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases
import pytest
import torch_format as tf
from flax import traverse_util

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.convert import files, layouts
from metaformer_jax.tasks import base
from metaformer_jax.training import backbone

SMALL = {"depths": (1,) * 4, "dims": (8, 16, 24, 32)}
TINY = {"depth": 1, "dim": 24}
VIT = {**TINY, "n_heads": 2}
RESNET = {"depths": (1,) * 4, "widths": (4, 8, 8, 8)}
PVT = {"depths": (1,) * 4, "dims": (8,) * 4, "n_heads": (1,) * 4,
       "mlp_ratios": (2,) * 4}


def tensors_of(name, layout, *, size=None, in_chans=3, num_classes=10,
               **overrides):
  """Random tensors of a model in a layout."""
  model = metaformer_jax.create_model(name, num_classes=num_classes,
                                      **overrides)
  spec = metaformer_jax.get_spec(name)
  size = size or spec.input_size
  like = jax.eval_shape(model.init, jax.random.key(0),
                        jnp.zeros((1, size, size, in_chans)))
  official = "official" if spec.family in (
      "poolformer", "metaformer_baselines", "pvt") else "timm"
  drawn = parity_cases.weights({
      k: v.shape for k, v in layouts.to_torch(spec.family, jax.tree.map(
          lambda x: np.zeros(x.shape, x.dtype), like), official).items()})
  variables = layouts.to_flax(spec.family, drawn, like)
  return layouts.to_torch(spec.family, variables, layout)


@pytest.fixture
def write(tmp_path):
  """Writes a file of tensors_of(...), with changes; returns its path."""

  def write(*args, change=lambda tensors: tensors, **kwargs) -> pathlib.Path:
    path = tmp_path / "weights.safetensors"
    files.write_safetensors(path, change(tensors_of(*args, **kwargs)), {})
    return path

  return write


def flat(variables):
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(
      variables, sep="/").items()}


def load(name, path, **kwargs):
  return flat(metaformer_jax.load_pretrained(name, path, **kwargs))


def changed(got, want):
  """Names whose values differ; both have the same names."""
  assert got.keys() == want.keys()
  return {k for k in want if not np.array_equal(got[k], want[k])}


def refused(name, path, **kwargs):
  with pytest.raises(errors.WeightsError) as e:
    metaformer_jax.load_pretrained(name, path, **kwargs)
  message = str(e.value)
  assert message.isprintable() and message.startswith(f"{path}: "), message
  return message


@pytest.mark.parametrize("layout", ["official", "timm", "huggingface", "flax"])
def test_every_layout_as_safetensors_and_pth(layout, tmp_path, write):
  want = tensors_of("poolformer_s12", "flax", **SMALL)
  path = write("poolformer_s12", layout, **SMALL)
  assert not changed(load("poolformer_s12", path, num_classes=10, **SMALL),
                     want)
  pth = tmp_path / "weights.pth.tar"
  pth.write_bytes(tf.zipped({"epoch": 3, "state_dict": {
      f"module.{k}": tf.tensor(v) for k, v in tensors_of(
          "poolformer_s12", layout, **SMALL).items()}}))
  assert not changed(load("poolformer_s12", pth, num_classes=10, **SMALL),
                     want)


def test_half_precision_becomes_float32(write):
  path = write("resnet18", "timm", **RESNET, change=lambda tensors: {
      k: v.astype(np.float16) if v.dtype == np.float32 else v
      for k, v in tensors.items()})
  got = load("resnet18", path, num_classes=10, **RESNET)
  for name, value in tensors_of("resnet18", "flax", **RESNET).items():
    if value.dtype == np.float32:
      value = value.astype(np.float16).astype(np.float32)
    assert got[name].dtype == value.dtype
    assert np.array_equal(got[name], value)


def test_damaged_files_come_through_as_one_line(tmp_path, write):
  options = {"num_classes": 10, **SMALL}
  path = write("poolformer_s12", "timm", **SMALL,
               change=lambda t: {**t, "norm.w": np.full(3, np.nan, np.float32)})
  assert "norm.w (3 of 3 values NaN" in refused("poolformer_s12", path,
                                                 **options)
  path.write_bytes(path.read_bytes()[:-9])
  assert "damaged" in refused("poolformer_s12", path, **options)
  pth = tmp_path / "evil.pth"
  ran = tmp_path / "ran"

  class Evil:
    def __reduce__(self):
      return pathlib.Path.touch, (ran,)

  pth.write_bytes(pickle.dumps({"head.bias": Evil()}, protocol=2))
  refused("poolformer_s12", pth, **options)
  assert not ran.exists()
  refused("poolformer_s12", tmp_path / ("x" * 300), **options)
  near = refused("poolformer_s12", tmp_path / "weights.safetensor", **options)
  assert "did you mean weights.safetensors?" in near
  assert "~nobody-here/x" in refused("poolformer_s12", "~nobody-here/x",
                                     **options)


@pytest.mark.parametrize("name, layout, settings, head", [
    pytest.param("poolformer_s12", "official", SMALL,
                 ("head/kernel", "head/bias"), marks=pytest.mark.slow),
    ("caformer_s18", "timm", SMALL, ("head/fc2/kernel", "head/fc2/bias")),
    ("deit_small_distilled_patch16_224", "timm", VIT,
     ("head/kernel", "head/bias", "head_dist/kernel", "head_dist/bias")),
    pytest.param("resnet18", "timm", RESNET, ("head/kernel", "head/bias"),
                 marks=pytest.mark.slow),
    pytest.param("pvt_tiny", "official", PVT, ("head/kernel", "head/bias"),
                 marks=pytest.mark.slow),
])
def test_heads(name, layout, settings, head, write):
  path = write(name, layout, **settings)
  head = {f"params/{leaf}" for leaf in head}
  same = load(name, path, num_classes=10, **settings)
  assert not changed(same, tensors_of(name, "flax", **settings))
  # Another number: that layer is initialised from the key, nothing else.
  new = [load(name, path, num_classes=7, rng=jax.random.key(seed), **settings)
         for seed in (0, 0, 1)]
  for loaded in new:
    assert changed(loaded, same) == head
    assert all(loaded[leaf].shape[-1] == 7 for leaf in head)
  assert not changed(new[0], new[1])
  assert changed(new[0], new[2]) >= {x for x in head if "kernel" in x}
  # No classes: the whole head is omitted.
  none = load(name, path, num_classes=0, **settings)
  assert not any("/head" in leaf for leaf in none)
  assert not changed(none, {k: v for k, v in same.items() if "/head" not in k})
  # The published number, which the file does not have.
  message = refused(name, path, **settings)
  assert f"{len(head)} tensors" in message and "[10], not [1000]" in message
  assert message.count("num_classes") == 1


def test_a_new_head_is_the_models_own(write):
  path = write("caformer_s18", "official", **SMALL)
  rng = jax.random.key(3)
  model = metaformer_jax.create_model("caformer_s18", num_classes=7, **SMALL)
  want = flat(jax.jit(model.init)(rng, jnp.zeros((1, 32, 32, 3))))
  got = load("caformer_s18", path, num_classes=7, rng=rng, input_size=32,
             **SMALL)
  name = "params/head/fc2/kernel"
  np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


@pytest.mark.slow
def test_without_a_head_the_file_need_not_have_one(tmp_path, write):
  path = write("caformer_s18", "official", **SMALL)
  want = load("caformer_s18", path, num_classes=0, **SMALL)
  bare = tmp_path / "bare.safetensors"
  files.write_safetensors(bare, layouts.to_torch(
      "metaformer_baselines", layouts.unflatten(want), "timm"), {})
  got = load("caformer_s18", bare, num_classes=0, **SMALL)
  assert not changed(got, want)
  # A new head is as another number of classes, and has to be asked for.
  new = load("caformer_s18", bare, num_classes=10, **SMALL)
  assert not changed({k: v for k, v in new.items() if "/head" not in k}, want)
  fresh = load("caformer_s18", path, num_classes=7, **SMALL)
  assert new.keys() == fresh.keys()
  assert new["params/head/fc2/kernel"].std() == pytest.approx(0.02, rel=0.2)
  assert "has no head (params/head/fc1/bias, " in refused(
      "caformer_s18", bare, **SMALL)
  # Only a whole head may be absent.
  part = tensors_of("caformer_s18", "timm", **SMALL)
  del part["head.fc.fc1.bias"]
  files.write_safetensors(bare, part, {})
  assert "head.fc.fc1.bias is missing" in refused(
      "caformer_s18", bare, num_classes=10, **SMALL)


def test_head_of_21k_classes(write):
  path = write("caformer_s18", "official", num_classes=21_841, **SMALL)
  big = tensors_of("caformer_s18", "official", num_classes=21_841, **SMALL)
  got = load("caformer_s18", path, head_21k=True, **SMALL)
  kernel = got["params/head/fc2/kernel"]
  assert kernel.shape == (128, 1000)
  old = big["head.fc2.weight"]
  assert np.array_equal(kernel[:, [0, 1, 2]], old[[359, 368, 460]].T)
  np.testing.assert_allclose(kernel[:, 850], old.mean(0), atol=1e-6)
  np.testing.assert_allclose(got["params/head/fc2/bias"][850],
                             big["head.fc2.bias"].mean(), atol=1e-6)
  rest = {k: v for k, v in got.items() if "fc2" not in k or "mlp" in k}
  want = tensors_of("caformer_s18", "flax", num_classes=21_841, **SMALL)
  assert not changed(rest, {k: want[k] for k in rest})
  # A run on ImageNet does so; any other head is re-initialised.
  for n in (1000, 10):
    model = metaformer_jax.create_model("caformer_s18", num_classes=n, **SMALL)
    shapes = jax.eval_shape(model.init, jax.random.key(0),
                            jnp.zeros((1, 224, 224, 3)))
    part = base.Backbone("metaformer_baselines", "", (224, 224), model)
    read = flat(backbone.read_weights(
        str(path), part, shapes, head_21k=True))
    assert not changed(read, got if n == 1000 else {
        k: v for k, v in got.items() if "head/fc2" not in k})
  # Never silently something else.
  with pytest.raises(ValueError, match="head_21k gives 1000"):
    metaformer_jax.load_pretrained("caformer_s18", path, head_21k=True,
                                   num_classes=10, **SMALL)
  with pytest.raises(ValueError, match="head_21k gives 1000"):
    metaformer_jax.load_pretrained("caformer_s18_in21k", path, head_21k=True)
  path = write("caformer_s18", "official", **SMALL)
  assert "head.fc2.bias is [10], not [1000]" in refused(
      "caformer_s18", path, head_21k=True, num_classes=1000, **SMALL)


def test_invalid_numbers_are_refused(write):
  path = write("poolformer_s12", "official", **SMALL)
  for wrong in ({"num_classes": -1}, {"in_chans": 0}, {"input_size": 0},
                {"input_size": (32, -1)}):
    with pytest.raises(ValueError, match="must be at least 0, in_chans"):
      metaformer_jax.load_pretrained("poolformer_s12", path, **wrong)
  with pytest.raises(ValueError, match="did you mean poolformer_s12"):
    metaformer_jax.load_pretrained("poolfomer_s12", path)
  with pytest.raises(ValueError, match="did you mean depths"):
    metaformer_jax.load_pretrained("poolformer_s12", path, depth=3)


@pytest.mark.parametrize("name, layout, settings", [
    ("poolformer_s12", "official", SMALL), ("resnet18", "timm", RESNET),
    ("vit_base_patch16_224", "timm", VIT), ("pvt_tiny", "official", PVT),
    ("mixer_b16_224", "timm", TINY)])
@pytest.mark.parametrize("n", [
    1, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 6, 2))])
def test_only_the_stem_depends_on_the_channels(name, layout, settings, n,
                                               write):
  path = write(name, layout, **settings)
  three = tensors_of(name, "flax", **settings)
  got = load(name, path, num_classes=10, in_chans=n, **settings)
  stem, = changed(got, three)
  assert stem.endswith("kernel") and got[stem].shape[2] == n
  if n in (1, 6):
    np.testing.assert_allclose(got[stem].sum(2), three[stem].sum(2), atol=1e-5)
  path = write(name, layout, in_chans=n, **settings)
  assert f", {n}, " in refused(name, path, num_classes=10, **settings)


@pytest.mark.slow
def test_logits_of_other_channels_are_those_of_repeated_ones(write):
  path = write("poolformer_s12", "official", size=64, **SMALL)
  model = metaformer_jax.create_model("poolformer_s12", num_classes=10, **SMALL)
  x = parity_cases.images(2, 64, 64)

  def logits(in_chans, images):
    return model.apply(metaformer_jax.load_pretrained(
        "poolformer_s12", path, num_classes=10, in_chans=in_chans,
        input_size=64, **SMALL), images)

  want = logits(3, x)
  # Grey images, of one channel or of three.
  grey = x[..., :1]
  np.testing.assert_allclose(logits(1, grey), logits(3, grey.repeat(3, -1)),
                             atol=1e-5)
  # The three twice, at half the weight each.
  np.testing.assert_allclose(logits(6, np.tile(x, 2)), want, atol=1e-5)


def test_hybrids_are_resized(write):
  name = "metaformer_ppaa_s12_224"
  path = write(name, "official", **SMALL)
  as_is = load(name, path, num_classes=10, **SMALL)
  want = tensors_of(name, "flax", **SMALL)
  assert not changed(as_is, want)
  positions = "params/stage3/pos_embed/embedding"
  for size, grid in ((384, (24, 24)), ((192, 256), (12, 16)), (16, (1, 1)),
                     ((16, 64), (1, 4))):
    got = load(name, path, num_classes=10, input_size=size, **SMALL)
    assert changed(got, want) == {positions}
    assert got[positions].shape == (*grid, 24)
    np.testing.assert_allclose(
        got[positions], jax.image.resize(want[positions], (*grid, 24),
                                         "cubic"), atol=1e-6)


@pytest.mark.parametrize("name, layout, settings, size", [
    ("vit_base_patch16_224", "timm", VIT, (128, 160)),
    ("deit_small_distilled_patch16_224", "timm", VIT, (96, 160)),
    pytest.param("pvt_tiny", "official", PVT, (128, 160),
                 marks=pytest.mark.slow)])
def test_resized_when_loaded_or_when_run_is_the_same(name, layout, settings,
                                                     size, write):
  path = write(name, layout, **settings)
  model = metaformer_jax.create_model(name, num_classes=10, **settings)
  x = parity_cases.images(1, *size)
  native, resized = (metaformer_jax.load_pretrained(
      name, path, num_classes=10, input_size=s, **settings)
      for s in (224, size))
  moved = changed({k: v.shape for k, v in flat(resized).items()},
                  {k: v.shape for k, v in flat(native).items()})
  assert moved and all("pos_embed" in k for k in moved)
  run = jax.jit(model.apply)
  want = run(native, x)
  np.testing.assert_allclose(run(resized, x), want, rtol=0,
                             atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name, layout, settings", [
    ("metaformer_pppf_s12_224", "official", SMALL),
    ("randformer_s12", "official", SMALL), ("mixer_b16_224", "timm", TINY),
    ("resmlp_12_224", "timm", TINY), ("resmlp_12_224", "official", TINY)])
def test_a_matrix_over_all_pixels_is_of_one_size(name, layout, settings, write):
  path = write(name, layout, **settings)
  message = refused(name, path, num_classes=10, input_size=384, **settings)
  assert message.count("only works at its image size") == 1
  assert "input_size" in message and "], not [" in message
  assert not changed(load(name, path, num_classes=10, **settings),
                     tensors_of(name, "flax", **settings))


@pytest.mark.parametrize("name, layout", [
    ("poolformer_s12", "timm"), ("convformer_s18", "official")])
def test_models_of_any_size_load_the_same(name, layout, write):
  path = write(name, layout, **SMALL)
  assert not changed(
      load(name, path, num_classes=10, input_size=384, **SMALL),
      tensors_of(name, "flax", **SMALL))


def test_adaptations_are_logged(write, caplog):
  path = write("metaformer_ppaa_s12_224", "official", **SMALL)
  with caplog.at_level("INFO", logger="metaformer_jax"):
    load("metaformer_ppaa_s12_224", path, num_classes=7, in_chans=1,
         input_size=64, **SMALL)
  for words in ("head/kernel: 10 outputs, re-initialised with 7",
                "conv/kernel: adapted from 3 channels to 1",
                "embedding: resized from (14, 14, 24) to (4, 4, 24)"):
    assert words in caplog.text
