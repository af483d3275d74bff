"""The model table: rows agree with built models and published numbers."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import metaformer_jax
from metaformer_jax.checkpoints import published
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import typed
from metaformer_jax.convert import rules
from metaformer_jax.models import cost, settings
from metaformer_jax.tools import summarize

# Models with the same network are built once.
NETWORKS = {}
for _name in metaformer_jax.list_models():
  _spec = metaformer_jax.get_spec(_name)
  NETWORKS.setdefault((_spec.module, repr(_spec.settings), _spec.num_classes,
                       _spec.input_size), []).append(_name)

# Models whose GMACs, counted like the others, differ from the published ones:
# DeiT-B is ViT-B, published with 17.6; ResNet-101 has 7.83.
OTHER_GMACS = {"deit_base_patch16_224": 17.6, "mixer_b16_224": 12.6,
               "resmlp_big_24_224": 100.2, "resnet101": 7.8}


# The default tests have the smallest one of each family, and those of pooling,
# of convolutions and of attention.
SMALLEST = {}
for _name in metaformer_jax.list_models():
  _spec = metaformer_jax.get_spec(_name)
  SMALLEST[_spec.family] = min(
      SMALLEST.get(_spec.family, _spec), _spec, key=lambda spec: spec.n_params)
BUILT = {"poolformer_s12", "caformer_s18",
         *(spec.name for spec in SMALLEST.values())}


@pytest.mark.parametrize("names", [
    pytest.param(names, id=names[0], marks=[pytest.mark.slow] * (
        not BUILT & {*names})) for names in NETWORKS.values()])
def test_row_holds_the_built_model(names):
  spec = metaformer_jax.get_spec(names[0])
  found = cost.of_model(metaformer_jax.create_model(names[0]), spec.input_size)
  for name in names:
    spec = metaformer_jax.get_spec(name)
    assert (found.n_params, found.n_frozen) == (spec.n_params, spec.n_frozen)
    if spec.gmacs is not None:
      want = OTHER_GMACS.get(name, spec.gmacs)
      assert round(found.macs / 1e9, 1) == want


def test_rows_are_complete():
  for name in metaformer_jax.list_models():
    spec = metaformer_jax.get_spec(name)
    assert spec.name == name
    assert spec.family in rules.RULES
    assert spec.source
    assert (spec.top1 is None) == name.endswith("_in21k")
    assert spec.num_classes == (21_841 if name.endswith("_in21k") else 1000)
    assert spec.input_size == (384 if "_384" in name else 224)
    assert spec.interpolation in ("bilinear", "bicubic")
    assert 0.8 <= spec.crop_pct <= 1


def test_modules_take_the_settings_of_their_family():
  for name in metaformer_jax.list_models():
    spec = metaformer_jax.get_spec(name)
    fields = {f.name for f in dataclasses.fields(spec.load_class())}
    compiled = isinstance(spec.settings, settings.MetaFormer)
    assert fields - vars(spec.settings).keys() == {
        "num_classes", "dtype", "parent", "name",
        *(["compile"] if compiled else [])}
    assert vars(spec.settings).keys() <= fields
    assert type(spec.settings) in settings.FAMILIES.values()


def test_every_name_of_both_papers_is_there():
  """The official entry points: ten of the first paper, 55 of the second."""
  sizes = ("s12", "s24", "s36", "m36", "m48")
  first = {f"poolformer_{s}" for s in sizes} | {
      "metaformer_id_s12", "metaformer_pppa_s12_224",
      "metaformer_ppaa_s12_224", "metaformer_pppf_s12_224",
      "metaformer_ppff_s12_224"}
  second = {f"{f}_{s}" for s in sizes
            for f in ("identityformer", "randformer", "poolformerv2")} | {
                f"{f}_{s}{suffix}" for s in ("s18", "s36", "m36", "b36")
                for f in ("convformer", "caformer")
                for suffix in ("", "_384", "_in21ft1k", "_384_in21ft1k",
                               "_in21k")}
  assert len(second) == 55
  assert first | second <= set(metaformer_jax.list_models())


def test_every_model_is_a_valid_config():
  for name in metaformer_jax.list_models():
    config = typed.default()
    config.model.name = name
    config.data.source = "digits"
    assert config_lib.resolve(config).model.overrides() == {}


def test_page_of_models_has_every_row():
  page = (pathlib.Path(__file__).parents[2] / "docs/models.md").read_text()
  named = [line.split(" | ")[0].removeprefix("| ")
           for line in page.splitlines() if line.startswith("| ")][1:]
  assert sorted(named) == metaformer_jax.list_models()
  for pattern in ("poolformer_s12", "randformer_s12", "caformer_s18*21k"):
    for row in summarize.rows(pattern):
      assert f"\n{row}\n" in page
  for name in metaformer_jax.list_models():  # Each file, and its place.
    place = published.place(name)
    cell = f"[{place.name}]({place.url})" if place else "not published"
    assert re.search(rf"^\| {name} \|.* \| {re.escape(cell)} \|", page, re.M)


def test_list_models_takes_a_pattern():
  assert metaformer_jax.list_models("poolformer_s*") == [
      "poolformer_s12", "poolformer_s24", "poolformer_s36"]
  assert metaformer_jax.list_models("caformer*")[0] == "caformer_b36"
  assert metaformer_jax.list_models("resnet*") == [
      "resnet101", "resnet152", "resnet18", "resnet34", "resnet50"]
  assert metaformer_jax.list_models("swin*") == []


def test_unknown_names_suggest_the_nearest():
  with pytest.raises(ValueError, match="did you mean poolformer_s24"):
    metaformer_jax.create_model("poolformr_s24")
  with pytest.raises(ValueError, match="did you mean pool_size"):
    metaformer_jax.create_model("poolformer_s12", pol_size=5)
  model = metaformer_jax.create_model("poolformer_s12", norm="groupnorm")
  with pytest.raises(ValueError, match="did you mean group_norm"):
    model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def test_the_head_has_the_published_classes_by_default():
  for name, want in (("caformer_s18_in21k", 21_841), ("caformer_s18", 1000)):
    model = metaformer_jax.create_model(name, depths=(1, 1, 1, 1))
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0),
                               jnp.zeros((1, 64, 64, 3)))
    assert logits.shape == (1, want)


def test_macs_are_those_of_the_traced_program():
  """At half the side, there are a quarter of the MACs: they are counted."""
  model = metaformer_jax.create_model("poolformer_s12", num_classes=0,
                                      depths=(1, 1, 1, 1))
  ratio = cost.of_model(model, 256).macs / cost.of_model(model, 128).macs
  assert abs(ratio - 4) < 0.01
