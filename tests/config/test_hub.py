"""config.json of transformers and timm as experiments, and back."""

import dataclasses
import json
import re

import hub_cases
import pytest

import metaformer_jax
from metaformer_jax import errors, inference
from metaformer_jax.config import imagenet, saved, typed
from metaformer_jax.config.hub import folders, kinds


def refused(folder):
  """The error, without the path of the file that it names."""
  with pytest.raises(errors.ConfigError) as e:
    saved.read_weights(folder)
  message = str(e.value)
  assert message.isprintable() and message.startswith(f"{folder}/"), message
  return message.removeprefix(f"{folder}/")


def test_preprocessing_is_the_folders():
  cfg = saved.read_weights(hub_cases.GOLDEN / "poolformer")
  assert (cfg.task.image_size, cfg.task.crop_pct) == (32, 0.8)
  assert cfg.task.interpolation == "bilinear"
  assert cfg.data.mean == (0.4, 0.5, 0.6)
  deit = saved.read_weights(hub_cases.GOLDEN / "deit").task
  assert deit.image_size == 32 and int(32 / deit.crop_pct) == 41
  # Without a file of it, as the published model's.
  vit = saved.read_weights(hub_cases.GOLDEN / "vit")
  assert vit.data.mean == (0.5,) * 3 and vit.task.crop_pct == 0.9


CONVNEXT = {"image_processor_type": "ConvNextImageProcessor",
            "crop_size": None, "crop_pct": 0.875}


@pytest.mark.parametrize("change, side, resized", [
    ({}, 32, 40), ({"crop_pct": None}, 32, 32), ({"crop_size": None}, 32, 40),
    ({"size": {"shortest_edge": 46}, "crop_pct": None}, 32, 46),
    ({"size": {"height": 45, "width": 45}, "crop_pct": None}, 32, 45),
    ({"size": 36, "crop_pct": None}, 32, 36),
    ({"size": 50, "crop_pct": None, "do_center_crop": False}, 50, 50),
    ({**CONVNEXT, "size": {"shortest_edge": 224}}, 224, 256),
    ({**CONVNEXT, "size": {"shortest_edge": 384}}, 384, 384),
])
def test_sizes_of_other_processors(change, side, resized, tmp_path):
  folder = hub_cases.changed(tmp_path, "poolformer",
                             file="preprocessor_config.json", **change)
  task = saved.read_weights(folder).task
  assert task.image_size == side
  assert int(side / task.crop_pct) == resized


@pytest.mark.parametrize("key, value", [
    ("do_resize", False), ("do_rescale", False), ("rescale_factor", 1 / 127.5),
    ("do_pad", True), ("resample", 0), ("resample", [3]), ("crop_pct", 1.5),
    ("crop_pct", "a"), ("size", {"height": 32, "width": 24}), ("size", "a"),
    ("size", {"longest_edge": 32}), ("crop_size", [32, 32]),
    ("image_mean", [0.5]), ("image_std", [0, 1, 1])])
def test_preprocessing_that_cannot_be_expressed(key, value, tmp_path):
  folder = hub_cases.changed(tmp_path, "poolformer",
                             file="preprocessor_config.json", **{key: value})
  assert f"preprocessor_config.json: {key}: " in refused(folder)


