"""The experiments of a study: variants of a config file, and sweeps of keys."""

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import pathlib
import runpy
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metaformer_jax import cli, errors, imports
from metaformer_jax.config import saved, trees, typed
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry

# Characters of a sweep's name; a file's name may have 255 bytes.
_MAX_NAME = 120

Setting = tuple[str, Any]  # A "section.key", and its value.


@dataclasses.dataclass(frozen=True)
class Variant:
  """An experiment of a study, but for its seed.

  Attributes:
    argument: of `get_config`; None: the file's default.
    settings: what is then set, in this order.
    published: the result of the task's first measure, in percent if that is a
      fraction; None if there is none.
    is_settings: whether it is a row of settings, so that `get_config` need
      not take an argument.
  """

  argument: str | None = None
  settings: tuple[Setting, ...] = ()
  published: float | None = None
  is_settings: bool = False


@dataclasses.dataclass(frozen=True)
class File:
  """What a config file defines.

  Attributes:
    path: of the file.
    argument: of --config=FILE:ARGUMENT; None without.
    names: what the file defines, by name.
  """

  path: pathlib.Path
  argument: str | None
  names: Mapping[str, Any]


def read(argument: str) -> File:
  """Runs the file of --config=FILE or --config=FILE:ARGUMENT.

  Raises:
    ConfigError: it is missing, raises, or has no get_config.
  """
  name, _, variant = argument.partition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    raise errors.ConfigError(f"--config: {path} is not a file")
  try:
    names = runpy.run_path(str(path))
  except Exception as e:  # The file is a program.
    raise errors.ConfigError(f"{path}: {type(e).__name__}: {e}") from e
  if "get_config" not in names:
    raise errors.ConfigError(f"{path}: has no get_config; see "
                             "configs/quickstart.py")
  return File(path, variant or None, names)


def of(file: File,
       sweeps: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, Variant]:
  """The variants of a study by name, in order.

  They are the rows of the file's VARIANTS, or the one that --config names, or
  else the file's experiment; each with every combination of the swept values,
  which no published value belongs to.

  Args:
    file: what it runs.
    sweeps: keys and their values.

  Raises:
    ConfigError: a row or a name cannot be used, or a key is swept twice.
  """
  table = file.names.get("VARIANTS", {})
  base = {name: _row(file, name, row) for name, row in table.items()}
  if file.argument:
    base = {file.argument: base.get(file.argument, Variant(file.argument))}
  unnamed = not base  # One experiment: sweeps alone tell variants apart.
  base = base or {file.path.stem: Variant()}
  keys = [key for key, _ in sweeps]
  if twice := [key for key in keys if keys.count(key) > 1]:
    raise errors.ConfigError(f"--sweep: {twice[0]}: is given twice; give all "
                             "values in one, separated by commas")
  if not sweeps:
    return base
  found = {}
  for name, variant in base.items():
    for values in itertools.product(*(values for _, values in sweeps)):
      changes = tuple(zip(keys, values))
      parts = [] if unnamed else [name]
      found[_joined([*parts, *map(_shown, changes)])] = dataclasses.replace(
          variant, settings=variant.settings + changes, published=None)
  return found


def _row(file: File, name: str, row: Any) -> Variant:
  """A row of VARIANTS: see `tools.study`."""
  if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
    raise errors.ConfigError(f"{file.path}: VARIANTS: {name!r} cannot be the "
                             "name of a folder; choose another one")
  if isinstance(row, Mapping):
    row = row, None
  if not isinstance(row, tuple) or not row:
    raise errors.ConfigError(
        f"{file.path}: VARIANTS: {name}: {row!r} is neither settings by "
        "'section.key' nor a tuple that ends with the published value or None")
  *columns, published = row
  if isinstance(published, tuple):
    published, *_ = published
  is_settings = bool(columns) and isinstance(columns[0], Mapping)
  settings = tuple(columns[0].items()) if is_settings else ()
  return Variant(name, settings, published, is_settings)


def _shown(setting: Setting) -> str:
  """base_lr=0.001, or model.name=resnet18 where the name alone is unclear."""
  key, value = setting
  name = key.rpartition(".")[2]
  same = [k for k in typed.keys() if k.endswith(f".{name}")]  # noqa: SIM118
  values = value if isinstance(value, tuple) else (value,)
  return f"{name if same == [key] else key}={'+'.join(map(str, values))}"


