"""What entry points with an experiment share: its flags, and its checks.

An entry point is

    def console():
      cli.run(main)

    if __name__ == "__main__":
      console()

where `main(cfg, workdir)` gets a checked configuration; setup.py names some of
these functions as console commands. Nothing here imports jax, so that a mistake
in a config is reported at once.
"""

import functools
import logging
import os
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from metaformer_jax import command, errors, storage
from metaformer_jax.config import explain, paths, saved, shipped, typed
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import workdir as workdir_lib

log = logging.getLogger(__name__)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, e.g. configs/quickstart.py; "
    "--config.section.key=value overrides one value. Where the working "
    "directory has no such file, configs/NAME is that of the package, in "
    f"{shipped.FOLDER}.", lock_config=True)
_CONFIG_JSON = flags.DEFINE_string(
    "config_json", None, "Instead of --config: the experiment as data, e.g. "
    "runs/quickstart/config.json, from which nothing is executed; absent keys "
    "take their defaults. Overrides as for --config.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, curves. A run "
    "in it is resumed. Default: runs/NAME_OF_THE_CONFIG.")

_ALLOW_IMPORT = flags.DEFINE_list(
    "allow_import", [], "Modules of your own that --config_json, or the folder "
    "or file of config.init, may name, separated by commas. A config file and "
    "the command line may name any.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, with several processes; by "
    "default from SLURM, Open MPI or the Cloud TPU.")
_PROCESS_COUNT = flags.DEFINE_integer(
    "process_count", None, "Processes of the run; 1: only this one, whatever "
    "the environment says.", lower_bound=1, upper_bound=2**16)
_PROCESS_INDEX = flags.DEFINE_integer(
    "process_index", None, "Index of this process, from 0.", lower_bound=0)

# An override on the command line: its key, and its value if attached.
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)

# Gives the experiment of a command line that names none, or None.
Otherwise = Callable[[], Experiment | None]


def run(main: Callable[[Experiment, pathlib.Path], None], *,
        elsewhere: bool = False, otherwise: Otherwise = lambda: None,
        train: bool = True) -> None:
  """Parses the command line, runs `main` and ends the process.

  Args:
    main: called with the experiment and the workdir.
    elsewhere: whether the experiment is for another machine, so that the data,
      the weights and the workdir need not exist on this one.
    otherwise: called, before the flags are parsed, if the command line names no
      config; `given` has what it may depend on.
    train: whether the training data must be on this machine.
  """
  with command.one_line_errors():
    cfg, workdir = parse(elsewhere, otherwise, train, main.__module__)
    command.start_logging()
    for path in given("config"):
      if path.startswith(str(shipped.FOLDER)):
        log.info("config: %s", path)
    main(cfg, workdir)


def resolve(config: Mapping[str, Any], files: bool = True,
            train: bool = True) -> Experiment:
  """`config.resolve.resolve`, with the checks of the data's sources.

  `train` is as for `run`.
  """
  return config_lib.resolve(
      config, files, also=functools.partial(_check_data, train=train),
      allowed=allowed())


def allowed() -> list[str]:
  """The modules of --allow_import."""
  if flags.FLAGS.is_parsed():
    return _ALLOW_IMPORT.value
  # Not yet, or by a tool with an argument parser.
  return [name for value in given("allow_import") for name in value.split(",")]


def _check_data(cfg: Experiment, files: bool, train: bool) -> Iterable[str]:
  # Imports NumPy, which a mistake in a single value need not wait for.
  from metaformer_jax.data import sources  # noqa: PLC0415

  return sources.check(cfg, files, train)


