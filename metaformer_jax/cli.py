"""What all entry points share: flags, config, one-line errors, exit codes.

An entry point is

    def console():
      cli.run(main)

    if __name__ == "__main__":
      console()

where `main(cfg, workdir)` gets a checked configuration; setup.py names some of
these functions as console commands. Nothing here imports jax, so that a mistake
in a config is reported at once.
"""

import argparse
import contextlib
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

from metaformer_jax import errors
from metaformer_jax.config import own, paths, saved, typed
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import signals
from metaformer_jax.runtime import workdir as workdir_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, e.g. configs/quickstart.py; "
    "--config.section.key=value overrides one value.", lock_config=True)
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


def run(main: Callable[[Experiment, pathlib.Path], None], *,
        elsewhere: bool = False, of_run: bool = False) -> None:
  """Parses the command line, runs `main` and ends the process.

  Args:
    main: called with the experiment and the workdir.
    elsewhere: whether the experiment is for another machine, so that the data,
      the weights and the workdir need not exist on this one.
    of_run: whether the experiment is that of the workdir's run if the command
      line names no config.
  """
  with one_line_errors():
    cfg, workdir = parse(elsewhere, of_run, main.__module__)
    start_logging()
    main(cfg, workdir)


def start_logging() -> None:
  """Shows the package's log on stderr."""
  # Imported libraries may have configured logging.
  logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
  logging.getLogger("metaformer_jax").setLevel(logging.INFO)


class Parser(argparse.ArgumentParser):
  """The argument parser of tools without an experiment: one-line errors."""

  def __init__(self, doc: str, module: str):
    """Takes the docstring and the name of the tool's module."""
    super().__init__(prog=_program(f"metaformer_jax.tools.{module}"),
                     description=doc,
                     formatter_class=argparse.RawDescriptionHelpFormatter)

  def error(self, message: str):
    raise errors.ConfigError(f"command line: {message}; see --help")


def _program(module: str) -> str:
  """How the program was started: by a console command, or as a module."""
  name = pathlib.Path(sys.argv[0]).name
  return name if name.startswith("metaformer-") else f"python -m {module}"


@contextlib.contextmanager
def one_line_errors():
  """Turns a `UserError` into one line on stderr and its exit code.

  SIGTERM and Ctrl-C are one line, too, and end the process soon, unless a run
  has something to save.
  """
  with signals.ending():
    try:
      yield
    except errors.UserError as e:
      print(f"{type(e).__name__}: {errors.one_line(e)}", file=sys.stderr,
            flush=True)
      sys.exit(e.exit_code)


def resolve(config: Mapping[str, Any], files: bool = True) -> Experiment:
  """`config.resolve.resolve`, with the checks of the data's sources."""
  return config_lib.resolve(config, files, also=_check_data,
                            allowed=_allowed())


def _allowed() -> list[str]:
  """The modules of --allow_import."""
  # Tools with an argument parser, and notebooks, do not parse the flags.
  return _ALLOW_IMPORT.value if flags.FLAGS.is_parsed() else []


def _check_data(cfg: Experiment, files: bool) -> Iterable[str]:
  # Imports NumPy, which a mistake in a single value need not wait for.
  from metaformer_jax.data import sources  # noqa: PLC0415

  return sources.check(cfg, files)


def parse(elsewhere: bool = False, of_run: bool = False,
          module: str = "__main__") -> tuple[Experiment, pathlib.Path]:
  """Returns the experiment and the workdir of the command line.

  Args:
    elsewhere: as for `run`.
    of_run: as for `run`.
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
  cleared = _check_overrides()
  json_path = _read_json(of_run)
  config = _load(json_path)
  logging.getLogger("absl").setLevel(logging.WARNING)
  with config.unlocked():
    for key in cleared:
      *sections, name = key.split(".")
      functools.reduce(getattr, sections, config)[name] = None
  if _WORKDIR.value == "":
    raise errors.ConfigError("--workdir: is empty; name a folder")
  workdir = _WORKDIR.value or os.path.join("runs", _run_name(json_path))
  cfg = resolve(config, files=not elsewhere)
  return cfg, pathlib.Path(workdir) if elsewhere else _check_workdir(workdir)


def _run_name(json_path: str | None) -> str:
  """The name of the config's file, and of the variant if there is one."""
  if json_path:
    return pathlib.Path(json_path).stem
  path, _, variant = config_flags.get_config_filename(
      flags.FLAGS["config"]).partition(":")
  return "_".join(filter(None, (pathlib.Path(path).stem, variant)))


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


def _given(flag: str) -> list[str]:
  """The values of a flag, --flag=VALUE or --flag VALUE.

  The command line can only be parsed once the config's keys are known.
  """
  line = "\n".join([*sys.argv[1:], ""])
  return re.findall(rf"^--?{flag}[=\n](.*)\n", line, re.MULTILINE)


