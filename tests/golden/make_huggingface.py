"""Writes folders as transformers and timm save them, and reads ours there.

  python tests/golden/make_huggingface.py --out=tests/golden/huggingface
  python tests/golden/make_huggingface.py --check=DIR

The first writes a small model of each kind, and their outputs to outputs.npz.
The second reads what tests/golden/export_folders.py wrote: every tensor must
have its place, and outputs and pixels must agree. Wants torch, torchvision,
timm 1.0 and transformers 5.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import safetensors.torch
import timm
import torch
import transformers as hf

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import parity_cases

SIDE = 32
NAMES = ["cat", "dog", "bird", "fish", "frog"]
LABELS = {"id2label": dict(enumerate(NAMES)),
          "label2id": {name: i for i, name in enumerate(NAMES)}}
VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 12, "image_size": SIDE, "patch_size": 8, **LABELS}
RESNET = {"embedding_size": 4, "depths": [1, 2], **LABELS}
TIMM = {"embed_dim": 8, "depth": 2, "num_heads": 2, "img_size": SIDE,
        "patch_size": 8}

POOLFORMER = hf.PoolFormerConfig(
    depths=[1, 2, 1, 1], hidden_sizes=[4, 4, 8, 8], pool_size=5, mlp_ratio=2.0,
    hidden_act="relu", patch_sizes=[5, 3, 3, 3], **LABELS)
PVT = hf.PvtConfig(
    depths=[1, 1, 2, 1], hidden_sizes=[4, 4, 8, 8], image_size=SIDE,
    num_attention_heads=[1, 2, 1, 2], mlp_ratios=[2, 2, 1, 3], num_labels=5,
    sequence_reduction_ratios=[4, 2, 2, 1], layer_norm_eps=1e-3,
    qkv_bias=False)

# Name of the folder, how its weights are stored, and the model.
CASES = (
    ("poolformer", "one", hf.PoolFormerForImageClassification, POOLFORMER),
    ("poolformer_base", "bin", hf.PoolFormerModel, POOLFORMER),
    ("vit", "shards", hf.ViTForImageClassification, hf.ViTConfig(**VIT)),
    ("vit_base", "one", hf.ViTModel, hf.ViTConfig(**VIT)),
    ("deit", "bin", hf.DeiTForImageClassification, hf.DeiTConfig(**VIT)),
    ("deit_distilled", "one", hf.DeiTForImageClassificationWithTeacher,
     hf.DeiTConfig(**VIT)),
    ("resnet", "bin shards", hf.ResNetForImageClassification,
     hf.ResNetConfig(**RESNET, layer_type="basic", hidden_sizes=[4, 8])),
    ("resnet_base", "shards", hf.ResNetModel,
     hf.ResNetConfig(**RESNET, layer_type="bottleneck", hidden_sizes=[16, 16])),
    ("pvt", "one", hf.PvtForImageClassification, PVT),
    ("timm_vit", "one", "vit_base_patch16_224", {**TIMM, "num_classes": 5}),
    ("timm_distilled", "bin", "deit_small_distilled_patch16_224",
     {**TIMM, "num_classes": 5}),
    ("timm_vit_base", "one", "vit_base_patch16_224",
     {**TIMM, "num_classes": 0}),
)


def perturb(model):
  """Gives each tensor values away from its initial ones."""
  state = model.state_dict()
  drawn = parity_cases.weights({k: tuple(v.shape) for k, v in state.items()})
  model.load_state_dict({k: torch.from_numpy(v) for k, v in drawn.items()})
  return model.eval()


def store(folder, how):
  """Rewrites a folder's model.safetensors, as older versions stored it."""
  path = folder / "model.safetensors"
  tensors = safetensors.torch.load_file(path)
  path.unlink()
  if how == "bin":
    torch.save(tensors, folder / "pytorch_model.bin")
    return
  names = sorted(tensors)
  places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin"
            for i, name in enumerate(names)}
  for file in sorted(set(places.values())):
    torch.save({k: tensors[k] for k in names if places[k] == file},
               folder / file)
  size = sum(t.nbytes for t in tensors.values())
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
      {"metadata": {"total_size": size}, "weight_map": places}, indent=2))


