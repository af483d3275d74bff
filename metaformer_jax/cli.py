"""What every entry point does first: flags, config, one-line errors, exit code.

An entry point is

    if __name__ == "__main__":
      cli.run(main)

with `main(cfg, workdir)` called once the configuration is known to be good.
Nothing here imports jax: a mistake in a config is told at once.
"""

import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from metaformer_jax import config as config_lib
from metaformer_jax import errors
from metaformer_jax.experiment import Experiment

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, e.g. configs/quickstart.py; "
    "--config.section.key=value overrides one value.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, curves; a run "
    "that it holds is resumed. Default: runs/NAME_OF_THE_CONFIG.")

# What an override looks like on the command line: key, and value if attached.
_OVERRIDE = re.compile(r"--?config\.([^=\s]+)(?:=(.*))?", re.DOTALL)


def run(main: Callable[[Experiment, pathlib.Path], None]) -> None:
  """Parses the command line, runs `main` and ends the process."""
  try:
    cfg, workdir = parse(sys.argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("metaformer_jax").setLevel(logging.INFO)
    main(cfg, workdir)
  except errors.UserError as e:
    one_line = " ".join(str(e).split())
    print(f"{type(e).__name__}: {one_line}", file=sys.stderr, flush=True)
    sys.exit(e.exit_code)


def parse(argv: Sequence[str]) -> tuple[Experiment, pathlib.Path]:
  """Returns the experiment and its workdir; ConfigError says what is wrong."""
  known = set(config_lib.keys())
  for arg in argv[1:]:
    if arg in ("--help", "-help", "-h"):
      print(_help())
      sys.exit(0)
    match = _OVERRIDE.fullmatch(arg)
    if match and any(key.startswith(match[1] + ".") for key in known):
      raise errors.ConfigError(
          f"config.{match[1]}: is a section; set one of its keys, e.g. "
          f"config.{min(k for k in known if k.startswith(match[1] + '.'))}")
    if match and match[1] not in known:
      raise errors.ConfigError(f"config.{match[1]}: no such key" +
                               errors.did_you_mean(match[1], known))
  try:
    rest = flags.FLAGS(list(argv))
    config = _CONFIG.value
    if config is not None:
      config = dict(config.items())  # A file that failed to load raises here.
  except flags.IllegalFlagValueError as e:
    raise errors.ConfigError(_explain_value(str(e))) from e
  except flags.Error as e:
    raise errors.ConfigError(f"command line: {e}; see --help") from e
  except Exception as e:  # The config file is a program: it may raise anything.
    raise errors.ConfigError(_explain_file(argv, e)) from e
  if len(rest) > 1:
    raise errors.ConfigError(
        f"command line: {rest[1]!r} is not a flag; write --flag=value")
  if config is None:
    raise errors.ConfigError(
        "--config: " + (
            "get_config() of the file returned None"
            if flags.FLAGS["config"].present else
            "is missing; give e.g. --config=configs/quickstart.py"))
  name = pathlib.Path(config_flags.get_config_filename(
      flags.FLAGS["config"]).partition(":")[0]).stem
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / name)
  return config_lib.resolve(_CONFIG.value), _check_workdir(workdir)


def start_jax(cfg: Experiment):
  """Sets up jax; returns the mesh. ConfigError: the devices do not fit."""
  import jax  # noqa: PLC0415  After the config is checked.

  from metaformer_jax.training import sharding  # noqa: PLC0415

  folder = cfg.log.compilation_cache
  if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
  return sharding.make_mesh(cfg)


def _help() -> str:
  """The flags, and every key of a config with its default and meaning."""
  lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
  lines += [f"  --{flag.name}  {flag.help}"
            for flag in flags.FLAGS.get_key_flags_for_module(__name__)]
  lines += [f"  --{flag.name}  {flag.help}" for flag in
            flags.FLAGS.get_key_flags_for_module(sys.modules["__main__"])]
  lines += ["", "Keys of a config, and their defaults:"]
  lines += [f"  --config.{line}" for line in config_lib.describe()]
  return "\n".join(lines)


def _explain_value(message: str) -> str:
  """'flag --config.a.b=x: reason' -> "config.a.b: 'x': reason"."""
  match = re.match(r"flag --([^=\s]+)=(.*?): (.*)", message, re.DOTALL)
  if not match:
    return message
  key, value, reason = match.groups()
  return f"{key}: {value!r} is not valid: {reason}"


def _explain_file(argv: Sequence[str], error: Exception) -> str:
  """Why the config file cannot be loaded: the last line of what it raised."""
  path = next((b.partition("=")[2] if "=" in b else a for a, b in
               zip([*argv[1:], ""], argv) if b.split("=")[0].lstrip("-")
               == "config"), "")
  file = pathlib.Path(path.partition(":")[0])
  if not file.is_file():
    near = ""
    if file.parent.is_dir():
      near = errors.did_you_mean(
          file.name, [p.name for p in file.parent.glob("*.py")])
    return f"--config: {file} is not a file{near}"
  lines = [line for line in str(error).splitlines() if line.strip()]
  reason = lines[-1].strip() if lines else ""
  if not re.match(r"[\w.]*(Error|Exception|Interrupt)\b", reason):
    reason = f"{type(error).__name__}: {reason}"
  return f"{file}: {reason}"


def _check_workdir(workdir: pathlib.Path) -> pathlib.Path:
  """Whether a run can write there; nothing is made yet."""
  workdir = workdir.expanduser()
  if "://" in str(workdir):
    raise errors.ConfigError(
        f"--workdir: {workdir} is not a local folder, which runs need so far")
  parent = workdir
  while not parent.exists():
    parent = parent.parent
  if not parent.is_dir():
    raise errors.ConfigError(f"--workdir: {parent} is a file, not a folder")
  if not os.access(parent, os.W_OK):
    raise errors.ConfigError(f"--workdir: {parent} is not writable")
  return workdir