def _read_json(of_run: bool) -> str | None:
  """Reads the file of --config_json into the flag `config`.

  Args:
    of_run: whether to read the config.json of --workdir without such a flag.

  Returns:
    Its path; None if the config is not read from JSON.
  """
  paths, allowed = _given("config_json"), ",".join(_given("allow_import"))
  if of_run and not paths and not _given("config") and _given("workdir"):
    workdir = pathlib.Path(_given("workdir")[0]).expanduser()
    config = typed.as_config(saved.read_run(workdir, allowed))
    config.init = None  # The run has read it.
    delattr(flags.FLAGS, "config")
    config_flags.DEFINE_config_dict("config", config)
    return str(workdir / "config.json")
  if not paths:
    return None
  if len(paths) > 1 or _given("config"):
    raise errors.ConfigError(
        "--config_json: cannot be combined with another config; give one")
  config = saved.read_json(pathlib.Path(paths[0]), allowed)
  delattr(flags.FLAGS, "config")
  config_flags.DEFINE_config_dict("config", config)
  return paths[0]


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
          _explain_file(cause.__context__ or cause)) from e
    raise errors.ConfigError(_explain_value(str(e), str(cause))) from e
  except flags.Error as e:
    if "config." in str(e) and not any(
        re.match(r"--?config(_json)?(=|$)", arg) for arg in sys.argv):
      raise errors.ConfigError(missing) from e  # No override is known then.
    raise errors.ConfigError(f"command line: {e}; see --help") from e
  except KeyboardInterrupt:
    raise
  except BaseException as e:  # The file is a program.
    raise errors.ConfigError(_explain_file(e)) from e
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
    ConfigError: the mesh does not fit the devices, or a flag is wrong.
    WorkerLostError: a process did not start.
  """
  from metaformer_jax.runtime import devices  # noqa: PLC0415  Imports jax.

  if not flags.FLAGS.is_parsed():  # Tools with an argument parser run alone.
    return devices.start_jax(cfg, process_count=1)
  return devices.start_jax(cfg, _COORDINATOR.value, _PROCESS_COUNT.value,
                           _PROCESS_INDEX.value)


def start(cfg: Experiment):
  """Starts jax, imports what is the user's own, and fills in derived values.

  Returns:
    The experiment with all derived values, its task, and the mesh.

  Raises:
    ConfigError: as `start_jax` and `tasks.create`, on all processes; or they
      have found different values.
    WorkerLostError: a process did not start.
  """
  mesh = start_jax(cfg)
  from metaformer_jax import tasks  # noqa: PLC0415
  from metaformer_jax.runtime import processes  # noqa: PLC0415

  with processes.agreeing():
    cfg, task = tasks.create(cfg)
  processes.require_same(own.fingerprints(cfg))
  return cfg, task, mesh


def _help(module: types.ModuleType) -> str:
  """An entry point's flags, and every key of a config with its meaning."""
  name = module.__spec__.name if module.__spec__ else module.__name__
  lines = [f"usage: {_program(name)} [--flag=value ...]", "",
           (module.__doc__ or "").strip(), "", "Flags:"]
  lines += [f"  --{flag.name}  {flag.help}" for where in (__name__, module)
            for flag in flags.FLAGS.get_key_flags_for_module(where)]
  lines += ["", "Keys of a config, and their defaults:"]
  lines += [f"  --config.{line}" for line in typed.describe()]
  return "\n".join(lines)


def _explain_value(message: str, reason: str) -> str:
  """'flag --config.a.b=x: reason' -> "config.a.b: 'x': reason"."""
  match = re.fullmatch(r"flag --([^=]+)=(.*)",
                       message.removesuffix(f": {reason}"), re.DOTALL)
  if not match:
    return message
  key, value = match.groups()
  return f"{key}: {value!r} is not valid: {reason}"


def _explain_file(error: BaseException) -> str:
  """Why the config file cannot be loaded: it is missing, or it raised."""
  # --config=PATH or --config PATH; the flag itself may not be parsed yet.
  line = "\n".join([*sys.argv[1:], ""])
  path = re.search(r"^--?config[=\n](.*)\n", line, re.MULTILINE)[1]
  file = pathlib.Path(path.partition(":")[0])
  if file.is_dir():
    return f"--config: {file} is not a file; give e.g. configs/quickstart.py"
  if not file.is_file():
    near = f"; the working directory is {os.getcwd()}"
    if file.parent.is_dir():
      near = errors.did_you_mean(file.stem, [
          str(p) for where in {file.parent, pathlib.Path("configs")}
          for p in where.glob("*.py") if p.is_file()],
          by=lambda path: pathlib.Path(path).stem)
    return f"--config: {file} is not a file{near}"
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]  # As ml_collections wraps a KeyError.
  try:
    reason = str(error.args[0] if isinstance(error, KeyError) else error)
  except Exception:  # The file may define the exception's class.
    reason = ""
  if isinstance(error, errors.UserError):
    return f"{file}: {reason}"
  # Of an override, which ml_collections looks up; it suggests one of its own.
  name = re.split(r"\W", reason.lstrip("'"), maxsplit=1)[0]
  if isinstance(error, KeyError) and any(
      arg.startswith(f"--config.task.{name}=") for arg in sys.argv):
    key = f"task.{name}"
    return f"config.{key}: no such key{typed.did_you_mean(key)}"
  if not re.match(r"[\w.]*(Error|Exception|Interrupt)\b", reason):
    reason = f"{type(error).__name__}: {reason}"
  return f"{file}: {reason}"


def _check_workdir(value: str) -> pathlib.Path:
  """Checks that a run can write to the folder; creates nothing."""
  if "://" in value:
    raise errors.ConfigError(
        f"--workdir: {value} is not a local folder; runs need one")
  workdir = paths.local("--workdir", value)
  workdir_lib.check_path(workdir)
  parent = paths.existing_parent(workdir)
  if not parent.is_dir():
    raise errors.ConfigError(f"--workdir: {parent} is a file, not a folder")
  if not os.access(parent, os.W_OK):
    raise errors.ConfigError(f"--workdir: {parent} is not writable")
  return workdir
