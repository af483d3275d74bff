"""What it costs a start to know whether its data set is the same:

    python tests/benchmark_start.py [--files=100000]

Lists a folder of ImageNet's form (1,000 classes, small files) and takes its
fingerprint, with half of the files and with all; what 1,281,167 files would
take follows from a line through both. The system has the folder in memory, as
after a recent start; a disk that has not takes longer. Prints JSON.
"""

import argparse
import json
import pathlib
import tempfile
import time

from metaformer_jax.config import schema
from metaformer_jax.data import sources
from metaformer_jax.data.sources import fingerprints

N_CLASSES, IMAGENET = 1000, 1_281_167
# As long as ImageNet's, for example n01440764/n01440764_10026.JPEG.
NAME = "n{0:08}_{1:05}.JPEG"


def measured(root: pathlib.Path, first: int, n: int) -> dict[str, float]:
  """Adds files `first` to `n`; the least seconds of five starts."""
  for i in range(first, n):
    folder = root / "train" / f"n{i % N_CLASSES:08}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME.format(i % N_CLASSES, i)).write_bytes(b"\0" * (i % 97))
  taken = {"listing": [], "fingerprint": []}
  for _ in range(5):
    start = time.perf_counter()
    source = sources.create(
        schema.Data(source="folder", path=str(root)), "train")
    listed = time.perf_counter()
    found = fingerprints.of(source)
    taken["fingerprint"].append(time.perf_counter() - listed)
    taken["listing"].append(listed - start)
    assert found["number of examples"] == n, found
  return {name: min(seconds) for name, seconds in taken.items()}


def main(args: argparse.Namespace) -> None:
  with tempfile.TemporaryDirectory() as folder:
    half = measured(pathlib.Path(folder), 0, args.files // 2)
    whole = measured(pathlib.Path(folder), args.files // 2, args.files)
  scale = (IMAGENET - args.files) / (args.files - args.files // 2)
  print(json.dumps({
      f"{args.files // 2} files": half, f"{args.files} files": whole,
      f"{IMAGENET} files, extrapolated": {
          name: whole[name] + scale * (whole[name] - half[name])
          for name in whole}}, indent=2))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--files", type=int, default=100_000)
  main(parser.parse_args())
