"""Generates a tiny ImageNet in the forms that users have.

JPEGs of random smooth colours and various sizes, with the official names and
archives:

    python tests/tiny_imagenet.py folder DIR     # DIR/{train,val}/nXXXXXXXX/
    python tests/tiny_imagenet.py tars DIR       # ILSVRC2012_img_*.tar
    python tests/tiny_imagenet.py tfds TARS DIR  # TFDS imagenet2012, prepared
"""

import io
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image

# The first classes of ImageNet, in label order.
SYNSETS = ("n01440764", "n01443537", "n01484850", "n01491361")
N_TRAIN, N_VAL = 3, 6  # Training images of each class; validation images.

# In which TFDS writes it.
FORMATS = ("tfrecord", "array_record")


def jpeg(rng: np.random.Generator) -> bytes:
  """A JPEG of smooth random colours, of a random size around 160 x 120."""
  small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
  size = tuple(int(s) for s in rng.integers((120, 90), (200, 150)))
  out = io.BytesIO()
  small.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG")
  return out.getvalue()


def train_images():
  """Yields (synset, file name, JPEG)."""
  rng = np.random.default_rng(0)
  for synset in SYNSETS:
    for i in range(N_TRAIN):
      yield synset, f"{synset}_{i}.JPEG", jpeg(rng)


def val_images():
  """Yields (file name, JPEG), named as in the official archive."""
  rng = np.random.default_rng(1)
  for i in range(1, N_VAL + 1):
    yield f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(rng)


def write_folder(root: pathlib.Path) -> None:
  """root/train and root/val, with a folder for each class."""
  for synset, name, data in train_images():
    _write(root / "train" / synset / name, data)
  for i, (name, data) in enumerate(val_images()):
    _write(root / "val" / SYNSETS[i % len(SYNSETS)] / name, data)


def write_tars(root: pathlib.Path) -> None:
  """The official archives: a tar of a tar per class, and a flat tar."""
  root.mkdir(parents=True, exist_ok=True)
  classes = {}
  for synset, name, data in train_images():
    classes.setdefault(synset, []).append((name, data))
  inner = [(f"{s}.tar", _tar(files)) for s, files in classes.items()]
  (root / "ILSVRC2012_img_train.tar").write_bytes(_tar(inner))
  (root / "ILSVRC2012_img_val.tar").write_bytes(_tar(val_images()))


def prepare_tfds(tars: pathlib.Path, data_dir: pathlib.Path,
                 file_format: str = "tfrecord") -> None:
  """TFDS' own preparation of imagenet2012; needs TensorFlow."""
  import tensorflow_datasets as tfds  # noqa: PLC0415

  builder = tfds.builder("imagenet2012", data_dir=str(data_dir),
                         file_format=file_format)
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=str(tars)))


def python(*args):
  """Runs a fresh interpreter that finds `tests/`; returns what it prints."""
  done = subprocess.run(
      [sys.executable, *args], capture_output=True, text=True, check=False,
      cwd=pathlib.Path(__file__).parent, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def _write(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)


def _tar(files):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w") as tar:
    for name, data in files:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return out.getvalue()


if __name__ == "__main__":
  kind, *dirs = sys.argv[1:]
  {"folder": write_folder, "tars": write_tars, "tfds": prepare_tfds}[kind](
      *map(pathlib.Path, dirs[:2]), *dirs[2:])
