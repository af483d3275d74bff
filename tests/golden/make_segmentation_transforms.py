"""Writes segmentation_transforms.npz: mmsegmentation's pixels at fixed draws.

Needs mmsegmentation 0.19.0, mmcv 1.7.2 built without its operations
(MMCV_WITH_OPS=0), opencv-python-headless 4 or 5, and the official PoolFormer
repository for AlignResize:

    python tests/golden/make_segmentation_transforms.py \
        --poolformer=oracles/sail-sg/poolformer

The pictures and label maps are made from seeds (`segmentation_cases`), so that
the file holds results only.
"""

import argparse
import contextlib
import importlib.util
import pathlib
import sys
import types
from unittest import mock

import mmcv
import numpy as np

GOLDEN = pathlib.Path(__file__).parent
sys.path.insert(0, str(GOLDEN.parent))

import segmentation_cases as cases  # noqa: E402

mmcv.__version__ = "1.4.0"  # The newest that mmsegmentation 0.19 accepts.


def load_pipelines(poolformer):
  """Registers mmsegmentation's pipelines and AlignResize; imports no models."""
  from mmseg.datasets import pipelines  # noqa: PLC0415

  sys.modules["IPython"] = types.SimpleNamespace(embed=None)
  spec = importlib.util.spec_from_file_location(
      "align_resize", poolformer / "segmentation" / "align_resize.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return pipelines, module.AlignResize


@contextlib.contextmanager
def scripted(draws):
  """numpy.random returns the draws, in mmsegmentation's order."""
  uniform, integers = [], []
  for top, left in draws.corners:
    integers += [top, left]
  change = draws.change
  for name in cases.ORDER[change.contrast_last]:
    if name == "mode":
      integers.append(0 if change.contrast_last else 1)
      continue
    value = getattr(change, name)
    integers.append(int(value is not None))
    if value is not None:
      (integers if name == "hue" else uniform).append(value)
  with contextlib.ExitStack() as stack:
    for name, value in {
        "random_sample": lambda: draws.scale,
        "rand": lambda: 0.0 if draws.flip else 1.0,
        "randint": lambda *_: integers.pop(0),
        "uniform": lambda *_: uniform.pop(0)}.items():
      stack.enter_context(mock.patch.object(np.random, name, value))
    yield
  assert not integers and not uniform


def results(image, labels):
  return {"img": np.ascontiguousarray(image[..., ::-1]),
          "gt_semantic_seg": labels.copy(), "seg_fields": ["gt_semantic_seg"],
          "img_shape": image.shape}


def train(pipelines, case):
  """The image, RGB, and the label map after the training pipeline."""
  image, labels = cases.picture(case)
  loaded = results(image, cases.reduced(labels))
  side = cases.CROP
  with scripted(case.draws):
    for step in (
        pipelines.Resize(img_scale=cases.SCALE, ratio_range=(0.5, 2.0)),
        pipelines.RandomCrop(side, cat_max_ratio=case.cat_max_ratio),
        pipelines.RandomFlip(prob=0.5), pipelines.PhotoMetricDistortion(),
        pipelines.Pad(size=side, pad_val=0, seg_pad_val=255)):
      loaded = step(loaded)
  return loaded["img"][..., ::-1], loaded["gt_semantic_seg"]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--poolformer", type=pathlib.Path, required=True)
  args = parser.parse_args()
  pipelines, align_resize = load_pipelines(args.poolformer)
  arrays = {}
  for name, case in cases.TRAIN.items():
    arrays[f"train/{name}/image"], arrays[f"train/{name}/label"] = train(
        pipelines, case)
  for height, width in cases.EVAL_SIZES:
    image, labels = cases.picture(cases.Case(height, width))
    for i, factor in enumerate(cases.EVAL_SCALES):
      loaded = results(image, labels)
      loaded["scale"] = tuple(int(side * factor) for side in cases.SCALE)
      loaded = align_resize(img_scale=cases.SCALE)(loaded)
      arrays[f"eval/{height}x{width}/{i}"] = loaded["img"][..., ::-1]
  np.savez_compressed(GOLDEN / "segmentation_transforms.npz", **arrays)


if __name__ == "__main__":
  main()
