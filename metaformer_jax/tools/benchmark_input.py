r"""Measures the input pipeline: images per second of one core.

    python -m metaformer_jax.tools.benchmark_input --path=/tmp/jpegs \
        --timm-python=/path/to/python --rate=19733

The training transform reads the JPEGs of the folder; if there is none, 300
crops of scikit-learn's two photographs are written there. Other data sets are
measured where they are: on a disk, on gs://, or a copy of that on a disk
(tools.prepare --stage):

    python -m metaformer_jax.tools.benchmark_input --source=tfds \
        --name=imagenet2012 --path=gs://BUCKET/tfds --threads=16

These take turns, each in a new process:

  read     the loader without a transform: reading records, in random order
  decode   Pillow's JPEG decoding alone
  resize   the loader: decoding, cropping and resizing
  device   the loader with RandAugment and data.augment_on=device
  host     the loader with RandAugment and data.augment_on=host
  timm     timm's loader with the same augmentation, in another interpreter that
           has timm, torch and torchvision (tests/benchmark_timm.py)

The loaders make uint8 batches; normalisation, mixing and erasing come later in
all of them, and are left out. Of data sets with a label for each pixel or
object, only reading and decoding are measured.

"in all" is what comes out each second with so many workers and threads, and
depends on the disk or the network too. "core" is images per second of processor
time, summed over all processes; other programs on the machine change it little.
A ratio compares neighbouring rounds; the median ratio is printed, with the
least and the largest.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from metaformer_jax import command, errors, storage
from metaformer_jax.config import derived, schema, tasks
from metaformer_jax.data import loader, sources
from metaformer_jax.data.sources import base
from metaformer_jax.data.transforms import classification as transforms

AUGMENT = "rand-m9-mstd0.5-inc1"
KINDS = ("read", "decode", "resize", "device", "host")
# Those for which labels need not be those of images.
_ANY_LABELS = KINDS[:2]
# Sources of which each image has a label.
_IMAGES = ("folder", "tfds")
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


def measure(data: schema.Data, kind: str, n_images: int,
            n_rounds: int) -> dict[str, float]:
  """The best of n rounds, after a warm-up: {"core", "wall"}, images/s.

  Args:
    data: the data set, `workers` and `threads`; "decode" has none of these.
    kind: one of `KINDS`.
    n_images: of a round, if the training split has that many; each round has
      other images then.
    n_rounds: rounds that count.
  """
  best = {"core": 0.0, "wall": 0.0}
  source = sources.create(data, "train")
  n_images = min(n_images, len(source))
  with contextlib.ExitStack() as stack:
    read = (_decoder(source, n_images) if kind == "decode" else
            _loader(source, data, kind, n_images, stack))
    for i in range(n_rounds + 1):
      start = time.perf_counter(), _processor_time()
      n = read()
      found = {"wall": n / (time.perf_counter() - start[0]),
               "core": n / (_processor_time() - start[1])}
      if i:
        best = {key: max(best[key], found[key]) for key in best}
  return best


def _decoder(source: base.Source, n_images: int) -> Callable[[], int]:
  """Reads and decodes images by Pillow; returns their number."""
  order = itertools.cycle(np.random.default_rng(0).permutation(
      len(source)).tolist())

  def read():
    for i in itertools.islice(order, n_images):
      with Image.open(io.BytesIO(source[i]["image"])) as picture:
        picture.load()
    return n_images

  return read


def _size(record: base.Record, rng: np.random.Generator | None):
  """The transform that does nothing."""
  del rng
  return {"size": np.int64(len(record["image"]))}


def _loader(source: base.Source, data: schema.Data, kind: str, n_images: int,
            stack: contextlib.ExitStack) -> Callable[[], int]:
  """Reads batches of so many images, or more; returns the number of images."""
  task = (tasks.Classification(flip=0.0) if kind == "resize" else
          tasks.Classification(auto_augment=AUGMENT))
  cfg = derived.fill(schema.Experiment(
      task=task, train=schema.Train(batch_size=50), data=dataclasses.replace(
          data, augment_on="device" if kind == "device" else "host")))
  loading = loader.create(
      cfg, "train", source, _size if kind == "read" else
      transforms.TrainTransform(cfg.data, cfg.task), n_devices=1,
      process_index=0, process_count=1)
  batches = stack.enter_context(contextlib.closing(loading.train_batches(0)))
  n_batches = -(-n_images // loading.batch_size)

  def read():
    for _ in range(n_batches):
      next(batches)
    return n_batches * loading.batch_size

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
          f"--path={path}", f"--source={args.source}",
          f"--threads={args.threads}", f"--images={args.images}",
          *([f"--name={args.name}"] if args.name else [])]
  kinds = KINDS if args.source in _IMAGES else _ANY_LABELS
  commands = {kind: [*ours, f"--measure={kind}"] for kind in kinds}
  if args.timm_python:
    commands["timm"] = [args.timm_python, str(_TIMM), f"--path={path}/train"]
  for workers in (0, os.cpu_count() or 1):
    found = {kind: [] for kind in commands}
    for _ in range(args.rounds):
      for kind, measuring in commands.items():
        found[kind].append(run([*measuring, f"--workers={workers}"]))
    core, wall = ({kind: [each[key] for each in values]
                   for kind, values in found.items()}
                  for key in ("core", "wall"))
    print(f"workers={workers}\n" + "\n".join(table(core, args.rate, wall)),
          flush=True)


def table(rates: Mapping[str, Sequence[float]], rate: float | None = None,
          walls: Mapping[str, Sequence[float]] | None = None) -> list[str]:
  """Lines of what was measured.

  Args:
    rates: images per second of a core, by kind; each in the same rounds.
    rate: images per second that are wanted; the cores for it are added.
    walls: images per second in all, likewise; they are added.
  """
  lines, walls = [], walls or {}
  for kind, values in rates.items():
    middle = statistics.median(values)
    cores = f"; {math.ceil(rate / middle)} cores for {rate:g}" if rate else ""
    wall = (f"; {statistics.median(walls[kind]):.0f} in all" if kind in walls
            else "")
    lines.append(f"  {kind:6}  {middle:6.0f} images/s per core{cores}{wall}")
  for one, other, least in GOALS:
    if one in rates and other in rates:
      ratio = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
      lines.append(
          f"  {one} over {other}: {statistics.median(ratio):.2f} "
          f"({min(ratio):.2f} to {max(ratio):.2f}); goal {least:.2f}")
  return lines


def main(args: argparse.Namespace) -> None:
  """Measures once, or compares."""
  if args.measure:
    data = schema.Data(source=args.source, name=args.name, path=args.path,
                       workers=args.workers, threads=args.threads)
    print(json.dumps(measure(data, args.measure, args.images, 3)))
    return
  if args.source != "folder" and not args.path:
    raise errors.ConfigError(f"--path: is missing, with --source={args.source}")
  with tempfile.TemporaryDirectory() as temporary:
    path = args.path or temporary
    if args.source == "folder":
      for problem in _problems(path):
        raise errors.ConfigError(problem)
    compare(args, path)


def _problems(path: str) -> Iterator[str]:
  """Yields why a folder of classes cannot be read; makes one if it is new."""
  if storage.is_remote(path):
    yield f"--path: {path} is not a local folder; {base.ELSEWHERE}"
  elif not (pathlib.Path(path) / "train").is_dir():
    write_jpegs(pathlib.Path(path))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "benchmark_input")
  parser.add_argument("--path", help="folder with train/CLASS/*.jpg, or what "
                      "config.data.path is with another source")
  parser.add_argument("--source", default="folder",
                      choices=(*_IMAGES, "array_record", "coco", "ade20k",
                               "label_maps"),
                      help="the form of the data, as in config.data.source")
  parser.add_argument("--name", help="as config.data.name, with --source=tfds")
  parser.add_argument("--timm-python", help="an interpreter that has timm")
  parser.add_argument("--rounds", type=command.positive, default=5,
                      help="measurements of each loader")
  parser.add_argument("--images", type=command.positive, default=1000,
                      help="of a measurement, at most")
  parser.add_argument("--rate", type=float, help="images per second that a "
                      "host must prepare; prints the cores that it needs")
  parser.add_argument("--threads", type=command.positive, default=1,
                      help="reading threads of each process")
  parser.add_argument("--measure", choices=KINDS,
                      help="measure once, in this process, and print JSON")
  parser.add_argument("--workers", type=int, default=0, help="with --measure")
  return parser.parse_args(argv)


def console() -> None:
  """The command metaformer-benchmark-input."""
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
