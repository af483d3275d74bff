r"""Measures the training transform of segmentation beside mmsegmentation's.

    python tests/benchmark_segmentation.py --mmseg-python=/path/to/python

Both read the same JPEGs and label maps, resize, crop, flip, distort and pad
them, up to uint8 arrays: mmsegmentation 0.19 with its pipeline of
ade20k.py without the normalisation, which is done on the device here. The
other interpreter has mmsegmentation, mmcv and opencv.

Pictures are crops of scikit-learn's two photographs, enlarged to sizes as in
ADE20K; label maps are made of their blurred colours. The result is images per
second of processor time of one thread. Rounds alternate, each in a new
process; a ratio is that of neighbouring rounds, and medians are printed.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image, ImageFilter

ROOT = pathlib.Path(__file__).parents[1]
# (width, height): most images of ADE20K have a shorter side of 512.
SIZES = ((683, 512), (683, 512), (512, 683), (768, 512), (1024, 768),
         (683, 512), (1600, 1200), (512, 512))
CLASSES = 150


def write(folder: pathlib.Path, n: int) -> None:
  """Writes n images and label maps as a tree of ADE20K's form."""
  from sklearn import datasets  # noqa: PLC0415  Not in the other interpreter.

  rng = np.random.default_rng(0)
  photos = [Image.fromarray(v) for v in datasets.load_sample_images().images]
  for kind in ("images", "annotations"):
    (folder / kind / "training").mkdir(parents=True)
  for i in range(n):
    photo, size = photos[i % 2], SIZES[i % len(SIZES)]
    share = rng.uniform(0.6, 1)
    share *= min(photo.width / size[0], photo.height / size[1])
    width, height = (int(share * side) for side in size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in
                 zip(photo.size, (width, height)))
    picture = photo.resize(size, Image.Resampling.BICUBIC,
                           (left, top, left + width, top + height))
    picture.save(folder / "images" / "training" / f"{i:03}.jpg", quality=90)
    smooth = np.asarray(picture.convert("L").filter(
        ImageFilter.GaussianBlur(9))).astype(int)
    labels = (1 + smooth // 12 * 7 + i) % (CLASSES + 1)
    Image.fromarray(labels.astype(np.uint8)).save(
        folder / "annotations" / "training" / f"{i:03}.png")


def measure(read, n: int) -> float:
  """Images per second of processor time: the best of three passes of n."""
  for i in range(min(n, 8)):
    read(i)
  best = 0.0
  for _ in range(3):
    start = time.process_time()
    for i in range(n):
      read(i)
    best = max(best, n / (time.process_time() - start))
  return best


def ours(folder: str) -> float:
  sys.path.insert(0, str(ROOT))
  from metaformer_jax.config import schema  # noqa: PLC0415
  from metaformer_jax.config.tasks import segmentation as section  # noqa: PLC0415
  from metaformer_jax.data import sources  # noqa: PLC0415
  from metaformer_jax.data.transforms import segmentation  # noqa: PLC0415

  data = schema.Data(source="ade20k", path=folder)
  source = sources.create(data, "train")
  transform = segmentation.TrainTransform(data, section.Segmentation(
      num_classes=CLASSES, reduce_zero_label=True))
  rng = np.random.default_rng(0)
  return measure(lambda i: transform(source[i], rng), len(source))


def theirs(folder: str) -> float:
  import cv2  # noqa: PLC0415
  import mmcv  # noqa: PLC0415

  mmcv.__version__ = "1.4.0"  # The newest that mmsegmentation 0.19 accepts.
  from mmseg.datasets import pipelines  # noqa: PLC0415

  cv2.setNumThreads(1)
  np.random.seed(0)
  names = sorted(p.stem for p in pathlib.Path(folder, "images",
                                              "training").iterdir())
  steps = [
      pipelines.LoadImageFromFile(),
      pipelines.LoadAnnotations(reduce_zero_label=True),
      pipelines.Resize(img_scale=(2048, 512), ratio_range=(0.5, 2.0)),
      pipelines.RandomCrop((512, 512), cat_max_ratio=0.75),
      pipelines.RandomFlip(prob=0.5), pipelines.PhotoMetricDistortion(),
      pipelines.Pad(size=(512, 512), pad_val=0, seg_pad_val=255)]

  def read(i):
    results = {"img_prefix": f"{folder}/images/training",
               "seg_prefix": f"{folder}/annotations/training",
               "img_info": {"filename": f"{names[i]}.jpg"},
               "ann_info": {"seg_map": f"{names[i]}.png"}, "seg_fields": []}
    for step in steps:
      results = step(results)

  return measure(read, len(names))


def run(python: str, which: str, folder: str) -> float:
  done = subprocess.run([python, __file__, "--measure", which, folder],
                        capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--mmseg-python", help="an interpreter with mmseg")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--n", type=int, default=48, help="images")
  parser.add_argument("--measure", nargs=2, metavar=("WHICH", "FOLDER"),
                      help="measure once, in this process, and print JSON")
  args = parser.parse_args()
  if args.measure:
    which, folder = args.measure
    print(json.dumps({"ours": ours, "theirs": theirs}[which](folder)))
    return
  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder), args.n)
    rows = []
    for i in range(args.rounds):
      row = [0.0, 0.0]
      for which in (0, 1) if i % 2 else (1, 0):
        row[which] = run((sys.executable, args.mmseg_python)[which],
                         ("ours", "theirs")[which], folder)
      rows.append(row)
      print(f"round {i + 1}: {row[0]:.1f} and {row[1]:.1f} images/s per core",
            flush=True)
  ratios = [one / other for one, other in rows]
  one, other = (statistics.median(column) for column in zip(*rows))
  print(f"{one:.1f} images/s per core; mmsegmentation {other:.1f}; ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f})")


if __name__ == "__main__":
  main()
