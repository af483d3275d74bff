r"""Measures the input pipeline: images per second of one core.

    python -m metaformer_jax.tools.benchmark_input --path=/tmp/jpegs \
        --timm-python=/path/to/python

The training transform with RandAugment reads the JPEGs of the folder; if there
is none, 300 crops of scikit-learn's two photographs are written there. Given
another interpreter that has timm, torch and torchvision, timm's loader reads
the same files, in alternating rounds (tests/benchmark_timm.py). Both make uint8
batches; mixing and erasing come later in both, and are left out.

"core" is images per second of processor time, summed over all processes; other
programs on the machine change it little. A ratio compares neighbouring rounds;
the median ratio is printed.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from metaformer_jax import command, errors
from metaformer_jax.config import derived, schema, tasks
from metaformer_jax.data import loader, sources
from metaformer_jax.data.transforms import classification as transforms

AUGMENT = "rand-m9-mstd0.5-inc1"
_TIMM = pathlib.Path(__file__).parents[2] / "tests" / "benchmark_timm.py"


def write_jpegs(folder: pathlib.Path, n: int = 300) -> None:
  """Writes crops of two photographs, one per class: 500 x 375, quality 90."""
  from sklearn import datasets  # noqa: PLC0415  Takes a second to import.

  rng = np.random.default_rng(0)
  photos = [Image.fromarray(v) for v in datasets.load_sample_images().images]
  for i in range(n):
    photo = photos[i % 2]
    scale = rng.uniform(0.5, 1)
    width, height = (int(v * scale) for v in photo.size)
    left = int(rng.integers(photo.width - width + 1))
    top = int(rng.integers(photo.height - height + 1))
    picture = photo.resize((500, 375), Image.Resampling.BICUBIC,
                           (left, top, left + width, top + height))
    path = folder / "train" / str(i % 2) / f"{i:03}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=90)
  (folder / "val").symlink_to("train")


def measure(path: str, workers: int, n_rounds: int) -> dict[str, float]:
  """The best of n rounds over all images, after a warm-up: {"core", "wall"}."""
  cfg = derived.fill(schema.Experiment(
      task=tasks.Classification(auto_augment=AUGMENT),
      data=schema.Data(path=path, workers=workers, threads=1),
      train=schema.Train(batch_size=50)))
  data = loader.create(
      cfg, "train", sources.create(cfg.data, "train"),
      transforms.TrainTransform(cfg.data, cfg.task), n_devices=1,
      process_index=0, process_count=1)
  n_batches = -(-data.n_examples // data.batch_size)
  best = {"core": 0.0, "wall": 0.0}
  with contextlib.closing(data.train_batches(0)) as batches:
    for _ in range(n_rounds + 1):
      start = time.perf_counter(), _processor_time()
      for _ in range(n_batches):
        next(batches)
      n = n_batches * data.batch_size
      found = {"wall": n / (time.perf_counter() - start[0]),
               "core": n / (_processor_time() - start[1])}
      best = {key: max(best[key], found[key]) for key in best}
  return best


def _processor_time() -> float:
  """CPU seconds of this process and of its children, from /proc."""
  total = time.process_time()
  tick = os.sysconf("SC_CLK_TCK")
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      fields = stat.read_text().rpartition(")")[2].split()
      if int(fields[1]) == os.getpid():
        total += (int(fields[11]) + int(fields[12])) / tick
  return total


def run(command: list[str]) -> dict[str, float]:
  """Runs a measuring process; returns its last line, parsed as JSON.

  Raises:
    ConfigError: the process failed.
  """
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise errors.ConfigError(
        f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
  return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, path: str) -> None:
  """Measures alternately, each time in a new process; prints a table."""
  ours = [sys.executable, "-m", "metaformer_jax.tools.benchmark_input",
          f"--path={path}", "--measure"]
  theirs = [args.timm_python, str(_TIMM), f"--path={path}/train"]
  for workers in (0, os.cpu_count() or 1):
    rows = []
    for _ in range(args.rounds):
      rows.append([run([*ours, f"--workers={workers}"])["core"]])
      if args.timm_python:
        rows[-1].append(run([*theirs, f"--workers={workers}"])["core"])
    columns = [statistics.median(column) for column in zip(*rows)]
    line = f"workers={workers}: {columns[0]:.0f} images/s per core"
    if args.timm_python:
      ratio = [one / other for one, other in rows]
      line += (f"; timm {columns[1]:.0f}; ratio {statistics.median(ratio):.2f} "
               f"({min(ratio):.2f} to {max(ratio):.2f})")
    print(line, flush=True)


def main(args: argparse.Namespace) -> None:
  """Measures once, or compares."""
  if args.measure:
    print(json.dumps(measure(args.path, args.workers, 3)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    path = pathlib.Path(args.path or temporary)
    if not (path / "train").is_dir():
      write_jpegs(path)
    compare(args, str(path))


def parse() -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "benchmark_input")
  parser.add_argument("--path", help="folder with train/CLASS/*.jpg")
  parser.add_argument("--timm-python", help="an interpreter that has timm")
  parser.add_argument("--rounds", type=int, default=5,
                      help="measurements of each loader")
  parser.add_argument("--measure", action="store_true",
                      help="measure once, in this process, and print JSON")
  parser.add_argument("--workers", type=int, default=0, help="with --measure")
  return parser.parse_args()


if __name__ == "__main__":
  with command.one_line_errors():
    main(parse())
