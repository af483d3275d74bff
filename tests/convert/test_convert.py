"""Layouts: tensors there and back, and errors for those that do not fit.

Keys and shapes are the originals', from the golden files.
"""

import functools
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases
import pytest

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.convert import adapt, imagenet_21k, layouts, rules

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = [c for c in parity_cases.SMALL if c.gain == 1]


@functools.cache
def target(name, size=None, in_chans=3, **overrides):
  """Shapes of a model's variables."""
  model = metaformer_jax.create_model(name, **overrides)
  size = size or metaformer_jax.get_spec(name).input_size
  return jax.eval_shape(model.init, jax.random.key(0),
                        jnp.zeros((1, size, size, in_chans)))


def target_of(case):
  return target(case.model, num_classes=case.num_classes, **case.overrides)


def family_of(case):
  return metaformer_jax.get_spec(case.model).family


@functools.cache
def tensors_of(name):
  """A case, and its tensors."""
  case = parity_cases.CASES[name]
  golden = parity_cases.Golden.load(GOLDEN / f"{case.name}.npz")
  tensors = parity_cases.weights(golden.state_shapes)
  assert all(str(tensors[key].dtype) in dtype
             for key, _, dtype, _ in golden.state)
  return case, tensors


def assert_same(got, want):
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].dtype == value.dtype and got[name].shape == value.shape
    assert np.array_equal(got[name], value), name


def refused(family, tensors, like, **kwargs):
  with pytest.raises(errors.WeightsError) as e:
    layouts.to_flax(family, tensors, like, **kwargs)
  assert "\n" not in str(e.value)
  return str(e.value)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_there_and_back_is_bit_equal(case):
  case, tensors = tensors_of(case.name)
  family, like = family_of(case), target_of(case)
  variables = layouts.to_flax(family, tensors, like)
  assert_same(layouts.to_torch(family, variables, case.layout), tensors)
  flat = layouts.flatten(variables)
  wanted = layouts.flatten(like)
  assert flat.keys() == wanted.keys()
  for name, value in flat.items():
    assert (value.shape, value.dtype) == (wanted[name].shape,
                                          wanted[name].dtype), name
    assert value.flags.c_contiguous
  # Through every layout that has names for all, ours included.
  for layout in (*rules.RULES[family], "flax"):
    try:
      other = layouts.to_torch(family, variables, layout)
    except errors.WeightsError as e:
      assert re.match(rf"the {layout} layout has no name for \w+/", str(e))
      continue
    assert layouts.recognize(family, other, flat) == layout
    back = layouts.to_flax(family, other, like)
    assert_same(layouts.flatten(back), flat)


def test_no_rule_is_dead(monkeypatch):
  models = {(family_of(case), tuple(layouts.flatten(target_of(case))))
            for case in CASES}
  # Settings of no published model.
  for name in ("poolformer_s12", "caformer_s18"):
    models.add((metaformer_jax.get_spec(name).family, tuple(layouts.flatten(
        target(name, depths=(1,) * 4, layer_scale_init=0.1)))))
  models.add(("resnet", tuple(layouts.flatten(
      target("resnet18", depths=(1,) * 4, stem="3x3")))))
  dead = {}
  for family, known in list(rules.RULES.items()):
    for layout, table in known.items():
      for rule in table:
        monkeypatch.setitem(rules.RULES, family, {layout: (rule,)})
        used = any(layouts.entries(family, layout, names)
                   for of, names in models if of == family)
        # A table may serve two families, neither of which uses all of it.
        dead[id(table), rule] = dead.get((id(table), rule), True) and not used
      monkeypatch.setitem(rules.RULES, family, known)
  assert not [rule for (_, rule), is_dead in dead.items() if is_dead]
  assert {family for family, _ in models} == rules.RULES.keys()


def test_a_dense_layer_may_come_as_a_convolution():
  case, tensors = tensors_of("caformer_s18-official")
  family, like = family_of(case), target_of(case)
  want = layouts.flatten(layouts.to_flax(family, tensors, like))
  convolved = {
      key: value[:, :, None, None] if value.ndim == 2 and "head" not in key
      else value for key, value in tensors.items()}
  assert sum(v.ndim == 4 for v in convolved.values()) > 20
  assert_same(layouts.flatten(layouts.to_flax(family, convolved, like)), want)
  assert "is [64, 2, 32, 1], not" in refused(family, {
      k: v.reshape(64, 2, 32, 1) if v.shape == (64, 64, 1, 1) else v
      for k, v in (convolved | {
          "stages.0.0.token_mixer.pwconv2.weight":
              np.zeros((64, 64, 1, 1), np.float32)}).items()}, like)


