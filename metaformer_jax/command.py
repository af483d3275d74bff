"""What all command lines share: their parser, one-line errors, exit codes.

It needs only Python's own library, unlike `cli`, which reads experiments.
"""

import argparse
import contextlib
import logging
import pathlib
import sys
from typing import Any

from metaformer_jax import errors
from metaformer_jax.runtime import signals, streams


def start_logging() -> None:
  """Shows the package's log on stderr."""
  # Imported libraries may have configured logging.
  logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
  logging.getLogger("metaformer_jax").setLevel(logging.INFO)


class Parser(argparse.ArgumentParser):
  """The argument parser of tools: its errors are one line."""

  def __init__(self, doc: str, module: str, **kwargs: Any):
    """Takes the docstring and the name of the tool's module."""
    super().__init__(prog=program(f"metaformer_jax.tools.{module}"),
                     description=doc,
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     **kwargs)

  def error(self, message: str):
    raise errors.ConfigError(f"command line: {message}; see --help")


def own_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
  """A tool's own arguments, where the others are those of an experiment.

  They are taken out of `sys.argv`, which `cli.parse` then reads. The parser
  must not take abbreviations, as --config would be one of --configs.
  """
  args, rest = parser.parse_known_args()
  sys.argv = [sys.argv[0], *rest]
  return args


def positive(text: str) -> int:
  """The type of an argument that is a positive integer."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
  return int(text)


def program(module: str) -> str:
  """How a module was started: by its console command, or by `python -m`."""
  name = pathlib.Path(sys.argv[0]).name
  return name if name.startswith("metaformer-") else f"python -m {module}"


@contextlib.contextmanager
def one_line_errors():
  """Turns a `UserError` into one line on stderr and its exit code.

  SIGTERM and Ctrl-C are one line, too, and end the process soon, unless a run
  has something to save.
  """
  with streams.guarded(), signals.ending():
    try:
      with streams.flushing():
        yield
    except errors.UserError as e:
      print(f"{type(e).__name__}: {errors.one_line(e)}", file=sys.stderr,
            flush=True)
      sys.exit(e.exit_code)
    except KeyboardInterrupt:  # `ending` has said it.
      sys.exit(errors.Preempted.exit_code)
    except BrokenPipeError:  # The reader of stdout has ended, as of `| head`.
      sys.exit(1)