def _joined(parts: Iterable[str]) -> str:
  """The name of a variant, which is that of a folder, too."""
  name = urllib.parse.quote(",".join(parts), safe="=,+:@() ")
  if len(name) <= _MAX_NAME:
    return name
  return f"{name[:_MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def experiment(file: File, name: str, variant: Variant, seed: int,
               settings: Iterable[Setting] = ()) -> Experiment:
  """The checked experiment of one run.

  Args:
    file: what it runs.
    name: of the variant, for messages.
    variant: of the file.
    seed: of the run.
    settings: further ones, of --set; they win.

  Raises:
    ConfigError: the file raises, or a key or a value is wrong.
  """
  try:
    config = get_config(file, variant)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"{file.path}: {e}") from e
  except Exception as e:  # The file is a program.
    raise errors.ConfigError(
        f"{file.path}: get_config of {name}: {type(e).__name__}: {e}") from e
  if not isinstance(config, trees.ConfigDict):
    raise errors.ConfigError(f"{file.path}: get_config of {name} returned "
                             f"{config!r}, not a ConfigDict")
  config.seed = seed
  for where, pairs in ((f"variant {name}", variant.settings),
                       ("--set", settings)):
    for key, value in pairs:
      _apply(config, key, value, where)
  try:
    return cli.resolve(config)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"variant {name}: {e}") from e


def get_config(file: File, variant: Variant) -> Any:
  """What the file's get_config returns for a variant, without its settings."""
  function = file.names["get_config"]
  if variant.argument is None or (
      variant.is_settings and not inspect.signature(function).parameters):
    return function()
  return function(variant.argument)


def _apply(config: Any, key: str, value: Any, where: str) -> None:
  """Sets one key; `where` says in messages who wants it."""
  if key == "seed":
    raise errors.ConfigError(f"{where}: seed: each variant is run with every "
                             "seed; use --seeds, or SEEDS in the file")
  # A task of the user's own has keys that are not known here.
  own = ([f"task.{name}" for name in config.task]
         if imports.is_path(config.task.get("name")) else [])
  known = typed.keys()
  if key not in known and key not in own:
    raise errors.ConfigError(
        f"{where}: {key}: no such key{typed.did_you_mean(key)}")
  try:
    config.update_from_flattened_dict({key: value})
  except (KeyError, TypeError, ValueError) as e:
    raise errors.ConfigError(f"{where}: {key}={value!r}: {e}") from e


def require_different(experiments: Mapping[str, Experiment]) -> None:
  """Raises ConfigError if two variants are the same experiment.

  Args:
    experiments: of one seed, by the names of their variants.
  """
  names = {}
  for name, cfg in experiments.items():
    other = names.setdefault(_identity(cfg), name)
    if other != name:
      raise errors.ConfigError(
          f"variants {other} and {name}: are the same experiment; change what "
          "they set, or remove one (rows of VARIANTS are settings by "
          "'section.key', or columns that get_config(name) must read)")


def _identity(cfg: Experiment) -> str:
  """A text that is the same for the same experiments.

  Hyper-parameters that are left to the named model count as its own.
  """
  facts = saved.flat(cfg)
  name = cfg.model.name
  if name is not None and not imports.is_path(name):
    spec = registry.get_spec(name)
    network = repr((spec.module, spec.override(**cfg.model.overrides())))
    facts = {key: value for key, value in facts.items()
             if not key.startswith("model.")}
    facts |= {"network": network, "model.dtype": cfg.model.dtype}
  return json.dumps(facts, sort_keys=True)


def parse_setting(text: str) -> Setting:
  """KEY=VALUE; ValueError if it is not."""
  key, found, value = text.partition("=")
  if not found:
    raise ValueError(f"{text!r} is not KEY=VALUE")
  return key, _value(value)


def parse_sweep(text: str) -> tuple[str, tuple[Any, ...]]:
  """KEY=VALUE,VALUE,...; ValueError if it is not, or has a value twice.

  Commas within brackets and quotation marks do not separate values.
  """
  key, found, values = text.partition("=")
  parts = _split(values)
  if not found or not all(parts):
    raise ValueError(f"{text!r} is not KEY=VALUE,VALUE,...")
  made = tuple(map(_value, parts))
  for i, value in enumerate(made):
    if value in made[:i]:
      raise ValueError(f"{key}={value!r} is given twice")
  return key, made


def _split(text: str) -> list[str]:
  """The parts between the commas that are outside brackets and quotes."""
  parts, depth, quote = [""], 0, ""
  for c in text:
    if quote:
      quote = "" if c == quote else quote
    elif c in "'\"":
      quote = c
    else:
      depth += (c in "([{") - (c in ")]}")
    if c == "," and not quote and depth == 0:
      parts.append("")
    else:
      parts[-1] += c
  return [part.strip() for part in parts]


def _value(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text  # A string without quotation marks.