def outputs(model, images):
  """Logits; without a head, what it would be given, or the last pixels."""
  x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
  with torch.no_grad():
    y = model(x)
  if isinstance(model, hf.PoolFormerModel):
    return y.last_hidden_state.permute(0, 2, 3, 1).numpy()
  if isinstance(model, hf.ViTModel):
    return y.last_hidden_state[:, 0].numpy()
  if isinstance(model, hf.ResNetModel):
    return y.pooler_output.flatten(1).numpy()
  return getattr(y, "logits", y).numpy()


def make(out):
  images, found = parity_cases.images(2, SIDE, SIDE), {}
  for name, how, kind, settings in CASES:
    folder = out / name
    if isinstance(kind, str):
      model = perturb(timm.create_model(kind, **settings))
      timm.models.save_for_hf(
          model, folder, safe_serialization=True, model_config={
              "label_names": NAMES} if settings["num_classes"] else None)
    else:
      model = perturb(kind(settings))
      model.save_pretrained(folder, max_shard_size=(
          "8KB" if how == "shards" else "50GB"))
    if how.startswith("bin"):
      store(folder, how)
    found[name] = outputs(model, images)
  hf.PoolFormerImageProcessor(
      size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
      crop_pct=0.8, resample=2, image_mean=[0.4, 0.5, 0.6],
  ).save_pretrained(out / "poolformer")
  hf.DeiTImageProcessor(
      size={"height": 41, "width": 41},
      crop_size={"height": SIDE, "width": SIDE}).save_pretrained(out / "deit")
  np.savez(out / "outputs.npz", **found)


def load(folder):
  """A model of a folder, every tensor in its place, and its preprocessing."""
  config = json.loads((folder / "config.json").read_text())
  if "architecture" in config:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    named = safetensors.torch.load_file(folder / "model.safetensors")
    model.load_state_dict(named, strict=True)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(model=model))
    return model.eval(), lambda image: transform(image)[None], config.get(
        "label_names")
  model, info = hf.AutoModelForImageClassification.from_pretrained(
      folder, output_loading_info=True)
  wrong = {key: value for key, value in info.items() if value}
  assert not wrong, f"{folder}: {wrong}"
  processor = hf.AutoImageProcessor.from_pretrained(folder)
  names = [model.config.id2label[i] for i in range(model.config.num_labels)]
  return model.eval(), lambda image: processor(
      image, return_tensors="pt")["pixel_values"], names


def check(folder):
  """Largest differences of logits and of normalised pixels."""
  from PIL import Image  # noqa: PLC0415  Not needed to write.

  model, transform, names = load(folder)
  want = np.load(folder.with_suffix(".npz"))
  logits = outputs(model, want["images"])
  pixels = transform(Image.fromarray(want["picture"])).permute(0, 2, 3, 1)
  assert names == list(want["names"]), names
  return (np.abs(logits - want["logits"]).max(), np.abs(want["logits"]).max(),
          np.abs(pixels.numpy() - want["pixels"]).max())


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, help="write the folders")
  parser.add_argument("--check", type=pathlib.Path, help="read these folders")
  args = parser.parse_args()
  torch.set_num_threads(1)
  if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    make(args.out)
  wrong = []
  for folder in sorted(args.check.iterdir()) if args.check else ():
    if not folder.is_dir():
      continue
    logits, largest, pixels = check(folder)
    # timm takes PoolFormer's mean before the norm. transformers rounds pixels
    # to whole grey levels.
    if pixels > 0.02 or (logits > 2e-5 * largest
                         and folder.name != "poolformer_s12-timm"):
      wrong.append(folder.name)
    print(f"{folder.name}: logits differ by {logits:.2g} of {largest:.2g}, "
          f"pixels by {pixels:.2g}", flush=True)
  sys.exit(f"WRONG: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
  main()