def parse(elsewhere: bool = False, otherwise: Otherwise = lambda: None,
          train: bool = True, module: str = "__main__",
          ) -> tuple[Experiment, pathlib.Path]:
  """Returns the experiment and the workdir of the command line.

  Args:
    elsewhere, otherwise, train: as for `run`.
    module: name of the entry point's module, for --help.

  Raises:
    ConfigError: the command line, the file or the config is wrong.
  """
  # absl's own warnings would be additional lines.
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    # ml_collections finds the overrides in sys.argv itself.
    sys.argv = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
  except (flags.Error, UnicodeDecodeError) as e:
    raise errors.ConfigError(f"command line: {e}") from e
  if not {"--help", "-help", "-h"}.isdisjoint(sys.argv):
    print(_help(sys.modules[module]))
    sys.exit(0)
  sys.argv = _with_shipped_config(sys.argv)
  cleared = _check_overrides()
  json_path = _read_json(otherwise)
  config = _load(json_path)
  logging.getLogger("absl").setLevel(logging.WARNING)
  overrides = config_flags.get_override_values(flags.FLAGS["config"])
  overrides |= dict.fromkeys(cleared)
  _override(config)
  if _WORKDIR.value == "":
    raise errors.ConfigError("--workdir: is empty; name a folder")
  workdir = _WORKDIR.value or os.path.join("runs", _run_name(json_path))
  cfg = resolve(config, files=not elsewhere, train=train)
  return cfg, (storage.path(workdir, "--workdir") if elsewhere
               else _check_workdir(workdir))


def overridden(cfg: Experiment, train: bool = True) -> Experiment:
  """An experiment with the changes of the parsed command line, checked.

  `train` is as for `run`.
  """
  config = typed.as_config(cfg)
  _override(config)
  return resolve(config, train=train)


def _override(config: ml_collections.ConfigDict) -> None:
  values = config_flags.get_override_values(flags.FLAGS["config"])
  with config.unlocked():
    for key, value in values.items():
      *sections, name = key.split(".")
      functools.reduce(getattr, sections, config)[name] = value


def _run_name(json_path: str | None) -> str:
  """The name of the config's file, and of the variant if there is one."""
  if json_path:
    return pathlib.Path(json_path).stem
  path, _, variant = config_flags.get_config_filename(
      flags.FLAGS["config"]).partition(":")
  return "_".join(filter(None, (pathlib.Path(path).stem, variant)))


def _with_shipped_config(argv: list[str]) -> list[str]:
  """The command line with the path of a config that the package has."""
  found = list(argv)
  for i, arg in enumerate(argv[1:], 1):
    flag, equals, value = arg.partition("=")
    if flag in ("--config", "-config") and equals:
      found[i] = f"{flag}={shipped.find(value)}"
    elif argv[i - 1] in ("--config", "-config"):
      found[i] = shipped.find(arg)
  return found


def _check_overrides() -> list[str]:
  """Checks the keys of the overrides, before the config is loaded.

  Returns:
    The optional keys that are set to None, which ml_collections cannot do;
    their overrides are removed from sys.argv.
  """
  known, optional = typed.keys(), typed.optional_keys()
  rest, cleared = sys.argv[:1], []
  for arg in sys.argv[1:]:
    match = _OVERRIDE.fullmatch(arg)
    key, value = match.groups() if match else (None, None)
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
      raise errors.ConfigError(f"config.{key}: is a section; set one of its "
                               f"keys, e.g. config.{inside[0]}")
    # A task of the user's own has keys that are not known here.
    if key is not None and key not in known and not key.startswith("task."):
      raise errors.ConfigError(
          f"config.{key}: no such key{typed.did_you_mean(key)}")
    if key in optional and value == "None":
      cleared.append(key)
    else:
      rest.append(arg)
  sys.argv = rest
  return cleared


def given(flag: str) -> list[str]:
  """The values of a flag, --flag=VALUE or --flag VALUE.

  The command line can only be parsed once the config's keys are known.
  """
  line = "\n".join([*sys.argv[1:], ""])
  return re.findall(rf"^--?{flag}[=\n](.*)\n", line, re.MULTILINE)


def _read_json(otherwise: Otherwise) -> str | None:
  """Reads the file of --config_json into the flag `config`.

  Args:
    otherwise: as for `run`; what it gives is read like such a file.

  Returns:
    Its path; None if the config is not read from JSON.
  """
  paths = given("config_json")
  if not paths and not given("config"):
    cfg, path = otherwise(), "config.json"
    config = cfg and typed.as_config(cfg)
  elif not paths:
    return None
  elif len(paths) > 1 or given("config"):
    raise errors.ConfigError(
        "--config_json: cannot be combined with another config; give one")
  else:
    path = paths[0]
    config = saved.read_json(pathlib.Path(path), allowed())
  if config is None:
    return None
  delattr(flags.FLAGS, "config")
  config_flags.DEFINE_config_dict("config", config)
  return path