@pytest.mark.parametrize("name, key, value", [
    ("poolformer", "hidden_act", "gelu_new"), ("poolformer", "padding", [2, 0]),
    ("poolformer", "strides", [4, 2, 2, 1]), ("poolformer", "depths", [1] * 3),
    ("poolformer", "patch_sizes", [7, 5, 3, 3]), ("poolformer", "depths", []),
    ("poolformer", "pool_size", 4), ("poolformer", "pool_size", "3"),
    ("poolformer", "num_channels", 1), ("poolformer", "mlp_ratio", 10**400),
    ("poolformer", "num_encoder_blocks", 3), ("poolformer", "mlp_ratio", True),
    ("poolformer", "use_layer_scale", 1), ("poolformer", "hidden_sizes", None),
    ("poolformer", "hidden_sizes", [8, 8, 8, -8]),
    ("poolformer", "pool_sizes", 3),
    ("vit", "qkv_bias", False), ("vit", "hidden_act", "quick_gelu"),
    ("vit", "hidden_size", 0), ("vit", "image_size", [32, 24]),
    ("vit", "patch_size", [8, 4]), ("vit", "num_attention_heads", 3),
    ("vit", "layer_norm_eps", 0), ("vit", "quantization_config", {}),
    ("vit", "num_hidden_layers", 2.5), ("vit", "hidden_size", 2**40),
    ("resnet", "downsample_in_bottleneck", True),
    ("resnet", "downsample_in_first_stage", True),
    ("resnet", "embedding_size", 8), ("resnet", "layer_type", "next"),
    ("pvt", "strides", [4, 2, 1, 2]), ("pvt", "patch_sizes", [8, 2, 2, 2]),
    ("vit", "architectures", ["ViTForMaskedImageModeling"]),
    ("vit", "architectures", ["ViTModel", "ViTModel"]),
    ("vit", "architectures", "ViTModel"),
    ("vit", "model_type", "swin"), ("vit", "model_type", ["vit"]),
    ("vit", "num_labels", 3), ("vit", "num_labels", "5"),
    ("vit", "id2label", ["cat"]), ("vit", "id2label", {"0": 1}),
    ("vit", "id2label", {"0": "a", "2": "b"}),
    ("vit", "id2label", {"0": "a", "1.0": "b"}),
    ("vit", "id2label", {"0": "a", "01": "b"}),
    ("vit", "id2label", {"0": "a", "-1": "b"}),
    ("vit", "id2label", {"0": "a", "1" * 20: "b"}),
    ("timm_vit", "architecture", "vit_giant"),
    ("timm_vit", "architecture", "pvt_tiny"), ("timm_vit", "architecture", 3),
    ("timm_vit", "pretrained_cfg", [1]), ("timm_vit", "model_args", 3),
    ("timm_vit", "label_names", ["cat"]), ("timm_vit", "label_names", "cat"),
])
def test_a_setting_that_cannot_be_expressed(name, key, value, tmp_path):
  message = refused(hub_cases.changed(tmp_path, name, **{key: value}))
  assert message.startswith("config.json: ")
  assert (f"{key}: " in message or {  # Keys that must fit each other.
      "hidden_size": "intermediate_size: ", "patch_sizes": "strides: ",
      "depths": "num_encoder_blocks: ",
      "num_attention_heads": "hidden_size: 8 channels"}.get(key, "-") in message
      ), message


@pytest.mark.parametrize("key, value, says", [
    ("norm_layer", "layernorm", "norm_layer='layernorm'"),
    ("global_pool", "avg", "global_pool"), ("in_chans", 1, "in_chans"),
    ("img_size", [32, 16], "img_size"), ("dynamic_img_pad", True, "img_pad"),
    ("embed_dim", "8", "embed_dim: '8'"), ("crop_mode", "squash", "crop_mo"),
    ("input_size", [3, 224], "input_size"), ("interpolation", "lanczos", "int"),
    ("input_size", [1, 32, 32], "input_size"), ("crop_pct", 2, "crop_pct"),
    ("mean", 0.5, "mean"), ("num_classes", "5", "num_classes: '5'"),
    ("num_classes", -1, "num_classes: -1"),
    ("num_classes", 3, "not the names of 3 classes")])
def test_arguments_of_timm_that_cannot_be_expressed(key, value, says, tmp_path):
  of_data = ("crop_mode", "input_size", "interpolation", "crop_pct", "mean")

  def change(content):
    if key == "input_size":
      del content["model_args"]["img_size"]
    content["pretrained_cfg" if key in of_data else "model_args"][key] = value

  assert says in refused(hub_cases.changed(tmp_path, "timm_vit", change))


def test_what_changes_nothing_is_ignored(tmp_path):
  folder = hub_cases.changed(
      tmp_path, "vit", torch_dtype="float16", _name_or_path="x",
      pooler_act="relu", hidden_dropout_prob=0.3, patch_size=[8, 8],
      image_size=[32, 32], label2id=None, transformers_version="4.2")
  assert saved.read_weights(folder) == saved.read_weights(
      hub_cases.GOLDEN / "vit")


