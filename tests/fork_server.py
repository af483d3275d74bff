"""Starts training runs without importing anything again.

A program: it reads arguments of `metaformer_jax.main` as a JSON list a line,
forks a process that runs them, with stderr in the file of the first one, and
writes its pid; "wait PID" writes its exit code, negative for a signal.
"""

import importlib
import json
import os
import sys

for name in ("matplotlib.figure", "metaformer_jax.tasks.classification",
             "metaformer_jax.training.loop", "sklearn.datasets"):
  importlib.import_module(name)

from metaformer_jax import cli, main  # noqa: E402  After what is slow.


def start(stderr: str, arguments: list[str]) -> int:
  """Forks; in the child, runs to the end and does not return."""
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["metaformer_jax.main", *arguments]
    cli.run(main.main)
    code = 0
  except SystemExit as e:
    code = e.code
  finally:
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
  for line in sys.stdin:
    if line.startswith("wait"):
      _, status = os.waitpid(int(line.split()[1]), 0)
      print(os.waitstatus_to_exitcode(status), flush=True)
    else:
      print(start(*json.loads(line)), flush=True)
