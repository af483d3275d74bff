"""The folder of a run: the lock, its config.json, and obstacles."""

import fcntl
import json
import pathlib
import re
import shutil

import pytest
import small_disk

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.runtime import workdir


def test_content_of_a_lock_is_ignored(tmp_path):
  (tmp_path / "lock").write_bytes(b"\xff" * 300)
  with workdir.hold(tmp_path):
    assert (tmp_path / "lock").read_text().startswith("pid ")
    (tmp_path / "lock").write_bytes(b"\xff" * 300)
    with pytest.raises(errors.ConfigError, match="is in use"), workdir.hold(
        tmp_path):
      pass


def test_full_disk_is_a_storage_error(tmp_path):
  """Not a ConfigError: there may be space when the run is started again."""
  run = tmp_path / "run"
  with small_disk.mounted(tmp_path):
    run.mkdir()
    (run / "config.json").touch()  # Directory entries need space, too.
    (run / "config.json").unlink()
    with (tmp_path / "other").open("wb", 0) as f:
      with pytest.raises(OSError, match="No space"):
        while True:
          f.write(bytes(4096))
      for enter in (lambda: workdir.hold(run).__enter__(),
                    lambda: workdir.claim(schema.Experiment(), run)):
        with pytest.raises(errors.StorageError, match="No space left") as e:
          enter()
        assert e.value.exit_code == 1
      f.truncate(0)
    with workdir.hold(run):
      workdir.claim(schema.Experiment(), run)
      workdir.claim(schema.Experiment(), run)
    shutil.rmtree(run)


@pytest.mark.parametrize("name", ["lock", ".config.json.tmp", "config.json"])
def test_obstacle_is_named(tmp_path, name):
  (tmp_path / name).mkdir()
  with (pytest.raises(errors.ConfigError, match=(
      f"Is a directory.*{name}|{name} cannot be used .is not a file")),
        workdir.hold(tmp_path)):
    workdir.claim(schema.Experiment(), tmp_path)


def test_keys_of_another_version_are_refused_in_one_line(tmp_path):
  path = tmp_path / "config.json"
  saved = json.dumps({"task": "classification", "train": {"mixup": 0.8}})
  path.write_text(saved)
  with pytest.raises(errors.ConfigError) as caught:
    workdir.claim(schema.Experiment(), tmp_path)
  assert str(caught.value) == (
      f"--workdir: {path} cannot be used (was written by another version of "
      "metaformer_jax: there is no key task, train.mixup); choose a new folder")
  assert path.read_text() == saved


@pytest.mark.parametrize("name, problem", [
    ("a\\b", "a backslash"), ("a\nb", "control characters"),
    ("a\x1b[2J", "control characters"), ("a\u2028b", "control characters"),
    ("\udcff", "bytes that are not UTF-8"), ("a.__lock", "ends with .__lock"),
    ("logs:/gs:", "ends with gs:"), ("/hf/run", "object storage"),
    ("/".join(["x" * 200] * 19), "more than 3840 bytes")], ids=range(9))
def test_path_that_a_library_would_take_for_another_is_refused(
    tmp_path, name, problem, monkeypatch):
  folder = tmp_path / name
  linked = tmp_path / "link"
  linked.symlink_to(folder)
  paths = [folder, folder / "run", linked / "run"]
  if folder.is_relative_to(tmp_path) and len(str(folder)) < 200:
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    paths.append(pathlib.Path("run"))
  for path in paths:
    with pytest.raises(errors.ConfigError) as e:
      workdir.check_path(path)
    message = str(e.value)
    assert message.startswith("--workdir: /") and problem in message
    assert len(message.splitlines()) == 1 and message.isprintable()


def test_lock_is_lost_with_its_file(tmp_path):
  path = tmp_path / "lock"
  for lose in (path.unlink, lambda: path.write_text("pid 1 on other\n"),
               lambda: (path.unlink(), path.mkdir())):
    with workdir.hold(tmp_path) as lock:
      lock.require()
      with pytest.raises(errors.ConfigError, match="is in use"), workdir.hold(
          tmp_path):
        pass
      lock.require()
      lose()
      with pytest.raises(errors.StorageError, match=r"lock: was deleted or re"):
        lock.require()
    if path.is_dir():
      path.rmdir()


def test_a_lock_that_is_deleted_before_it_is_locked_keeps_none_out(
    tmp_path, monkeypatch):
  path, n_deleted = tmp_path / "lock", 0
  flock = fcntl.flock

  def late(file, how):
    nonlocal n_deleted
    if n_deleted < 3:
      n_deleted += 1
      path.unlink()
    flock(file, how)

  with monkeypatch.context() as change:
    change.setattr(fcntl, "flock", late)
    with workdir.hold(tmp_path) as lock:
      assert n_deleted == 3 and lock.is_held()
      with pytest.raises(errors.ConfigError, match="is in use"), workdir.hold(
          tmp_path):
        pass
  with monkeypatch.context() as change:
    change.setattr(fcntl, "flock", lambda *_: path.unlink())
    with pytest.raises(errors.StorageError, match="was deleted"), workdir.hold(
        tmp_path):
      pass


def experiment(seed):
  return schema.Experiment(seed=seed)


def leave(folder, *names):
  """What a run that failed before its first checkpoint has written."""
  with workdir.hold(folder):
    workdir.claim(experiment(0), folder, "of the first\n")
  (folder / "tensorboard").mkdir()
  for name in ("metrics.jsonl", "modules.json", "tensorboard/events.1"):
    (folder / name).write_text("of the first\n")
  (folder / "checkpoints").mkdir()
  for name in names:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()


def test_a_run_without_a_checkpoint_does_not_block_its_folder(tmp_path, caplog):
  """Nothing of it is left; files that are not of runs stay."""
  leave(tmp_path, "notes.txt", "tensorboard/notes.txt")
  caplog.set_level("INFO")
  with workdir.hold(tmp_path):
    workdir.claim(experiment(1), tmp_path, "of the second\n")
  assert [m for m in caplog.messages if "seed: 0 -> 1" in m] == caplog.messages
  assert len(caplog.messages) == 1
  assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
  assert (tmp_path / "parameters.txt").read_text() == "of the second\n"
  assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")
                if p.is_file()) == [
      "config.json", "lock", "notes.txt", "parameters.txt",
      "tensorboard/notes.txt"]


@pytest.mark.parametrize("name", [
    "checkpoints/5", "checkpoints/5.saving", "checkpoints/damaged",
    "checkpoints/anything", "summary.json"])
def test_a_run_that_saved_anything_keeps_its_folder(tmp_path, name):
  """Damaged, set aside or incomplete; or finished, without its checkpoints."""
  leave(tmp_path, name)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*")
            if p.is_file() and p.name != "lock"}
  with (pytest.raises(errors.ConfigError, match=re.escape(
      "has another experiment (seed: 0 -> 1); choose a new folder")),
        workdir.hold(tmp_path)):
    workdir.claim(experiment(1), tmp_path, "of the second\n")
  assert before == {p: p.read_bytes() for p in before}
  with workdir.hold(tmp_path):  # The same one may go on.
    workdir.claim(experiment(0), tmp_path, "again\n")
  assert (tmp_path / "metrics.jsonl").read_text() == "of the first\n"
