"""Data runs no code, writes nothing, and takes no more memory than it has.

Each file of malicious_files.py is read in a process of its own, forked from one
that has imported the readers. An audit hook tells what Python is asked to do
there; memory is limited to `ROOM` beyond what the imports took.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import traceback

import command_line
import malicious_files
import pytest
from PIL import Image

from metaformer_jax.checkpoints import manifest
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import saved
from metaformer_jax.convert import files
from metaformer_jax.data import images
from metaformer_jax.data.sources import coco_json

ROOM = 2**29

LOADERS = {
    "weights": files.read_tensors,
    "config": lambda path: config_lib.resolve(
        saved.read_json(pathlib.Path(path))),
    "step": lambda path: manifest.verify(pathlib.Path(path)),
    "coco": lambda path: coco_json.read(pathlib.Path(path), with_outlines=True),
    "picture": lambda path: images.decode(pathlib.Path(path).read_bytes()),
}
# Malicious but harmless: a name is never used as a path, and of two tensors
# with one name the last one counts.
HARMLESS = {"path", "one name"}

# Audit events of docs.python.org that reading data never needs.
FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "pickle.", "ctypes.",
             "exec", "compile", "import", "code.", "marshal.", "tempfile.")
ALLOWED = ("os.listdir", "os.scandir")


def watch(events: list[str]) -> None:
  """Notes what the process is asked to do from now on."""

  def hook(event, args):
    writes = event == "open" and not (
        args[1] in ("r", "rb") or args[2] & (os.O_WRONLY | os.O_RDWR) == 0)
    if writes or (event.startswith(FORBIDDEN) and event not in ALLOWED):
      events.append(f"{event} {args}"[:300])

  sys.addaudithook(hook)


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
  return tmp_path_factory.mktemp("canary") / "touched"


@pytest.fixture(scope="module")
def results(tmp_path_factory, canary):
  """{(loader, path): what the reading came to}."""
  folder = tmp_path_factory.mktemp("malicious")
  made = malicious_files.make(folder, canary)
  before = listing(folder)
  done = command_line.python([__file__], cwd=folder, input=json.dumps(made))
  assert done.returncode == 0, done.stderr
  assert listing(folder) == before
  return dict(zip(map(tuple, made), json.loads(done.stdout)))


def listing(folder):
  return sorted((str(p), p.lstat().st_size) for p in folder.rglob("*"))


def test_nothing_is_run_or_written(results, canary):
  assert len(results) > 120
  for case, result in results.items():
    assert result["events"] == [], case
  assert list(canary.parent.iterdir()) == []


def test_what_is_refused_is_told_in_one_line(results):
  assert {pathlib.Path(path).stem for (_, path), result in results.items()
          if not result["error"]} == HARMLESS
  for (kind, path), result in results.items():
    if not result["error"] or kind == "picture":  # A bad image is replaced.
      continue
    assert result["error"] == {
        "weights": "WeightsError", "config": "ConfigError",
        "coco": "ConfigError", "step": "DamagedError"}[kind], (path, result)
    message = result["message"]
    assert len(message.splitlines()) == 1 and len(message) < 1000, path
    assert result["seconds"] < 5, (path, result)


def test_memory_is_bounded(results):
  for case, result in results.items():
    assert result["error"] != "MemoryError", case
    assert result["bytes"] < ROOM, (case, result)


def test_the_payloads_would_work(tmp_path):
  """On a reader that trusts them; else nothing above would mean anything."""
  canary = tmp_path / "touched"
  made = malicious_files.make(tmp_path, canary)
  path, = (path for _, path in made if "/pickle." in path)
  code = f"import pickle; pickle.load(open({path!r}, 'rb'))"
  subprocess.run([sys.executable, "-c", code], check=True)
  assert canary.exists()


CODE = (
    "__import__('os').system('touch {}')", "open('{}', 'w')",
    "[open('{}', 'w') for _ in (1,)]", "(lambda: open('{}', 'w'))()",
    "{{**{{1: open('{}', 'w')}}}}", "f'{{open(\"{}\", \"w\")}}'",
    "!!python/object/apply:os.system ['touch {}']", "$(touch {})",
    "`touch {}`")


def test_overrides_are_literals(canary):
  """A value of each type."""
  lines = [["--config=configs/quickstart.py",
            f"--config.{key}={code.format(canary)}"] for code in CODE for key in
           ("seed", "optim.base_lr", "log.tensorboard", "data.name",
            "model.depths", "data.mean", "mesh.rules", "train.steps")]
  for (_, line), result in zip(lines, command_line.fork(lines)):
    key, _, value = line.partition("=")
    if key.endswith("name"):  # Any string will do; it stays one.
      assert repr(value) in result.out
    else:
      command_line.check_refused(result)
  assert list(canary.parent.iterdir()) == []


def _serve() -> None:
  """Reads each file of the list on stdin in a fork; prints what came of it."""
  results = []
  # Modules that the readers import on first use.
  "".encode("cp437")
  Image.init()
  for kind, path in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out:
      pid = os.fork()
      if not pid:
        try:
          out.write(json.dumps(_read(kind, path)).encode())
          out.flush()
        except BaseException:
          traceback.print_exc()
        os._exit(0)
      status = os.waitpid(pid, 0)[1]
      out.seek(0)
      written = out.read()
      if status or not written:
        sys.exit(f"{kind} {path}: {status}")
      results.append(json.loads(written))
  json.dump(results, sys.stdout)


def _read(kind: str, path: str) -> dict:
  """The error, if any, and what was done and taken until then."""
  events, error, message = [], None, ""
  taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = taken * resource.getpagesize() + ROOM
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
  before = resource.getrusage(resource.RUSAGE_SELF)
  watch(events)
  try:
    LOADERS[kind](path)
  except Exception as e:
    error, message = type(e).__name__, str(e)
  done = list(events)
  after = resource.getrusage(resource.RUSAGE_SELF)
  return {"events": done, "error": error, "message": message,
          "seconds": after.ru_utime - before.ru_utime,
          "bytes": 1024 * (after.ru_maxrss - before.ru_maxrss)}


if __name__ == "__main__":
  _serve()
