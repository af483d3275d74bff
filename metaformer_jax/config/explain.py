"""Why a config on the command line cannot be loaded, in one line."""

import os
import pathlib
import re
import sys

from metaformer_jax import errors
from metaformer_jax.config import shipped, typed


def value(message: str, reason: str) -> str:
  """'flag --config.a.b=x: reason' -> "config.a.b: 'x': reason"."""
  match = re.fullmatch(r"flag --([^=]+)=(.*)",
                       message.removesuffix(f": {reason}"), re.DOTALL)
  if not match:
    return message
  key, value = match.groups()
  return f"{key}: {value!r} is not valid: {reason}"


def config_file(error: BaseException) -> str:
  """Why the config file cannot be loaded: it is missing, or it raised."""
  # --config=PATH or --config PATH; the flag itself may not be parsed yet.
  line = "\n".join([*sys.argv[1:], ""])
  path = re.search(r"^--?config[=\n](.*)\n", line, re.MULTILINE)[1]
  file = pathlib.Path(path.partition(":")[0])
  if file.is_dir():
    return f"--config: {file} is not a file; give e.g. configs/quickstart.py"
  if not file.is_file():
    near = f"; the working directory is {os.getcwd()}"
    ours = pathlib.Path(shipped.FOLDER.name)
    if file.parent == ours or file.parent.is_dir():
      near = errors.did_you_mean(file.stem, [
          *(str(p) for p in file.parent.glob("*.py") if p.is_file()),
          *(str(ours / p.name) for folder in (ours, shipped.FOLDER)
            for p in folder.glob("*.py") if p.is_file())],
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
