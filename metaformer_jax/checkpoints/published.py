"""Published weights: in a cache folder, or downloaded into it.

A file on the Hugging Face hub is downloaded by `huggingface_hub` if that is
installed (the extra `hub`): it has the user's token and shares its cache with
other packages. Without it the same file comes by https, checked by the same
digest, so that no user must install more.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from packaging import version

from metaformer_jax import errors
from metaformer_jax.checkpoints import download
from metaformer_jax.checkpoints import headers as headers_lib
from metaformer_jax.config import paths, weights
from metaformer_jax.convert import adapt, files, layouts
from metaformer_jax.models import registry

log = logging.getLogger(__name__)

# The cache folder, unless this variable of the environment names another.
FOLDER = "~/.cache/metaformer_jax/weights"
VARIABLE = "METAFORMER_JAX_WEIGHTS"
# Of NAME.safetensors and so on in the folder; the first that exists is read.
SUFFIXES = (".safetensors", ".pth.tar", ".pth")

_HUB = "https://huggingface.co"
# Of huggingface_hub; setup.py has the same.
_OLDEST_CLIENT = version.Version("1.3")
_ON_HUB = re.compile(f"{re.escape(_HUB)}/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the published weights of a model are.

  Attributes:
    url: of the file.
    name: of the file in the cache folder.
    on_hub: its repository, revision and path on the hub, by the names that
      `huggingface_hub` gives them; None if it is elsewhere.
  """

  url: str
  name: str
  on_hub: dict[str, str] | None = None


def place(name: str) -> Place | None:
  """Where a model's weights are published; None if they are not.

  The hub is the one that HF_ENDPOINT names, if it is set.

  Raises:
    ValueError: there is no such model.
  """
  checkpoint = registry.get_spec(name).checkpoint
  if checkpoint is None:
    return None
  if "://" not in checkpoint:
    # The repository also has these tensors as a pickle.
    checkpoint = f"{_HUB}/{checkpoint}/resolve/main/model.safetensors"
  suffix = next((s for s in SUFFIXES if checkpoint.endswith(s)), SUFFIXES[-1])
  found = _ON_HUB.fullmatch(checkpoint)
  if not found:
    return Place(checkpoint, f"{name}{suffix}")
  endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _HUB
  return Place(endpoint + checkpoint.removeprefix(_HUB), f"{name}{suffix}",
               dict(zip(("repo_id", "revision", "filename"), found.groups())))


def folder() -> pathlib.Path:
  """The cache folder; it need not exist."""
  value = os.environ.get(VARIABLE) or FOLDER
  return paths.local(VARIABLE, value, errors.WeightsError).absolute()


def locate(value: str | pathlib.Path,
           beat: Callable[[], None] = lambda: None) -> pathlib.Path:
  """The path of weights that a user names; see `config.weights`.

  Args:
    value: a path, which need not exist, or the name of a model.
    beat: as for `fetch`.

  Raises:
    WeightsError: as `fetch`, or the path cannot be used.
  """
  name = weights.model_of(value)
  if name is None:
    return weights.located("", value, errors.WeightsError)
  return fetch(name, beat)


def fetch(name: str, beat: Callable[[], None] = lambda: None) -> pathlib.Path:
  """The file of a model's published weights, downloaded if necessary.

  A downloaded file has the size and the digests that its server tells, and
  every tensor of it fits the model.

  Args:
    name: of the model.
    beat: called whenever something has arrived.

  Raises:
    WeightsError: none are published, or they cannot be downloaded; one line
      that says which file to put where.
  """
  source = place(name) if name in registry.list_models() else None
  if source is None:
    raise errors.WeightsError(f"{name}: has no published weights; name a file")
  target = folder() / source.name
  try:
    found = _cached(name, source)
    if found is None:
      found = _download(name, source, target, beat)
  except download.DownloadError as e:
    raise errors.WeightsError(
        f"{name}: its weights cannot be downloaded ({errors.one_line(e)}); "
        f"download {source.url} on another machine, and put it here as {target}"
    ) from e
  except OSError as e:  # Of the folder.
    raise errors.WeightsError(
        f"{name}: {e.filename or target}: {e.strerror or e}; {VARIABLE} names "
        "another folder for published weights") from e
  return found


