"""Runs command lines of the entry point, many per second.

absl's flags are global, and starting a process takes half a second: `fork` runs
each line in a fork of one process that has imported the entry point.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import traceback

from metaformer_jax import cli
from metaformer_jax.data import sources  # noqa: F401  Imported once for all.

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class Result:
  """How a command line ended, what it wrote, and its processor time."""

  code: int
  out: str
  err: str
  seconds: float


def python(args, cwd=ROOT, environment=None, **kwargs):
  """Runs Python with the package on its path."""
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  env = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
  env |= environment or {}
  return subprocess.run([sys.executable, *args], cwd=cwd, env=env, text=True,
                        capture_output=True, timeout=120, **kwargs)


def run(argv: list[str]) -> Result:
  """Runs the entry point as a user does."""
  start = _children_seconds()
  done = python(["-m", "metaformer_jax.main", *argv])
  return Result(done.returncode, done.stdout, done.stderr,
                _children_seconds() - start)


def _children_seconds() -> float:
  """Processor time of finished children; others may use the machine, too."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def fork(lines: list[list[str]]) -> list[Result]:
  """Runs each argv in a fork; a valid one prints (experiment, workdir)."""
  done = python([__file__], input=json.dumps(lines))
  assert not done.returncode, done.stderr
  return [Result(*result) for result in json.loads(done.stdout)]


def check_refused(result: Result) -> None:
  """A mistake is one line on stderr, exit code 2, in under two seconds."""
  assert result.code == 2, result
  assert result.out == ""
  assert result.err.startswith("ConfigError: "), result.err
  assert result.err.endswith("\n")
  assert result.err[:-1].isprintable(), result.err  # So it is one line.
  assert "Traceback" not in result.err, result.err
  assert result.seconds < 2, result


def _serve() -> None:
  """Runs each argv of the JSON list on stdin in a fork; prints Results."""
  results = []
  for argv in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
      pid = os.fork()
      if not pid:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        _run(argv)
      _, status, usage = os.wait4(pid, 0)
      # Processor time, as other tests may run at the same time.
      seconds = usage.ru_utime + usage.ru_stime
      out.seek(0)
      err.seek(0)
      results.append((os.waitstatus_to_exitcode(status), out.read().decode(),
                      err.read().decode(), seconds))
  json.dump(results, sys.stdout)


def _run(argv: list[str]) -> None:
  """Ends the process as the entry point does; prints what it would run."""
  code = 1
  try:
    sys.argv = ["main.py", *argv]
    cli.run(lambda cfg, workdir: print((dataclasses.asdict(cfg), str(workdir))))
    code = 0
  except SystemExit as e:
    code = e.code if isinstance(e.code, int) else 1
  except BaseException:
    traceback.print_exc()
  finally:
    if "jax" in sys.modules:
      code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
  _serve()
