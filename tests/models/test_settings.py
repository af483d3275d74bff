"""The families' hyper-parameters: what they declare is what modules do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaformer_jax
from metaformer_jax.config import model as model_lib
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import typed
from metaformer_jax.models import (
  activations,
  mixers,
  norms,
  registry,
  settings,
)

# Of whatever depth, strides and channels are the same.
SHALLOW = {"depths": (1,) * 4, "depth": 1}
# A model of each family, at a stride and channels that differ from its row's.
OTHERS = {
    "poolformer_s12": {"in_stride": 2, "in_pad": 3, "dims": (8, 16, 24, 40)},
    "caformer_s18": {"depths": (1, 1), "dims": (32, 64), "res_scale_init": (),
                     "token_mixers": ("sepconv", "attention")},
    "resnet18": {"depths": (1, 1, 1), "widths": (8, 12, 20)},
    "resnet50": {"depths": (1, 1), "widths": (8, 12)},
    "deit_small_patch16_224": {"patch_size": 8, "dim": 36, "depth": 1},
    "pvt_tiny": {"patch_size": 2, "dims": (8, 16, 10, 16)},
    "mixer_b16_224": {"patch_size": 32, "dim": 24, "depth": 1},
    "resmlp_12_224": {"patch_size": 4, "dim": 12, "depth": 1},
}


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_features_have_the_declared_stride_and_channels(name, changed):
  spec = metaformer_jax.get_spec(name)
  overrides = OTHERS[name] if changed else {
      key: value for key, value in SHALLOW.items() if spec.has(key)}
  model = metaformer_jax.create_model(name, **overrides)
  x = jnp.zeros((1, 64, 128, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  features = jax.eval_shape(
      lambda v: model.apply(v, x, method="features"), variables)
  info = spec.override(**overrides).feature_info()
  assert info == model.feature_info()
  assert {key: y.shape for key, y in features.items()} == {
      key: (1, 64 // stride, 128 // stride, dim)
      for key, (stride, dim) in info.items()}


def test_a_model_of_each_family_is_tried():
  tried = {type(metaformer_jax.get_spec(name).settings) for name in OTHERS}
  assert tried == set(settings.FAMILIES.values())


def test_choices_are_what_modules_know():
  fields = {f.name: f.metadata["choices"]
            for f in dataclasses.fields(settings.MetaFormer)}
  assert fields["token_mixers"] == tuple(sorted(mixers.MIXERS))
  assert fields["norm"] == tuple(sorted(norms.NORMS))
  assert fields["activation"] == tuple(sorted(activations.ACTIVATIONS))


def test_no_row_has_problems():
  for name in metaformer_jax.list_models():
    spec = metaformer_jax.get_spec(name)
    size = spec.input_size
    assert list(spec.settings.check(size, size, spec.num_classes)) == []


def test_mixers_get_what_they_share_with_the_model():
  model = metaformer_jax.create_model(
      "convformer_s18", token_mixers=(
          "pooling", "depthwise_conv", "sepconv", "attention"),
      pool_size=5, attention_proj_bias=True)
  made = [model._mixer(i).keywords for i in range(4)]
  conv = {"conv_kernel_size": 7, "conv_init": "trunc_normal"}
  assert made == [
      {"pool_size": 5, "pool_subtract": True}, conv,
      {**conv, "activation": "star_relu"},
      {"attention_proj_bias": True, "kernels": "xla"}]


@pytest.mark.parametrize("name,changes,line", [
    ("poolformer_s12", {"depths": (1, 2)},
     "depths: has 2 stages, dims has 4, token_mixers has 4; give each the "
     "same number"),
    ("poolformer_s12", {"position_embeddings": (5,)},
     "position_embeddings: there is no stage 5; nearest: 4"),
    ("resnet18", {"widths": (8,)},
     "depths: has 4 stages, widths has 1; give each the same number"),
    ("deit_small_patch16_224", {"n_heads": 5},
     "dim: 384 channels are not divisible by 5 heads; nearest: 385"),
    ("pvt_tiny", {"n_heads": (1, 3, 5, 8)},
     "dims: 128 channels are not divisible by 3 heads; nearest: 129"),
    ("pvt_tiny", {"sr_ratios": (8, 4, 2, 2)},
     "sr_ratios: (8, 4, 2, 2) must end with 1, as a class token cannot be "
     "reduced; nearest: (8, 4, 2, 1)"),
])
def test_modules_refuse_what_configs_refuse(name, changes, line):
  changed = metaformer_jax.get_spec(name).override(**changes)
  assert list(changed.check(224, 224, 1000)) == [line]
  model = metaformer_jax.create_model(name, **changes)
  with pytest.raises(ValueError) as caught:
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  assert str(caught.value) == line


@pytest.mark.parametrize("name,changes,size,line", [
    ("poolformer_s12", {"in_pad": 9}, (224, 224),
     "in_pad: 9 is more than the stem's kernel; nearest: 7"),
    ("poolformer_s12", {}, (2, 224), "image_size: 2 is less than the stem's "
     "kernel, 7, with its padding; nearest: 3"),
    ("poolformer_s12", {"pool_size": 101}, (224, 32),
     "pool_size: 101 is more than twice the image's side; nearest: 65"),
    ("poolformer_s12", {"mlp_ratio": 1e-3}, (224, 224),
     "mlp_ratio: 0.001 gives an MLP without channels; least: 0.015625"),
    ("pvt_tiny", {}, (64, 31), "image_size: 31 gives fewer tokens than are "
     "reduced to one; nearest: 32"),
    ("pvt_tiny", {"mlp_ratios": (8.0, 8.0, 4.0, 1e-3)}, (64, 64),
     "mlp_ratios: 0.001 gives an MLP without channels; least: 0.001953125"),
    ("vit_base_patch16_224", {}, (224, 15),
     "image_size: 15 is less than a patch, 16; nearest: 16"),
    ("mixer_b16_224", {"mlp_ratio": (1e-3, 4.0)}, (224, 224),
     "mlp_ratio: 0.001 gives an MLP without channels; least: "
     f"{1 / 768}"),
    ("resnet18", {"depths": (5000, 5000, 1, 1)}, (64, 64),
     "depths: 10002 blocks; the most are 10000"),
    ("resmlp_12_224", {"depth": 10_001}, (64, 64),
     "depth: 10001 blocks; the most are 10000"),
    ("resnet18", {"widths": (64, 128, 256, 10**6)}, (64, 64),
     "widths: the model has more than 2e+13 parameters; the most are 1e+11; "
     "lower widths, depths or num_classes"),
    ("resmlp_12_224", {"patch_size": 1}, (1024, 1024),
     "dim: the model has more than 1e+13 parameters; the most are 1e+11; "
     "lower dim, depth, mlp_ratio, patch_size or num_classes"),
])
def test_images_and_models_that_do_not_fit_are_told(name, changes, size, line):
  changed = metaformer_jax.get_spec(name).override(**changes)
  assert list(changed.check(*size, 1000)) == [line]


def test_unknown_names_say_which_family_has_them():
  with pytest.raises(ValueError) as caught:
    metaformer_jax.create_model("poolformer_s12", qkv_bias=False)
  assert str(caught.value) == (
      "poolformer_s12 has no hyper-parameter 'qkv_bias'; pvt has it; did you "
      "mean mlp_bias?")
  with pytest.raises(ValueError, match="vit, mlp_mixer, resmlp have it; did "
                     r"you mean depths\?$"):
    metaformer_jax.create_model("resnet18", depth=3)


# --- config.model -----------------------------------------------------------


def test_config_has_every_hyper_parameter_of_every_family():
  keys = {f.name for f in dataclasses.fields(model_lib.Model)}
  declared = {f.name for cls in settings.FAMILIES.values()
              for f in dataclasses.fields(cls)}
  assert keys == declared | {"name", "dtype"}
  defaults = vars(model_lib.Model())
  assert {k for k in declared if defaults[k] is not None} == {"drop_path_rate"}


def other_value(f, value):
  """Another valid value of a hyper-parameter."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, str):
    return next(c for c in f.metadata["choices"] if c != value)
  if isinstance(value, int):
    return value + 2 if f.metadata["each"] == "odd" else value * 2
  if isinstance(value, float):
    return 0.5 if value != 0.5 else 0.25
  if f.metadata["choices"]:
    return tuple("identity" for _ in value)
  if f.name in ("position_embeddings", "sr_ratios"):
    return (2, 1, 1, 1)
  return tuple(2 * v for v in value) or (1.0,) * 4


