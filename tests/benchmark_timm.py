"""Measures timm's loader like `metaformer_jax.tools.benchmark_input` ours.

That tool runs it in an interpreter that has timm, torch and torchvision.
"""

import argparse
import json
import os
import pathlib
import time

import timm.data.auto_augment
import torch
from PIL import Image
from timm import data


def keep_posterize():
  """Gives black for 0 bits, which newer versions of Pillow refuse."""
  original = timm.data.auto_augment.posterize

  def posterize(img, bits, **kwargs):
    return (original(img, bits, **kwargs) if bits else
            Image.new(img.mode, img.size))

  timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize


def processor_time():
  total = time.process_time()
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[1]) == os.getpid():
      total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
  return total


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--path", required=True)
  parser.add_argument("--workers", type=int, default=0)
  args = parser.parse_args()
  torch.set_num_threads(1)
  keep_posterize()
  made = data.create_loader(
      data.create_dataset("", root=args.path), (3, 224, 224), 50,
      is_training=True, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5,
      color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1",
      interpolation="random", num_workers=args.workers,
      persistent_workers=args.workers > 0, device=torch.device("cpu"))
  batches = made.loader  # Batches of uint8, before the copy to the device.
  best = {"core": 0.0, "wall": 0.0}
  for _ in range(4):
    start = time.perf_counter(), processor_time()
    n = sum(len(images) for images, _ in batches)
    found = {"wall": n / (time.perf_counter() - start[0]),
             "core": n / (processor_time() - start[1])}
    best = {key: max(best[key], found[key]) for key in best}
  print(json.dumps(best))


if __name__ == "__main__":
  main()
