"""Steps on object storage, interrupted anywhere; the storage is a dict."""

import itertools

import pytest

from metaformer_jax import storage
from metaformer_jax.checkpoints import manifest, steps

gcs = pytest.importorskip("metaformer_jax.gcs")


class Interrupted(BaseException):
  """The process ends; a BaseException, so that nothing tidies up."""


class Objects:
  """What `gcs.Path` uses of gcsfs; ends before the nth change of an object."""

  def __init__(self):
    self.content, self._left = {}, None

  def at(self, n, function, *args):
    """Calls a function; returns whether it was interrupted at the nth."""
    self._left = n
    try:
      function(*args)
    except Interrupted:
      return True
    finally:
      self._left = None
    return False

  def _change(self):
    if self._left is not None:
      self._left -= 1
      if self._left < 0:
        raise Interrupted

  def find(self, key, detail):
    return {name: {"size": len(data), "crc32c": f"{hash(data)}"}
            for name, data in self.content.items()
            if name.startswith(f"{key}/")}

  def ls(self, key, detail):
    rest = [name.removeprefix(f"{key}/").partition("/")
            for name in self.find(key, detail)]
    if not rest:
      raise FileNotFoundError(key)
    return [{"name": f"{key}/{name}", "type": "directory" if slash else "file"}
            for name, slash in dict.fromkeys(part[:2] for part in rest)]

  def info(self, key):
    if key in self.content:
      return {"type": "file", "size": len(self.content[key])}
    self.ls(key, True)
    return {"type": "directory"}

  def cat_file(self, key, start=None, end=None):
    if key not in self.content:
      raise FileNotFoundError(key)
    return self.content[key][start:end]

  def pipe_file(self, key, data):
    self._change()
    self.content[key] = data

  def cp_file(self, source, target):
    self.pipe_file(target, self.cat_file(source))

  def rm_file(self, key):
    self._change()
    if self.content.pop(key, None) is None:
      raise FileNotFoundError(key)

  def rm(self, keys):
    for key in keys:
      self.rm_file(key)


@pytest.fixture
def objects(monkeypatch):
  found = Objects()
  monkeypatch.setattr(gcs, "_fs", lambda: found)
  return found


FILES = {"params/d/0": b"kernel", "params/_METADATA": b"{}", "model/e": b""}


def save(folder):
  """The order of a save."""
  steps.begin(folder)
  for name, data in FILES.items():
    storage.write(folder / name, data)
  manifest.write(folder, **{
      "step": int(folder.name), "record": {"position": 32}, "metrics": {},
      "data": {}, "tree": {"params/a": "float32[2]"}})
  steps.finish(folder)


def measure(folder):
  manifest.add_metrics(folder, {"top1": 0.5})


def set_aside_and_save(folder):
  steps.set_aside(folder, "its checksum differs")
  save(folder)


def good(checkpoints):
  return sorted(steps.survey(checkpoints, contents=True)[0])


def set_aside(objects, checkpoints):
  """The content of what is set aside."""
  return [data for folder in steps.damaged(checkpoints) for name, data in
          objects.content.items()
          if name.startswith(f"{str(folder).removeprefix('gs://')}/")]


@pytest.mark.parametrize("action, before, after, least", [
    (save, False, True, 6), (measure, True, True, 1),
    (steps.remove, True, False, 6), (set_aside_and_save, True, True, 15)])
def test_interrupted_anywhere(objects, action, before, after, least):
  """The step is as before or as after; others, and the user's own, stay."""
  for n in itertools.count():
    checkpoints = storage.path(f"gs://bkt/{n}/checkpoints")
    mine = [checkpoints / "mine/file", checkpoints / "5/file",
            checkpoints / "4.unfinished", checkpoints / "6.damaged"]
    for path in mine:
      storage.write(path, "mine")
    save(checkpoints / "3")
    if before:
      save(checkpoints / "7")
    done = not objects.at(n, action, checkpoints / "7")
    listed = sorted(steps.survey(checkpoints)[0])
    assert listed in ([3], [3, 7]) and good(checkpoints) == listed
    steps.clean(checkpoints)
    assert good(checkpoints) == listed
    assert not steps.unfinished(checkpoints)
    if done:
      assert listed == [3] + [7] * after
    if action is set_aside_and_save and n:  # Nothing of the step is lost.
      assert {*FILES.values()} <= {*set_aside(objects, checkpoints)}
    if 7 not in listed:
      save(checkpoints / "7")
    assert good(checkpoints) == [3, 7]
    assert all(path.read_bytes() == b"mine" for path in mine)
    if done:
      break
  assert n >= least


def test_set_aside_steps_are_numbered_when_they_are_replaced(objects):
  folder = storage.path("gs://bkt/run/checkpoints/7")
  for data in (b"0", b"1", b"2"):
    save(folder)
    (folder / "model/e").write_bytes(data)
    steps.set_aside(folder, "model/e: its checksum differs")
    assert steps.found(folder.parent) == []
  assert [(p / "model/e").read_bytes() for p in steps.damaged(
      folder.parent)] == [b"2", b"0", b"1"]
  steps.drop(folder)
  assert not storage.exists(folder) and len(
      steps.damaged(folder.parent)) == 2
  save(folder)
  assert good(folder.parent) == [7]


def test_a_mark_of_another_program_sets_nothing_aside(objects):
  folder = storage.path("gs://bkt/run/checkpoints/7")
  save(folder)
  storage.write(folder.with_name("7.damaged"), "mine")
  assert steps.found(folder.parent) == [7]