def _load(json_path: str | None) -> ml_collections.ConfigDict:
  """Parses the flags, which runs the config file and applies the overrides."""
  missing = ("--config: is missing; give e.g. --config=configs/quickstart.py, "
             "or --config_json")
  try:
    rest = flags.FLAGS(sys.argv)
    config = _CONFIG.value
    getattr(config, "items", None)  # A file that failed to load raises.
  except flags.IllegalFlagValueError as e:
    cause = e.__context__
    if str(e).startswith("flag --config="):
      # ml_collections raises again, with a traceback as the message.
      raise errors.ConfigError(
          explain.config_file(cause.__context__ or cause)) from e
    raise errors.ConfigError(explain.value(str(e), str(cause))) from e
  except flags.Error as e:
    if "config." in str(e) and not any(
        re.match(r"--?config(_json)?(=|$)", arg) for arg in sys.argv):
      raise errors.ConfigError(missing) from e  # No override is known then.
    raise errors.ConfigError(f"command line: {e}; see --help") from e
  except KeyboardInterrupt:
    raise
  except BaseException as e:  # The file is a program.
    raise errors.ConfigError(explain.config_file(e)) from e
  if len(rest) > 1:
    raise errors.ConfigError(
        f"command line: {rest[1]!r} is not a flag; write --flag=value")
  if not (flags.FLAGS["config"].present or json_path):
    raise errors.ConfigError(missing)
  if isinstance(config, dict):
    config = ml_collections.ConfigDict(config)
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.ConfigError("--config: get_config() of the file returned "
                             f"{config!r}, not a ConfigDict")
  return config


def start_jax(cfg: Experiment):
  """Starts jax with the processes of the command line; returns the mesh.

  Raises:
    ConfigError: the mesh does not fit the devices, a flag is wrong, or the
      processes differ in what they are to run.
    WorkerLostError: a process did not start.
  """
  from metaformer_jax.runtime import devices  # noqa: PLC0415  Imports jax.

  if not flags.FLAGS.is_parsed():  # Tools with an argument parser run alone.
    return devices.start_jax(cfg, process_count=1)
  return devices.start_jax(cfg, _COORDINATOR.value, _PROCESS_COUNT.value,
                           _PROCESS_INDEX.value)


def start(cfg: Experiment, mesh=None, workdir: pathlib.Path | None = None):
  """Starts jax, imports what is the user's own, and fills in derived values.

  Args:
    cfg: the experiment.
    mesh: of `start_jax`, if jax was started before.
    workdir: of the run, which all processes share.

  Returns:
    The experiment with all derived values, its task, and the mesh.

  Raises:
    ConfigError: as `start_jax` and `tasks.create`, on all processes; or they
      have another workdir, or have found different values.
    WorkerLostError: a process did not start.
  """
  mesh = mesh or start_jax(cfg)
  from metaformer_jax import tasks  # noqa: PLC0415
  from metaformer_jax.runtime import agreement, processes  # noqa: PLC0415

  with processes.agreeing():
    cfg, task = tasks.create(cfg)
  processes.require_same(lambda: {
      **agreement.of_experiment(cfg),
      "--workdir": workdir and str(workdir.absolute())})
  return cfg, task, mesh


def _help(module: types.ModuleType) -> str:
  """An entry point's flags, and every key of a config with its meaning."""
  name = module.__spec__.name if module.__spec__ else module.__name__
  lines = [f"usage: {command.program(name)} [--flag=value ...]", "",
           (module.__doc__ or "").strip(), "", "Flags:"]
  lines += [f"  --{flag.name}  {flag.help}" for where in (__name__, module)
            for flag in flags.FLAGS.get_key_flags_for_module(where)]
  lines += ["", "Keys of a config, and their defaults:"]
  lines += [f"  --config.{line}" for line in typed.describe()]
  return "\n".join(lines)


def _check_workdir(value: str) -> pathlib.Path:
  """Checks that a run can write to the folder; creates nothing."""
  workdir = paths.given("--workdir", value)
  workdir_lib.check_path(workdir)
  if storage.is_remote(workdir):
    return workdir
  parent = paths.existing_parent(workdir)
  if not parent.is_dir():
    raise errors.ConfigError(f"--workdir: {parent} is a file, not a folder")
  if not os.access(parent, os.W_OK):
    raise errors.ConfigError(f"--workdir: {parent} is not writable")
  return workdir