def _cached(name: str, source: Place) -> pathlib.Path | None:
  """The file of a model's weights, if it is on this machine."""
  for suffix in SUFFIXES:
    path = folder() / f"{name}{suffix}"
    if path.is_file():
      return path
    if os.path.lexists(path):
      raise FileExistsError(0, "is not a file; remove it", str(path))
  hub = source.on_hub and _hub()
  found = hub and hub.try_to_load_from_cache(**source.on_hub)
  return pathlib.Path(found) if isinstance(found, str) else None


def _download(name: str, source: Place, target: pathlib.Path,
              beat: Callable[[], None]) -> pathlib.Path:
  if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
    raise download.DownloadError("HF_HUB_OFFLINE is set")
  check = functools.partial(_check, name)
  hub = source.on_hub and _hub()
  if hub:
    return _from_hub(hub, source, check, beat)
  download.download(source.url, target, check, beat)
  return target


def _hub() -> Any:
  """The hub's client; None if it is not installed or too old."""
  try:
    # Optional; it loads its parts when they are named.
    import huggingface_hub.constants  # noqa: PLC0415
    import huggingface_hub.errors  # noqa: PLC0415
    import huggingface_hub.utils  # noqa: PLC0415
  except ImportError:
    return None
  is_known = version.Version(huggingface_hub.__version__) >= _OLDEST_CLIENT
  return huggingface_hub if is_known else None


def _from_hub(hub: Any, source: Place, check: Callable[[pathlib.Path], None],
              beat: Callable[[], None]) -> pathlib.Path:
  """Downloads into the hub's cache.

  Raises:
    DownloadError: the hub does not give the file, or another one.
  """

  class Bar(hub.utils.tqdm):

    def update(self, n=1):
      beat()
      return super().update(n)

  def facts():
    return hub.get_hf_file_metadata(hub.hf_hub_url(**source.on_hub))

  log.info("downloading %s by huggingface_hub", source.url)
  try:
    try:
      # Fails at once if there is no network; the download tries for long.
      told = facts()
    except hub.errors.HfHubHTTPError:  # May pass; the download tries again.
      told = None
    path = pathlib.Path(hub.hf_hub_download(**source.on_hub, tqdm_class=Bar))
    told = told or facts()
  except Exception as e:  # Of many types.
    reason = str(e.__cause__ or e).strip().partition("\n")[0]
    raise download.DownloadError(reason or type(e).__name__) from e
  sha256 = headers_lib.sha256_of_etag(told.etag)
  try:
    download.require(path, {"sha256": sha256} if sha256 else {}, check)
  except download.DownloadError:
    path.resolve().unlink()  # Or the client would give it again.
    raise
  return path


def _check(name: str, path: pathlib.Path) -> None:
  """Raises WeightsError unless every tensor of a file fits the model."""
  spec = registry.get_spec(name)
  size = (spec.input_size, spec.input_size)
  image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  target = jax.eval_shape(registry.create_model(name).init, jax.random.key(0),
                          image)
  layouts.to_flax(spec.family, files.read_tensors(path), target,
                  functools.partial(adapt.to_shape, image_size=size))


@contextlib.contextmanager
def advising(path: pathlib.Path) -> Iterator[None]:
  """Says of a file that turns out to be damaged how to download it again."""
  try:
    yield
  except errors.WeightsError as e:
    caches, hub = [folder()], _hub()
    if hub:
      caches.append(pathlib.Path(hub.constants.HF_HUB_CACHE))
    if not any(path.absolute().is_relative_to(cache) for cache in caches):
      raise
    raise errors.WeightsError(
        f"{e}; delete {path.resolve()} to download it again") from e
