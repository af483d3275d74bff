r"""Predicts what is on images:

    python -m metaformer_jax.tools.predict --weights=runs/mine photos/ cat.jpg
    python -m metaformer_jax.tools.predict --weights=caformer_s18 *.jpg --csv
    python -m metaformer_jax.tools.predict --weights=runs/ade20k photos/ \
        --output=predicted/

--weights is the name of a model with published weights, a file of weights, or
the folder of a run. In a folder, all images are taken, those of its subfolders
included. Images that cannot be read are named, and passed over.

--output writes what is found into a folder, and NAME.overlay.png, which shows
it on the image. Of segmentation: NAME.labels.png, whose values are the classes.
Of detection: detections.json, a COCO data set of all images, with masks as RLEs
if the model has them.
"""

import argparse
import contextlib
import logging
import os
import pathlib
import sys
import textwrap
from typing import Any

from tqdm import auto as tqdm

from metaformer_jax import command, errors, inference
from metaformer_jax.config import schema
from metaformer_jax.data.sources import folders
from metaformer_jax.runtime import devices
from metaformer_jax.tasks import base
from metaformer_jax.tools import output

log = logging.getLogger("metaformer_jax.tools.predict")


def find(paths: list[str]) -> list[tuple[str, str]]:
  """The files of images, and those of folders, in order.

  Returns:
    For each its path, and its name below the folder that was given.

  Raises:
    ConfigError: a path does not exist, or a folder has no images.
  """
  found = []
  for path in paths:
    if os.path.isdir(path):
      inside = folders.image_files(path, "command line")
      if not inside:
        raise errors.ConfigError(
            f"{path}: has no images ({', '.join(folders.IMAGE_SUFFIXES)})")
      found += [(os.path.join(path, name), name) for name in inside]
    elif os.path.exists(path):
      found.append((path, os.path.basename(path)))
    else:
      raise errors.ConfigError(f"{path}: does not exist")
  return found


class Files:
  """Writes predictions into a folder: pictures, and a COCO data set of all."""

  def __init__(self, folder: str, task: base.Task,
               images: list[tuple[str, str]]):
    """Takes the images as `find` returns them.

    Raises:
      ConfigError: the task has neither pictures nor annotations, the folder
        cannot be made, or two images would be written under one name.
    """
    if not (hasattr(task, "pictures") or hasattr(task, "annotations")):
      raise errors.ConfigError(
          "--output: the weights are of a task whose predictions are not "
          "pictures; omit it")
    self._task, self._folder = task, pathlib.Path(folder)
    self._names, seen = dict(images), {}
    self._images, self._categories, self._annotations = [], [], []
    for path, name in images:
      first = seen.setdefault(os.path.splitext(name)[0], path)
      if first != path:
        raise errors.ConfigError(
            f"--output: {first} and {path} would be written under the same "
            "name; predict them separately")
    with self._one_line():
      self._folder.mkdir(parents=True, exist_ok=True)

  def add(self, path: str, found: dict[str, Any]) -> None:
    """Takes what was found on the image at a path, and writes its pictures."""
    if hasattr(self._task, "annotations"):
      self._annotate(self._names[path], self._task.annotations(found))
    if not hasattr(self._task, "pictures"):
      return
    pictures = self._task.pictures(found, folders.read_file(path))
    stem = self._folder / os.path.splitext(self._names[path])[0]
    with self._one_line():
      stem.parent.mkdir(parents=True, exist_ok=True)
      for name, picture in pictures.items():
        picture.save(f"{stem}.{name}.png")

  def _annotate(self, name: str, found: dict[str, base.Rows]) -> None:
    """Adds an image to the data set; numbers begin at 1."""
    image_id = len(self._images) + 1
    self._images += [{"id": image_id, "file_name": name, **row}
                     for row in found["images"]]
    self._categories = found["categories"]
    self._annotations += [
        {"id": i, "image_id": image_id, **row} for i, row in enumerate(
            found["annotations"], len(self._annotations) + 1)]

  def close(self) -> None:
    """Writes the data set of all images, if there is one."""
    if self._images:
      with self._one_line():
        output.write_json(self._folder / "detections.json", {
            "info": {}, "images": self._images,
            "categories": self._categories, "annotations": self._annotations})

  @contextlib.contextmanager
  def _one_line(self):
    try:
      yield
    except OSError as e:
      raise errors.ConfigError(
          f"--output: {self._folder} cannot be written: {e}") from e


def main(args: argparse.Namespace) -> None:
  """Prints the predictions that the command line asks for."""
  images = find(args.images)
  devices.configure(schema.Log().compilation_cache)
  try:
    loaded = inference.load(args.weights, model=args.model,
                            allow_import=args.allow_import)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--weights: {e}") from e
  if loaded.cfg.task.num_classes == 0:
    raise errors.ConfigError(f"--weights: {args.weights} has no head, and so "
                             "no classes; give weights with one")
  files = args.output and Files(args.output, loaded.task, images)
  n_bad, header = 0, True
  with tqdm.tqdm(total=len(images), unit="image", ncols=79,
                 disable=not sys.stderr.isatty()) as bar:
    batch_size = min(args.batch_size, inference.enough_for(len(images)))
    paths = [path for path, _ in images]
    for path, found in zip(paths, loaded.stream(paths, batch_size)):
      bad = isinstance(found, errors.DataError)
      rows = [] if bad else loaded.task.describe(found, args.top)
      with bar.external_write_mode():
        _show(path, found if bad else rows, args.form, header)
      header &= not rows
      if files and not bad:
        files.add(path, found)
      n_bad += bad
      bar.update()
  if files:
    files.close()
  if n_bad:
    message = f"{n_bad} of {len(images)} images cannot be used"
    if n_bad == len(images):
      raise errors.DataError(message)
    log.warning("%s", message)


def _show(path: str, found: base.Rows | errors.DataError, form: str,
          header: bool) -> None:
  """Prints the rows of what was found on an image, or why it is unusable."""
  bad = isinstance(found, errors.DataError)
  if bad:
    log.warning("%s", errors.one_line(found))
  if form == "json":
    said = {"error": errors.one_line(found)} if bad else {"predictions": found}
    output.write([{"image": path, **said}], "json")
  elif form == "csv" and not bad and found:
    output.write([{"image": path, **row} for row in found], "csv", header)
  elif form == "table" and not bad:
    rows = output.table(found) if found else "nothing found"
    print(errors.one_line(path), textwrap.indent(rows, "  "), sep="\n",
          flush=True)


def parse() -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "predict")
  parser.add_argument("images", nargs="+", help="files and folders of images")
  parser.add_argument("--weights", required=True, help="the name of a model "
                      "with published weights, a file, or a run's folder")
  parser.add_argument("--model", help="a name of metaformer_jax.list_models(), "
                      "for weights that do not record it")
  parser.add_argument("--top", type=command.positive, default=5,
                      help="classes or objects to show for each image, the "
                      "best ones, 5 by default; --output has all objects")
  parser.add_argument("--output", help="a folder for what a segmentation or "
                      "detection model predicts")
  parser.add_argument("--batch_size", type=command.positive, default=32,
                      help="images per call of the model, at most; 32 by "
                      "default")
  form = parser.add_mutually_exclusive_group()
  form.add_argument("--csv", dest="form", action="store_const", const="csv",
                    default="table", help="print comma-separated values")
  form.add_argument("--json", dest="form", action="store_const", const="json",
                    help="print a JSON object on a line for each image")
  parser.add_argument("--allow_import", default="", help="modules of your own "
                      "that the weights may name, separated by commas")
  return parser.parse_args()


def console() -> None:
  """The command metaformer-predict."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