@pytest.mark.parametrize("name", [
    "poolformer_s12", "resnet18", "deit_small_patch16_224", "pvt_tiny",
    "mixer_b16_224", "resmlp_12_224"])
def test_config_sets_every_hyper_parameter(name):
  spec = metaformer_jax.get_spec(name)
  for f in dataclasses.fields(spec.settings):
    if f.name in ("drop_path_rate", "in_pad"):
      continue
    value = other_value(f, getattr(spec.settings, f.name))
    config = typed.default()
    config.data.source = "digits"
    config.model.name = name
    config.model[f.name] = value
    if f.name == "n_heads" and name.startswith("pvt"):
      config.model.dims = (64, 128, 320, 512)
    cfg = config_lib.resolve(config)
    overrides = cfg.model.overrides()
    assert overrides[f.name] == value
    made = registry.create_model(name, **overrides)
    assert getattr(made, f.name) == value != getattr(spec.settings, f.name)


# Models in which every hyper-parameter of the family matters.
ROLES = {
    "poolformer_s12": {
        "depths": (1, 1, 1, 1), "dims": (32, 32, 32, 32), "head": "mlp",
        "token_mixers": ("pooling", "sepconv", "attention", "depthwise_conv"),
        "res_scale_init": (0.0, 0.0, 1.0, 1.0), "layer_scale_init": 0.1},
    "resnet18": {"depths": (1, 1), "widths": (8, 12)},
    "deit_small_patch16_224": {"depth": 1, "dim": 24, "n_heads": 2},
    "pvt_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 20, 32)},
    "mixer_b16_224": {"depth": 1, "dim": 12},
    "resmlp_12_224": {"depth": 1, "dim": 12},
}


def drawn(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda s: rng.uniform(0.05, 0.3, s.shape).astype(s.dtype), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLES)
def test_weights_show_what_the_roles_say(name):
  """What the same weights compute otherwise has the role "function"."""
  x = np.random.default_rng(1).standard_normal((1, 64, 64, 3)).astype("f")

  def made(**changed):
    model = metaformer_jax.create_model(
        name, num_classes=3, **{**ROLES[name], **changed})
    return model, jax.eval_shape(model.init, jax.random.key(0), x)

  first, shapes = made()
  weights = drawn(shapes)
  want = jax.jit(first.apply)(weights, x)
  for f in dataclasses.fields(metaformer_jax.get_spec(name).settings):
    value = other_value(f, getattr(first, f.name))
    try:
      model, other = made(**{f.name: value})
    except ValueError:  # It does not fit the others: it is not silent.
      continue
    if other != shapes:
      assert f.metadata["role"] != "training", f.name
    elif np.array_equal(jax.jit(model.apply)(weights, x), want):
      assert f.metadata["role"] != "function", f.name  # An initial value.
    else:
      assert f.metadata["role"] == "function", f.name
