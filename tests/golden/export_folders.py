"""Writes folders for make_huggingface.py to read: weights, and what they give.

  python tests/golden/export_folders.py DIR [PATTERN]

A folder DIR/MODEL-LAYOUT for every model and layout that has one, and beside it
an .npz with images, logits, a picture and its pixels.
"""

import argparse
import fnmatch
import pathlib
import sys
import tempfile

import jax
import numpy as np

import metaformer_jax
from metaformer_jax import tasks
from metaformer_jax.config import resolve, saved, typed
from metaformer_jax.convert import files, layouts, rules
from metaformer_jax.tools import convert

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import parity_cases

_SHORT = {"depths": (1, 1, 2, 1)}
_VIT = {"depth": 2}

# Settings that the folder must tell, where its program can vary them.
MODELS = {
    "poolformer_s12": {"huggingface": {
        **_SHORT, "pool_size": 5, "activation": "relu", "in_pad": 3},
        "timm": {}},
    "poolformerv2_s12": {"timm": {}},
    "convformer_s18": {"timm": {}},
    "caformer_s18": {"timm": {}},
    "vit_base_patch16_224": {"huggingface": {**_VIT, "norm_eps": 1e-3},
                             "timm": {**_VIT, "n_heads": 6}},
    "deit_small_patch16_224": {"huggingface": _VIT, "timm": _VIT},
    "deit_small_distilled_patch16_224": {"huggingface": _VIT, "timm": _VIT},
    "deit_base_distilled_patch16_224": {
        "huggingface": {**_VIT, "dist_head": False}},
    "mixer_b16_224": {"timm": {}},
    "resmlp_12_224": {"timm": {}},
    "resnet18": {"huggingface": _SHORT, "timm": _SHORT},
    "resnet50": {"huggingface": _SHORT, "timm": {}},
    "pvt_tiny": {"huggingface": {**_SHORT, "sr_ratios": (4, 4, 2, 1)}},
}


def export(folder, name, layout, settings):
  """One model, with random weights."""
  classes = [f"class {i}" for i in range(10)]
  cfg = resolve.resolve({
      "model": {"name": name, **settings},
      "data": {"source": "digits", "mean": (0.4, 0.5, 0.6)},
      "task": {"num_classes": 10, "class_names": classes, "crop_pct": 0.93}})
  cfg, task = tasks.create(cfg, files=False)
  family = metaformer_jax.get_spec(name).family
  shapes = jax.eval_shape(task.model.init, jax.random.key(0),
                          *task.init_inputs())
  known = "official" if "official" in rules.RULES[family] else "timm"
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  variables = layouts.to_flax(family, parity_cases.weights({
      key: tensor.shape for key, tensor in layouts.to_torch(
          family, zeros, known).items()}), shapes)
  images = parity_cases.images(2, *cfg.task.input_size)
  picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  picture = picture.repeat(16, 0).repeat(16, 1)
  pixels = (task.preprocess(picture)["image"] / 255 - cfg.data.mean
            ) / cfg.data.std
  np.savez(folder.with_suffix(".npz"), images=images, names=classes,
           picture=picture, pixels=pixels[None], logits=jax.jit(
               task.model.apply)(variables, images))
  with tempfile.TemporaryDirectory() as scratch:
    path = pathlib.Path(scratch, "weights.safetensors")
    files.write_safetensors(path, layouts.to_torch(family, variables, "flax"),
                            {saved.METADATA: typed.to_json(cfg)})
    convert.main(convert.parse([
        f"--input={path}", f"--output={folder}", f"--layout={layout}"]))


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("pattern", nargs="?", default="*")
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  for name, found in MODELS.items():
    for layout, settings in found.items():
      stem = f"{name}-{layout}"
      if fnmatch.fnmatch(stem, args.pattern):
        print(stem, flush=True)
        export(args.folder / stem, name, layout, settings)


if __name__ == "__main__":
  main()
