"""Steps on disk: interrupted anywhere, no step is lost or called complete."""

import itertools
import os
import random
import shutil
import sys

import pytest

from metaformer_jax.checkpoints import manifest, steps

FILES = {"params/d/0": b"kernel", "params/_METADATA": b"{}", "model/e": b""}


class Interrupted(BaseException):
  """The process ends; a BaseException, so that nothing tidies up."""


class Interruption:
  """Ends the process, as it were, before the nth change of the disk."""

  def __init__(self):
    self.left = None
    sys.addaudithook(self._hook)  # It stays, but does nothing outside `at`.

  def _hook(self, event, args):
    if self.left is None or not (
        event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir",
                  "shutil.rmtree")
        or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))):
      return
    self.left -= 1
    if self.left < 0:
      self.left = None
      raise Interrupted

  def at(self, n, function, *args):
    """Calls a function; returns whether it was interrupted at the nth."""
    self.left = n
    try:
      function(*args)
    except Interrupted:
      return True
    finally:
      self.left = None
    return False


@pytest.fixture(scope="module")
def interruption():
  return Interruption()


def fill(folder):
  """What Orbax writes, but small."""
  for name, content in FILES.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def save(folder, **facts):
  """The order of a save."""
  steps.begin(folder)
  fill(folder)
  manifest.write(folder, **{
      "step": int(folder.name), "record": {"position": 32}, "metrics": {},
      "data": {}, "tree": {"params/a": "float32[2]"}, **facts})
  steps.finish(folder)
  return folder


def restart(checkpoints):
  """What a start does; returns the intact steps."""
  for step in steps.survey(checkpoints, contents=True)[1]:
    steps.set_aside(checkpoints / str(step))
  steps.clean(checkpoints)
  good, bad = steps.survey(checkpoints, contents=True)
  assert not bad and not steps.unfinished(checkpoints)
  return sorted(good)


def content(folder):
  return {p.relative_to(folder).as_posix(): p.read_bytes()
          for p in folder.rglob("*") if p.is_file()}


def measure(folder):
  manifest.add_metrics(folder, {"top1": 0.5})


ACTIONS = {  # What is done to step 7, and whether it is there after and before.
    "save": (save, False, True), "measure": (measure, True, True),
    "remove": (steps.remove, True, False),
    "set aside": (steps.set_aside, True, False)}


@pytest.mark.parametrize("name", ACTIONS)
def test_interrupted_anywhere(tmp_path, interruption, name):
  """The step is as it was before or as it is after, and others are untouched.

  Nothing that is left keeps the run from saving the step again.
  """
  action, before, after = ACTIONS[name]
  other = content(save(tmp_path / "0" / "3"))
  for n in itertools.count():
    checkpoints = tmp_path / str(n)
    (checkpoints / "mine").mkdir(parents=True)
    (checkpoints / "3").exists() or save(checkpoints / "3")
    folder = checkpoints / "7"
    if before:
      save(folder)
    if not interruption.at(n, action, folder):
      break
    listed = sorted(steps.survey(checkpoints)[0])
    good = restart(checkpoints)
    assert good in ([3], [3, 7]) and listed == good
    assert name == "set aside" or not steps.damaged(checkpoints)
    assert content(checkpoints / "3").keys() == other.keys()
    assert (checkpoints / "mine").is_dir()
    if 7 in good:
      found = manifest.verify(folder)
      assert found.metrics in ({}, {"top1": 0.5})
      steps.remove(folder)
    manifest.verify(save(folder))
    if name == "set aside":  # Nothing of the step is lost.
      kept = [value for path in steps.damaged(checkpoints)
              for value in content(path).values()]
      assert not kept or {*FILES.values()} <= {*kept}
  assert n > {"save": 15, "measure": 1, "remove": 6, "set aside": 6}[name]
  assert sorted(steps.survey(tmp_path / str(n))[0]) == [3] + [7] * after


def test_any_order_of_what_a_run_does(tmp_path, interruption):
  """Many saves, measures, deletions and starts, half of them interrupted."""
  rng = random.Random(0)
  here, n_interrupted = {}, 0
  for step in range(150):
    name = rng.choice(["save", "save", "measure", "remove", "restart"])
    chosen = rng.choice([*here, None])
    if name == "restart" or (chosen is None and name != "save"):
      assert restart(tmp_path) == sorted(here)
      continue
    folder = tmp_path / str(step if name == "save" else chosen)
    action, _, after = ACTIONS[name]
    if not interruption.at(rng.randrange(40), action, folder):
      assert folder.exists() == after
    else:
      n_interrupted += 1
    good = restart(tmp_path)
    assert {*here} - {chosen} <= {*good} <= {*here, step}
    assert good == sorted(steps.survey(tmp_path)[0])
    here = dict.fromkeys(good)
  assert n_interrupted > 25 and not steps.damaged(tmp_path)


def test_set_aside_steps_are_numbered(tmp_path):
  for i in range(3):
    folder = save(tmp_path / "7")
    (folder / "model/e").write_text(str(i))
    steps.set_aside(folder)
  (tmp_path / "7").symlink_to("/etc")
  steps.set_aside(tmp_path / "7")
  assert [p.name for p in steps.damaged(tmp_path)] == ["7", "7.1", "7.2", "7.3"]
  assert [(p / "model/e").read_text() for p in steps.damaged(tmp_path)[:3]] == [
      "0", "1", "2"]
  assert os.readlink(tmp_path / "damaged" / "7.3") == "/etc"


def test_a_step_that_is_being_saved_is_none_yet(tmp_path):
  folder = tmp_path / "7"
  steps.begin(folder)
  fill(folder)
  assert steps.found(tmp_path) == [] and steps.survey(tmp_path) == ({}, {})
  assert steps.unfinished(tmp_path) == {folder: "saving"}
  shutil.rmtree(folder)
  save(folder)
  assert steps.found(tmp_path) == [7] and steps.unfinished(tmp_path) == {}