@pytest.mark.parametrize("keys, settings", [
    ({"use_layer_scale": False}, {"layer_scale_init": 0.0}),
    ({"layer_scale_init_value": 0.0}, {"layer_scale_init": 1e-5}),
    ({"use_layer_scale": False, "layer_scale_init_value": 0.1},
     {"layer_scale_init": 0.0}),
    ({"hidden_act": "swish"}, {"activation": "silu"}),
    ({"hidden_act": "relu2"}, {"activation": "squared_relu"}),
    ({"mlp_ratio": 3}, {"mlp_ratio": 3.0}),
])
def test_settings_of_poolformer(keys, settings, tmp_path):
  made = saved.read_weights(hub_cases.GOLDEN / "poolformer").model
  found = saved.read_weights(hub_cases.changed(tmp_path, "poolformer", **keys))
  row = metaformer_jax.get_spec("poolformer_s12")
  assert row.override(**found.model.overrides()) == row.override(
      **made.overrides() | settings)


def test_a_caller_may_name_one_of_several_models():
  def name(folder, model=None):
    return saved.read_weights(hub_cases.GOLDEN / folder, (), model).model.name

  assert name("vit") == "vit_base_patch16_224"
  assert name("vit", "deit_base_patch16_224") == "deit_base_patch16_224"
  assert name("poolformer", "poolformer_m48") == "poolformer_m48"
  # These compute something else.
  assert name("vit", "deit_base_distilled_patch16_224") == name("vit")
  assert name("poolformer", "metaformer_id_s12") == "poolformer_s12"
  assert name("poolformer", "resnet18") == "poolformer_s12"
  with pytest.raises(errors.ConfigError, match="is of poolformer_s12, not met"):
    inference.experiment(hub_cases.GOLDEN / "poolformer", "metaformer_id_s12")


@pytest.mark.parametrize("hidden, wanted", [
    (hidden, whole) for hidden in (8, 12, 384) for whole in range(1, 99)])
def test_any_width_of_an_mlp_is_a_ratio(hidden, wanted):
  assert int(hidden * kinds.ratio(wanted, hidden)) == wanted


def test_what_a_file_omits_is_the_programs_default(tmp_path):
  def minimal(content):
    return {key: content[key] for key in ("model_type", "architectures")}

  for name, overrides in (
      ("poolformer", {}), ("vit", {"norm_eps": 1e-12}), ("resnet", {}),
      ("pvt", {"embed_norm_eps": 1e-6}),
      ("deit_distilled", {"norm_eps": 1e-12})):
    cfg = saved.read_weights(hub_cases.changed(tmp_path, name, minimal))
    assert cfg.model.overrides() == overrides
    assert cfg.task.num_classes == (1000 if name == "pvt" else 2)


@pytest.mark.parametrize("labels, n, names", [
    ({f"{i}": f"LABEL_{i}" for i in range(5)}, 5, None), (None, 2, None),
    ({f"{i}": f"n{i}" for i in (2, 0, 1)}, 3, ("n0", "n1", "n2")),
    ({}, 0, None), ({f"{i}": "same" for i in range(2)}, 2, ("same", "same")),
    ({f"{i}": f"n{i}" for i in range(21_841)}, 21_841, "n21840")])
def test_labels(labels, n, names, tmp_path):
  cfg = saved.read_weights(hub_cases.changed(tmp_path, "vit", id2label=labels))
  found = cfg.task.class_names
  assert cfg.task.num_classes == n
  assert (found[-1] if isinstance(names, str) else found) == names
  if n:  # As a file records it.
    assert typed.typed(json.loads(typed.to_json(cfg))) == cfg


def test_labels_of_pvt_and_timm(tmp_path, caplog):
  pvt = saved.read_weights(hub_cases.changed(
      tmp_path, "pvt", id2label={"0": "a"}, num_labels=5))
  assert (pvt.task.num_classes, pvt.task.class_names) == (5, None)
  assert "num_labels is 5" in caplog.text
  caplog.clear()
  cfg = saved.read_weights(hub_cases.changed(tmp_path, "timm_vit", label_names={
      f"{i}": name for i, name in enumerate(hub_cases.NAMES)}))
  assert cfg.task.class_names == hub_cases.NAMES and not caplog.text
  cfg = saved.read_weights(hub_cases.changed(
      tmp_path, "timm_distilled", label_names={"0": "a", "7": "b"}))
  assert cfg.task.class_names is None
  assert "label_names" in caplog.text


