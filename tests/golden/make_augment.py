"""Runs the augmentation cases in timm and writes the results.

  python tests/golden/make_augment.py --out=tests/golden/augment-timm.npz

Needs timm 1.0, torch and torchvision.
"""

import argparse
import io
import pathlib
import random
import sys

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform, mixup, random_erasing
from timm.data import transforms as timm_transforms

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import augment_cases

N = 10_000


def keep_posterize():
  """Gives black for 0 bits, as older versions of Pillow; Pillow 13 refuses."""
  original = auto_augment.posterize

  def posterize(img, bits, **kwargs):
    if bits < 1:
      return Image.new(img.mode, img.size)
    return original(img, bits, **kwargs)

  auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize


def pixels():
  """Each operation at fixed arguments."""
  fill = tuple(round(255 * v) for v in augment_cases.MEAN)
  for key, _, name, value, kind in augment_cases.pixel_cases():
    value = () if name in ("AutoContrast", "Equalize", "Invert") else (value,)
    yield f"op {key}", np.asarray(auto_augment.NAME_TO_OP[name](
        augment_cases.picture(), *value, fillcolor=fill,
        resample=Image.Resampling[kind.upper()]))


def evaluation():
  """The evaluation transform, before the conversion to float."""
  for name, data in augment_cases.encoded_images().items():
    yield f"file {name}", np.frombuffer(data, np.uint8)
    picture = Image.open(io.BytesIO(data))
    if name == "16 bits":  # Pillow's convert() would clip at 255.
      picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    for kind in augment_cases.FILTERS:
      transform = create_transform(
          32, is_training=False, interpolation=kind, crop_pct=0.9,
          normalize=False)
      yield f"eval {name} {kind}", transform(
          picture.convert("RGB")).numpy().transpose(1, 2, 0)


def draws():
  """Samples of timm's random choices."""
  random.seed(0)
  np.random.seed(0)
  names, arguments, layers = [], [], []
  policy = auto_augment.rand_augment_transform(
      "rand-m9-mstd0.5-inc1", {"translate_const": 100})
  for index, op in enumerate(policy.ops):
    def record(img, *args, index=index, **kwargs):
      names.append(index)
      arguments.append(args[0] if args else 0)
      return img
    op.aug_fn = record
  for _ in range(N):
    before = len(names)
    policy(None)
    layers.append(len(names) - before)
  yield "draw op", np.array(names, np.int8)
  yield "draw argument", np.array(arguments, np.float32)
  yield "draw n_ops", np.array(layers, np.int8)

  picture = Image.new("RGB", (500, 375))
  yield "draw crop", np.array([  # top, left, height, width
      timm_transforms.RandomResizedCropAndInterpolation.get_params(
          picture, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(N)], np.int16)

  mixer = mixup.Mixup(0.8, 1.0, num_classes=10)
  drawn = [mixer._params_per_batch() for _ in range(N)]
  yield "draw lambda", np.array([lam for lam, _ in drawn], np.float32)
  yield "draw cutmix", np.array([cut for _, cut in drawn])
  yield "draw cutmix area", np.array([
      mixup.cutmix_bbox_and_lam((3, 96, 128), np.random.beta(1.0, 1.0))[1]
      for _ in range(N)], np.float32)

  erase = random_erasing.RandomErasing(0.25, mode="pixel", device="cpu")
  images = torch.zeros(N, 1, 64, 48)
  erase(images)
  boxes = np.zeros((N, 4), np.int16)  # top, bottom, left, right
  for box, image in zip(boxes, images[:, 0].numpy() != 0):
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    if len(rows):
      box[:] = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
  yield "draw erasing", boxes


def mixing():
  """Boxes, lambdas and targets for given draws."""
  rng = np.random.default_rng(2)
  rows = []
  for _ in range(200):
    height, width = (int(v) for v in rng.integers(8, 300, 2))
    lam, y, x = rng.random(), rng.integers(height), rng.integers(width)
    # timm draws the centre with randint, y before x.
    given = iter((y, x))
    np.random.randint = lambda *_, given=given, **__: next(given)
    box, corrected = mixup.cutmix_bbox_and_lam((3, height, width), lam)
    rows.append((height, width, lam, y, x, *box, corrected))
  yield "cutmix boxes", np.array(rows)
  labels = torch.tensor([3, 0, 6, 6, 1, 2])
  images = torch.linspace(-2, 2, 6 * 3 * 5 * 4).reshape(6, 3, 5, 4).sin()
  yield "mix labels", labels.numpy()
  yield "mix images", images.numpy()
  for lam in (0.0, 0.3, 0.77, 1.0):
    yield f"mix targets {lam}", mixup.mixup_target(labels, 7, lam, 0.1).numpy()
    mixer = mixup.Mixup(0.8, 0.0, num_classes=7)
    mixer._params_per_batch = lambda lam=lam: (lam, False)
    yield f"mix mixup {lam}", mixer(images.clone(), labels)[0].numpy()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", required=True)
  out = parser.parse_args().out
  keep_posterize()
  np.savez_compressed(out, **{
      key: value for part in (pixels, evaluation, draws, mixing)
      for key, value in part()})


if __name__ == "__main__":
  main()