def test_a_file_of_something_else_names_layouts_and_keys():
  message = refused("poolformer", {f"bert.{i}": np.zeros(1) for i in range(9)},
                    target("poolformer_s12"))
  assert "flax, huggingface, official, timm" in message
  assert "bert.0, bert.1, bert.2, ..." in message
  refused("poolformer", {}, target("poolformer_s12"))


def test_another_size_lists_all_that_misfits():
  case, tensors = tensors_of("poolformer_s12-huggingface")
  like = target(case.model, num_classes=10, depths=(1, 2, 1, 1),
                dims=(64, 128, 320, 448))
  message = refused(family_of(case), tensors, like)
  count, listed = re.fullmatch(
      r"in the huggingface layout, (\d+) tensors do not fit the model: (.*)",
      message).groups()
  listed = listed.split("; ")
  assert len(listed) == int(count) == len(set(listed))
  names = [key for key, shape in zip(*_their_shapes(case, like))]
  want = dict(zip(*_their_shapes(case, like)))
  expected = {f"{k} is missing" for k in names if k not in tensors}
  expected |= {f"{k} has no place" for k in tensors if k not in want}
  expected |= {f"{k} is {list(v.shape)}, not {list(want[k])}"
               for k, v in tensors.items()
               if k in want and v.shape != want[k]}
  assert set(listed) == expected
  assert "classifier.weight is [10, 512], not [10, 448]" in expected
  assert "poolformer.encoder.block.1.1.layer_scale_1 is missing" in expected
  assert any(e.endswith("has no place") for e in expected)


def _their_shapes(case, like):
  made = layouts.to_torch(family_of(case), jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), like), case.layout)
  return list(made), [value.shape for value in made.values()]


def _renamed(tensors, key, new):
  return {new if k == key else k: v for k, v in tensors.items()}


KEY = "stages.0.0.mlp.fc1.weight"


@pytest.mark.parametrize("change, says", [
    (lambda t: _renamed(t, KEY, f"{KEY}s"),
     [f"{KEY} is missing", f"{KEY}s has no place", ", 2 tensors"]),
    (lambda t: {**t, KEY: t[KEY].T},
     [f"{KEY} is [64, 256], not [256, 64]", ", 1 tensors"]),
    (lambda t: {**t, KEY: t[KEY].astype(np.int64)},
     [f"{KEY} is int64, not float32"]),
    (lambda t: {**t, KEY: t[KEY] > 0}, [f"{KEY} is bool, not float32"]),
    (lambda t: {**t, KEY: t[KEY][None]}, [f"{KEY} is [1, 256, 64], not"]),
    (lambda t: {**t, KEY: t[KEY][:, :, None]}, [f"{KEY} is [256, 64, 1], not"]),
    (lambda t: {**t, KEY: np.float32(1)}, [f"{KEY} is [], not [256, 64]"]),
    (lambda t: {**t, "extra": np.zeros(2)}, ["extra has no place"]),
    (lambda t: {**t, "norm.weight": np.zeros((512, 1), np.float32)},
     ["norm.weight is [512, 1], not [512]"]),
    (lambda t: {**t, "head.bias": np.float32(1)},
     ["head.bias is [], not [10]"]),
    (lambda t: {**t, "downsample_layers.0.conv.weight": np.zeros(
        (64, 147), np.float32)}, ["is [64, 147], not [64, 3, 7, 7]"]),
])
def test_one_wrong_tensor_is_named(change, says):
  case, tensors = tensors_of("identityformer_s12-official")
  def to_shape(name, value, shape):
    return adapt.to_shape(name, value, shape, image_size=(224, 224),
                          new_head=True)

  for kwargs in ({}, {"adapt": to_shape}):
    message = refused(family_of(case), change(tensors), target_of(case),
                      **kwargs)
    for part in says:
      assert part in message


def test_wrong_shapes_of_our_own_layout_are_told():
  like = target("poolformer_s12", num_classes=10, depths=(1,) * 4)
  flat = {k: np.zeros(v.shape, v.dtype)
          for k, v in layouts.flatten(like).items()}

  def to_shape(name, value, shape):
    return adapt.to_shape(name, value, shape, image_size=(224, 224),
                          new_head=True)

  for name in ("params/stage1/downsample/conv/kernel", "params/head/bias"):
    message = refused("poolformer", {**flat, name: np.float32(1)}, like,
                      adapt=to_shape)
    assert message.endswith(f"{name} is [], not {list(flat[name].shape)}")