def test_older_files_of_timm(tmp_path):
  def flat(content):
    return {**content["pretrained_cfg"], "architecture": "resnet18.a1_in1k",
            "labels": list(hub_cases.NAMES)}

  cfg = saved.read_weights(hub_cases.changed(tmp_path, "timm_vit", flat))
  assert cfg.model.name == "resnet18"
  assert cfg.task.class_names == hub_cases.NAMES
  assert cfg.data.mean == (0.5,) * 3


def test_a_run_is_told_from_a_folder(tmp_path):
  assert saved.find_workdir(hub_cases.GOLDEN / "vit") is None
  assert saved.find_workdir(hub_cases.GOLDEN / "timm_vit") is None
  (tmp_path / "config.json").write_text('{"model": {"name": "pvt_tiny"}}')
  assert saved.find_workdir(tmp_path) == tmp_path
  assert saved.read_weights(tmp_path).model.name == "pvt_tiny"


@pytest.mark.parametrize("layout, name, settings", [
    ("huggingface", "poolformer_s12", {"token_mixers": ("identity",) * 4}),
    *(("huggingface", "poolformer_s12", settings) for settings in (
        {"pool_subtract": False}, {"norm_eps": 1e-3}, {"residual": False},
        {"activation": "star_relu"}, {"norm": "layer_norm"},
        {"mlp_bias": False}, {"head_norm_first": False}, {"norm_bias": False},
        {"downsample_norm": True}, {"position_embeddings": (2,)},
        {"res_scale_init": (1.0,) * 4}, {"mlp_ratio": 0.0})),
    ("huggingface", "metaformer_id_s12", {}),
    ("huggingface", "pvt_tiny", {"mlp_ratios": (8.0, 8.0, 4.0, 2.5)}),
    ("huggingface", "caformer_s18", {}),
    ("timm", "poolformer_s12", {"depths": (1, 1, 1, 1)}),
    ("timm", "poolformer_s12", {"pool_size": 5}),
    ("timm", "poolformerv2_s12", {"head_norm_first": True}),
    ("timm", "mixer_b16_224", {"dim": 16}),
    ("timm", "resnet18", {"widths": (8,) * 4}),
    ("timm", "vit_base_patch16_224", {"norm_eps": 1e-12}),
    ("timm", "deit_base_distilled_patch16_224", {"dist_head": False}),
    ("timm", "pvt_tiny", {}),
])
def test_what_a_program_cannot_build_is_named(layout, name, settings):
  made = inference.published(name)
  cfg = dataclasses.replace(made, model=dataclasses.replace(
      made.model, **settings))
  key, = settings or ["(name|token_mixers)"]
  with pytest.raises(errors.ConfigError, match=rf"cannot express .*\({key}: "):
    folders.describe(cfg, layout, 3, {})


