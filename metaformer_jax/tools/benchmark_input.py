r"""Measures the input pipeline: images per second of one core.

    python -m metaformer_jax.tools.benchmark_input --path=/tmp/jpegs \
        --timm-python=/path/to/python --rate=19733

The training transform reads the JPEGs of the folder; if there is none, 300
crops of scikit-learn's two photographs are written there. These take turns,
each in a new process:

  decode   Pillow's JPEG decoding alone
  resize   the loader: decoding, cropping and resizing
  device   the loader with RandAugment and data.augment_on=device
  host     the loader with RandAugment and data.augment_on=host
  timm     timm's loader with the same augmentation, in another interpreter that
           has timm, torch and torchvision (tests/benchmark_timm.py)

The loaders make uint8 batches; normalisation, mixing and erasing come later in
all of them, and are left out.

"core" is images per second of processor time, summed over all processes; other
programs on the machine change it little. A ratio compares neighbouring rounds;
the median ratio is printed, with the least and the largest.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from metaformer_jax import command, errors
from metaformer_jax.config import derived, schema, tasks
from metaformer_jax.data import loader, sources
from metaformer_jax.data.transforms import classification as transforms

AUGMENT = "rand-m9-mstd0.5-inc1"
KINDS = ("decode", "resize", "device", "host")
# Ratios of rates that are to be reached, with the least.
GOALS = (("host", "timm", 1.7), ("host", "decode", 0.6),
         ("device", "resize", 1 / 1.35))
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


def measure(path: str, kind: str, workers: int,
            n_rounds: int) -> dict[str, float]:
  """The best of n rounds over all images, after a warm-up: {"core", "wall"}.

  Args:
    path: the folder.
    kind: one of `KINDS`.
    workers: `data.workers`; "decode" has none.
    n_rounds: rounds that count.
  """
  best = {"core": 0.0, "wall": 0.0}
  with contextlib.ExitStack() as stack:
    read = (_decoder(path) if kind == "decode" else
            _loader(path, kind, workers, stack))
    for i in range(n_rounds + 1):
      start = time.perf_counter(), _processor_time()
      n = read()
      found = {"wall": n / (time.perf_counter() - start[0]),
               "core": n / (_processor_time() - start[1])}
      if i:
        best = {key: max(best[key], found[key]) for key in best}
  return best


def _decoder(path: str) -> Callable[[], int]:
  """Decodes all images; returns their number."""
  files = sorted(pathlib.Path(path, "train").glob("*/*"))

  def read():
    for file in files:
      with Image.open(file) as picture:
        picture.load()
    return len(files)

  return read


def _loader(path: str, kind: str, workers: int,
            stack: contextlib.ExitStack) -> Callable[[], int]:
  """Reads batches of all images; returns the number of images."""
  task = (tasks.Classification(flip=0.0) if kind == "resize" else
          tasks.Classification(auto_augment=AUGMENT))
  cfg = derived.fill(schema.Experiment(
      task=task, train=schema.Train(batch_size=50), data=schema.Data(
          path=path, workers=workers, threads=1,
          augment_on="device" if kind == "device" else "host")))
  data = loader.create(
      cfg, "train", sources.create(cfg.data, "train"),
      transforms.TrainTransform(cfg.data, cfg.task), n_devices=1,
      process_index=0, process_count=1)
  batches = stack.enter_context(contextlib.closing(data.train_batches(0)))
  n_batches = -(-data.n_examples // data.batch_size)

  def read():
    for _ in range(n_batches):
      next(batches)
    return n_batches * data.batch_size

  return read


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
  """Measures alternately, each time in a new process; prints tables."""
  ours = [sys.executable, "-m", "metaformer_jax.tools.benchmark_input",
          f"--path={path}"]
  commands = {kind: [*ours, f"--measure={kind}"] for kind in KINDS}
  if args.timm_python:
    commands["timm"] = [args.timm_python, str(_TIMM), f"--path={path}/train"]
  for workers in (0, os.cpu_count() or 1):
    rates = {kind: [] for kind in commands}
    for _ in range(args.rounds):
      for kind, measuring in commands.items():
        rates[kind].append(run([*measuring, f"--workers={workers}"])["core"])
    print(f"workers={workers}\n" + "\n".join(table(rates, args.rate)),
          flush=True)


def table(rates: Mapping[str, Sequence[float]],
          rate: float | None = None) -> list[str]:
  """Lines of what was measured.

  Args:
    rates: images per second of a core, by kind; each in the same rounds.
    rate: images per second that are wanted; the cores for it are added.
  """
  lines = []
  for kind, values in rates.items():
    middle = statistics.median(values)
    cores = f"; {math.ceil(rate / middle)} cores for {rate:g}" if rate else ""
    lines.append(f"  {kind:6}  {middle:6.0f} images/s per core{cores}")
  for one, other, least in GOALS:
    if other in rates:
      ratio = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
      lines.append(
          f"  {one} over {other}: {statistics.median(ratio):.2f} "
          f"({min(ratio):.2f} to {max(ratio):.2f}); goal {least:.2f}")
  return lines


def main(args: argparse.Namespace) -> None:
  """Measures once, or compares."""
  if args.measure:
    print(json.dumps(measure(args.path, args.measure, args.workers, 3)))
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
  parser.add_argument("--rate", type=float, help="images per second that a "
                      "host must prepare; prints the cores that it needs")
  parser.add_argument("--measure", choices=KINDS,
                      help="measure once, in this process, and print JSON")
  parser.add_argument("--workers", type=int, default=0, help="with --measure")
  return parser.parse_args()


def console() -> None:
  """The command metaformer-benchmark-input."""
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