def test_counters_of_batches():
  case, tensors = tensors_of("resnet18-timm")
  family, like = family_of(case), target_of(case)
  count = "bn1.num_batches_tracked"
  assert tensors[count].shape == () and tensors[count].dtype == np.int64
  variables = layouts.to_flax(family, tensors, like)
  found = variables["batch_stats"]["stem"]["norm"]["n_batches"]
  assert found == 7 and found.shape == () and found.dtype == np.int32
  # Files from before PyTorch 0.4.1 have none.
  old = {k: v for k, v in tensors.items() if "num_batches" not in k}
  stats = layouts.to_flax(family, old, like)["batch_stats"]
  assert stats["stem"]["norm"]["n_batches"] == 0
  message = refused(family, {**tensors, count: np.float32(7.5)}, like)
  assert f"{count} is float32, not int32" in message


def test_a_layout_that_is_not_known_suggests():
  variables = {"params": {"norm": {"scale": np.ones(2)}}}
  with pytest.raises(errors.WeightsError, match="did you mean official"):
    layouts.to_torch("poolformer", variables, "oficial")
  with pytest.raises(errors.WeightsError, match="flax, huggingface, timm"):
    layouts.to_torch("vit", variables, "h")
  with pytest.raises(errors.WeightsError, match="no name for params/mine"):
    layouts.to_torch("poolformer", {"params": {"mine": np.ones(2)}}, "timm")


def test_classes_of_1k_are_the_official_ones():
  table = np.array(imagenet_21k.TO_1K, "<i4")
  assert zlib.crc32(table.tobytes()) == 2_610_403_731  # The official file's.
  assert list(np.flatnonzero(table < 0)) == [850]
  known = np.delete(table, 850)
  assert (np.diff(known) > 0).all() and known[-1] < 21_841
  # misc/process_21k_ckpt_before_1k_finetuning.py, on [classes, channels].
  old = np.random.default_rng(0).normal(size=(21_841, 3)).astype(np.float32)
  new = np.zeros((1000, 3), np.float32)
  new[np.delete(np.arange(1000), 850)] = old[known]
  new[850] = old.mean(0)
  before = old.copy()
  for found, want in ((adapt.head_from_21k(old.T).T, new),
                      (adapt.head_from_21k(old[:, 0]), new[:, 0])):
    np.testing.assert_allclose(found[850], want[850], atol=1e-6)
    found[850] = want[850]
    assert np.array_equal(found, want) and found.dtype == np.float32
  assert np.array_equal(old, before)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_channels_of_the_stem_are_timms(n):
  kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 4)).astype(np.float32)
  oihw = kernel.transpose(3, 2, 0, 1)
  if n == 1:  # timm.models._manipulate.adapt_input_conv
    want = oihw.sum(1, keepdims=True)
  else:
    want = np.concatenate([oihw] * -(-n // 3), 1)[:, :n] * np.float32(3 / n)
  found = adapt.channels(kernel, n)
  assert found.shape == (7, 7, n, 4) and found.dtype == np.float32
  np.testing.assert_allclose(found.transpose(3, 2, 0, 1), want, rtol=1e-6)


@pytest.mark.parametrize("n_tokens", [0, 1, 2])
@pytest.mark.parametrize("image_size, grid", [
    ((224, 224), (14, 14)), ((192, 256), (12, 16)), ((256, 192), (16, 12)),
    ((160, 31), (10, 1)), ((47, 1000), (2, 62)), ((100, 230), (6, 14)),
    ((128, 288), (12, 12))])  # 8 x 18, which models treat as a square.
def test_positions_of_a_sequence(n_tokens, image_size, grid):
  """A linear ramp of positions stays a linear ramp."""
  ramp = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij"),
                  -1).reshape(1, 64, 2).astype(np.float32)
  tokens = np.full((1, n_tokens, 2), 99, np.float32)
  value = np.concatenate([tokens, ramp], 1)
  n = n_tokens + grid[0] * grid[1]
  found = adapt.sequence(value, n, image_size, method="linear",
                         antialias=False)
  assert found.shape == (1, n, 2) and found.dtype == np.float32
  assert np.array_equal(found[:, :n_tokens], tokens)
  found = found[0, n_tokens:].reshape(*grid, 2)
  for axis, side in enumerate(grid):
    want = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0, 7)
    line = np.moveaxis(found[..., axis], axis, 0)[:, 0]
    np.testing.assert_allclose(line, want, atol=1e-5)


def test_positions_of_no_square_are_not_guessed():
  with pytest.raises(ValueError, match="square"):
    adapt.sequence(np.zeros((1, 1 + 12 * 16, 4), np.float32), 197, (224, 224))
  with pytest.raises(ValueError, match="do not make 20 patches"):
    adapt.sequence(np.zeros((1, 50, 4), np.float32), 21, (224, 224))