@pytest.mark.parametrize("layout, name, settings", [
    ("huggingface", "poolformer_s24", {
        "pool_size": 7, "activation": "silu", "in_patch_size": 5, "in_pad": 1,
        "in_stride": 2, "mlp_ratio": 1.5, "layer_scale_init": 0.0}),
    ("huggingface", "vit_base_patch16_224", {
        "mlp_ratio": 2.3, "n_heads": 4, "norm_eps": 1e-3}),
    ("huggingface", "deit_small_distilled_patch16_224", {"dist_head": False}),
    ("huggingface", "resnet34", {"widths": (8, 16, 16, 24)}),
    ("huggingface", "pvt_small", {
        "sr_ratios": (4, 2, 2, 1), "qkv_bias": False, "patch_size": 8,
        "norm_eps": 1e-5}),
    ("timm", "vit_base_patch16_224", {
        "patch_size": 8, "dim": 48, "depth": 3, "n_heads": 3,
        "mlp_ratio": 2.0}),
    ("timm", "mixer_b16_224", {"mlp_ratio": (1.0, 2.0)}),
    ("timm", "resnet50", {"depths": (1, 2, 3, 1)}),
    ("timm", "poolformer_s12", {"layer_scale_init": 0.1}),  # Only initial.
])
def test_settings_are_in_the_config(layout, name, settings, tmp_path):
  made = inference.published(name)
  cfg = dataclasses.replace(made, model=dataclasses.replace(
      made.model, **settings))
  for file, text in folders.describe(cfg, layout, 3, {}).items():
    (tmp_path / file).write_text(text)
  found = saved.read_weights(tmp_path, model=name).model
  one, other = (metaformer_jax.get_spec(name).override(**model.overrides())
                for model in (found, cfg.model))
  allowed = {"huggingface": {"mlp_ratio", "embed_norm_eps"},
             "timm": {"layer_scale_init", "head_norm_first"}}
  differ = {key for key in vars(one)
            if getattr(one, key) != getattr(other, key)}
  assert differ <= allowed[layout]
  if "mlp_ratio" in differ:  # Of the same width.
    assert int(one.mlp_ratio * one.dim) == int(other.mlp_ratio * other.dim)


@pytest.mark.parametrize("layout, name, settings, differs", [
    ("timm", "poolformer_s12", {}, True),
    ("timm", "poolformer_s12", {"head_norm_first": False}, False),
    ("huggingface", "poolformer_s12", {}, False),
    ("timm", "poolformerv2_s12", {}, False),
    ("huggingface", "pvt_tiny", {}, True),
    ("huggingface", "pvt_tiny", {"embed_norm_eps": 1e-6}, False),
])
def test_where_a_program_computes_otherwise(layout, name, settings, differs):
  made = inference.published(name)
  cfg = dataclasses.replace(made, model=dataclasses.replace(
      made.model, **settings))
  text = folders.describe(cfg, layout, 3, {})["README.md"]
  assert ("outputs will differ" in text) == differs


@pytest.mark.parametrize("layout, name", [
    (layout, name) for name in metaformer_jax.list_models()
    for layout in folders.LAYOUTS])
def test_a_config_says_what_was_written(layout, name, tmp_path):
  """For every model; where a program has no such model, it is refused."""
  cfg = inference.published(name)
  family = metaformer_jax.get_spec(name).family
  if not re.match({
      "huggingface": "poolformer_|vit|deit|resnet|pvt",
      "timm": "pool|conv|caf|vit|deit|resnet|mixer|resmlp_(?!big_24_patch)",
  }[layout], name):
    with pytest.raises(errors.ConfigError, match="cannot express this model"):
      folders.describe(cfg, layout, 3, {})
    return
  for file, text in folders.describe(cfg, layout, 3, {"top1": 0.8}).items():
    (tmp_path / file).write_text(text)
  read = saved.read_weights(tmp_path, model=name)
  assert (read.task, read.data) == (cfg.task, cfg.data)
  one, other = (metaformer_jax.get_spec(c.model.name).override(
      **c.model.overrides()) for c in (read, cfg))
  different = [key for key in vars(one)
               if getattr(one, key) != getattr(other, key)]
  assert different == {
      "poolformer-timm": ["head_norm_first"],
      "pvt-huggingface": ["embed_norm_eps"]}.get(f"{family}-{layout}", [])
  card = (tmp_path / "README.md").read_text()
  assert "top1 | 0.8000" in card and "license" not in card
  assert card.startswith("---\nlibrary_name: ")


def test_the_classes_of_imagenet_are_known_by_their_ids():
  """Ids number the classes of data; Hugging Face's files have words."""
  words = imagenet.synonyms()
  assert words[0] == "tench, Tinca tinca" and len(words) == 1000
  assert imagenet.recognized(words) == imagenet.ids()
  # transformers' own files spell some of them differently.
  assert imagenet.recognized(("Tench", *words[1:])) == imagenet.ids()
  assert imagenet.recognized(words[:10]) == words[:10]
  assert imagenet.recognized(words[::-1]) == words[::-1]
