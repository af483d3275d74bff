"""stdout and stderr that are closed, full, or no longer read."""

import os
import subprocess
import sys

import command_line
import pytest

CODE = """
import contextlib, logging, os, sys, tqdm
from metaformer_jax import command, errors
with command.one_line_errors():
  command.start_logging()
  with open("result", "w") as file:
    logging.getLogger("metaformer_jax").warning("%s", "w" * 10**5)
    for _ in tqdm.tqdm(range(3), ncols=70):
      pass
    with contextlib.suppress(OSError):
      os.write(2, b"from a library\\n")  # As one in C.
    print("x" * int(sys.argv[1]))
    if len(sys.argv) > 2:
      raise errors.ConfigError("y" * 10**7 + " end")
    file.write("done")
"""


@pytest.fixture
def run(tmp_path):
  """Runs the program in a shell: (exit code, stdout, stderr, result)."""

  def run(redirection, n=10, *args):
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "${{@:2}}" {redirection}; '
         "exit ${PIPESTATUS[0]}", sys.executable, CODE, str(n), *args],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(command_line.ROOT),
                          "PYTHONUNBUFFERED": ""})
    result = (tmp_path / "result").read_text()
    return done.returncode, done.stdout, done.stderr, result

  return run


def test_long_lines_of_the_log_and_of_errors_are_cut(run):
  code, out, err, result = run("", 10, "fail")
  assert (code, out, result) == (2, "x" * 10 + "\n", "")
  assert len(err) < 13_000 and err.endswith("y end\n")
  assert "... (94000 more characters) ..." in err
  assert "... (9994004 more characters) ..." in err


@pytest.mark.parametrize("redirection", [
    "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "2> >(true)"])
def test_messages_that_cannot_be_written_change_nothing(run, redirection):
  code, _, err, result = run(redirection)
  assert (code, err, result) == (0, "", "done")


def test_a_failure_without_stderr_has_its_exit_code(run):
  assert run("2>&-", 10, "fail") == (2, "x" * 10 + "\n", "", "")


@pytest.mark.parametrize("n", [10, 10**6])  # Written at the end, or before.
def test_a_full_stdout_is_one_line(run, n):
  code, _, err, result = run(">/dev/full", n)
  assert code == 1 and (result == "done") == (n == 10)
  assert err.endswith(
      "\nStorageError: stdout: cannot be written: No space left on device\n")
  assert "Traceback" not in err and "Exception ignored" not in err


@pytest.mark.parametrize("n", [10, 10**6])
def test_a_reader_that_ends_is_no_message(run, n):
  code, _, err, _ = run("| true", n)
  assert code in (0, 1)
  assert "Error" not in err and "Exception ignored" not in err
