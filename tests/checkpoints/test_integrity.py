"""Damage to a checkpoint is reported, and the run resumes from an earlier one.

`pytest -m soak tests/checkpoints/test_integrity.py` flips a thousand bits.
"""

import contextlib
import errno
import logging
import os
import random
import shutil
import subprocess
import sys

import checkpoint_cases
import pytest
import small_disk
from checkpoint_cases import abstract, assert_same, flip, restore, save

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager as checkpoints_lib
from metaformer_jax.checkpoints import manifest, steps


def make_state(step, seed=0):
  """A state with arrays too large for the checksums of Orbax."""
  return checkpoint_cases.make_state(step, seed, stats=True, rows=1024)


def opened(workdir):
  return contextlib.closing(checkpoint_cases.opened(workdir))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run that was saved after steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("saved")
  with opened(workdir) as checkpoints:
    for step in (1, 2):
      save(checkpoints, make_state(step), 32 * step, {"top1": step / 10})
  return workdir


@pytest.fixture
def run(saved, tmp_path, caplog):
  caplog.set_level(logging.WARNING, "metaformer_jax")
  return shutil.copytree(saved, tmp_path / "run")


def names(workdir):
  return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def assert_resumes_from(workdir, step, caplog):
  """The run resumes with exactly what was saved; returns its warnings."""
  caplog.clear()
  with opened(workdir) as checkpoints:
    assert checkpoints.latest_good() == step
    state, record = restore(checkpoints, step,
                            abstract(make_state(0, seed=1)))
  assert_same(state, make_state(step))
  assert record.position == 32 * step
  return [record.getMessage() for record in caplog.records]


def assert_flips_are_reported(run, caplog, n_flips):
  """Flips bits, one at a time, at least one per file; each is noticed."""
  step = run / "checkpoints" / "2"
  files = sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())
  sizes = [(step / file).stat().st_size for file in files]
  rng = random.Random(0)
  chosen = [*files, *rng.choices(files, sizes, k=n_flips - len(files))]
  assert len(files) < len(chosen) == n_flips
  for i, file in enumerate(chosen):
    bit = rng.randrange(8 * (step / file).stat().st_size)
    flip(step / file, bit)
    if i % 10 == 0:
      warned = assert_resumes_from(run, 1, caplog)
    else:
      caplog.clear()
      with opened(run) as checkpoints:
        assert checkpoints.latest_good() == 1
      warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1 and f"{step}: {file}: " in warned[0], warned
    assert "continuing from step 1" in warned[0]
    aside = run / "checkpoints" / "damaged" / "2"
    flip(aside / file, bit)
    aside.rename(step)
  assert assert_resumes_from(run, 2, caplog) == []


def test_flipped_bits(run, caplog):
  assert_flips_are_reported(run, caplog, 80)


@pytest.mark.soak
def test_a_thousand_flipped_bits(run, caplog):
  assert_flips_are_reported(run, caplog, 1000)


def empty(step):
  shutil.rmtree(step)
  step.mkdir()


def largest(step):
  return max((p for p in step.rglob("d/*") if p.is_file()),
             key=lambda p: (p.stat().st_size, p))


DAMAGE = {
    "empty": empty,
    "truncated": lambda s: os.truncate(largest(s), 10),
    "emptied": lambda s: os.truncate(largest(s), 0),
    "file deleted": lambda s: next(s.glob("params/d/*")).unlink(),
    "item deleted": lambda s: shutil.rmtree(s / "opt_state"),
    "metadata deleted": lambda s: (s / "_CHECKPOINT_METADATA").unlink(),
    "file added": lambda s: (s / "params/process_1").touch(),
    "no manifest": lambda s: (s / manifest.NAME).unlink(),
    "another's manifest": lambda s: shutil.copy(
        s.parent / "1" / manifest.NAME, s),
    "another's item": lambda s: (
        shutil.rmtree(s / "params"),
        shutil.copytree(s.parent / "1" / "params", s / "params")),
    "linked": lambda s: (s.rename(s.parents[2] / "elsewhere"),
                         s.symlink_to(s.parents[2] / "elsewhere")),
    "a file": lambda s: (shutil.rmtree(s), s.touch()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_set_aside(run, caplog, damage):
  DAMAGE[damage](run / "checkpoints" / "2")
  with opened(run) as checkpoints:  # Reading moves nothing.
    assert checkpoints.find("last") == checkpoints.find("best") == 1
    assert len(caplog.records) == 2 and "ignored" in caplog.text
    for read in (checkpoints.find, lambda step: restore(
        checkpoints, step, abstract(make_state(2)))):
      with pytest.raises(errors.ConfigError, match="checkpoints/2: "):
        read(2)
  with pytest.raises(errors.WeightsError, match="2: is damaged or incompl"):
    checkpoints_lib.read_variables(run)
  assert names(run) == ["1", "2"]
  warned = assert_resumes_from(run, 1, caplog)
  assert len(warned) == 1 and warned[0].startswith(f"{run}/checkpoints/2: ")
  assert names(run) == ["1", "damaged"]
  assert assert_resumes_from(run, 1, caplog) == []
  # The run saves the step again, and it is damaged again.
  with opened(run) as checkpoints:
    save(checkpoints, make_state(2), 64)
  assert assert_resumes_from(run, 2, caplog) == []
  empty(run / "checkpoints" / "2")
  assert len(assert_resumes_from(run, 1, caplog)) == 1
  assert len(list((run / "checkpoints" / "damaged").iterdir())) == 2


def test_reading_a_flipped_bit_raises(run):
  flip(largest(run / "checkpoints" / "2"), 99)
  with opened(run) as checkpoints:
    assert checkpoints.find("last") == 2  # Only names and sizes are compared.
    with pytest.raises(errors.ConfigError, match="its checksum differs; choo"):
      restore(checkpoints, 2, abstract(make_state(2)))
  with pytest.raises(errors.WeightsError, match="its checksum differs"):
    checkpoints_lib.read_variables(run)
  assert names(run) == ["1", "2"]


def test_without_an_intact_step_the_run_does_not_start(run, caplog):
  for step in (1, 2):
    flip(largest(run / "checkpoints" / str(step)), 99)
  for _ in range(2):  # Nothing is moved, so the second start reports the same.
    with opened(run) as checkpoints, pytest.raises(
        errors.ConfigError, match=r"no step is intact \(2: .*; 1: .*checksum"):
      checkpoints.latest_good()
  assert names(run) == ["1", "2"] and not caplog.records


def test_only_what_this_program_made_is_deleted(tmp_path, caplog):
  """What an interruption leaves is; what a user put there stays, or is moved.

  Their folders have the names of steps, or of what other programs leave.
  """
  folder = tmp_path / "checkpoints"
  theirs = ("20.saving-my-backup", "20.saving", "3.deleting", "notes",
            "4.unfinished", "07", "damaged/mine")
  for name in ("1", "2", *theirs):
    (folder / name / "params").mkdir(parents=True)
  (folder / "5.unfinished").write_text("mine")
  steps.begin(folder / "6")
  (folder / "6" / "params").mkdir(parents=True)
  steps.begin(folder / "7")  # Interrupted before there was anything.
  with opened(tmp_path) as checkpoints:
    assert checkpoints.steps() == [] and checkpoints.latest_step() is None
    with pytest.raises(errors.ConfigError, match="has no checkpoint last"):
      checkpoints.find("last")
    caplog.clear()
    assert checkpoints.latest_good() is None
    assert [r.getMessage().partition(": ")[0] for r in caplog.records] == [
        f"{folder}/{name}" for name in "2167"]
    caplog.clear()
    assert checkpoints.latest_good() is None and not caplog.records
  for name in (*theirs, "damaged/1", "damaged/2"):
    assert (folder / name / "params").is_dir()
  assert (folder / "5.unfinished").read_text() == "mine"
  assert not {"1", "2", "6", "6.unfinished", "7.unfinished"} & {
      *names(tmp_path)}


@pytest.mark.parametrize("name", ["3", "3.unfinished"])
def test_a_save_deletes_nothing_that_is_in_its_way(run, name):
  (run / "checkpoints" / name / "mine").mkdir(parents=True)
  with opened(run) as checkpoints:
    with pytest.raises(errors.StorageError, match=rf"/{name}: is in the way"):
      save(checkpoints, make_state(3), 96)
    assert checkpoints.steps() == [1, 2]
  assert (run / "checkpoints" / name / "mine").is_dir()


def test_an_interrupted_save_may_be_repeated(run, caplog):
  """Also without a start in between, which would delete what is left."""
  shutil.copytree(run / "checkpoints/1", run / "checkpoints/3")
  (run / "checkpoints/3" / manifest.NAME).unlink()
  steps._write_mark(run / "checkpoints/3", "saving")
  with opened(run) as checkpoints:
    assert checkpoints.steps() == [1, 2]
    save(checkpoints, make_state(3), 96)
  assert assert_resumes_from(run, 3, caplog) == []


def test_damaged_step_is_not_counted_as_kept(run, caplog):
  """Nor is it deleted, so that it can be inspected."""
  os.truncate(largest(run / "checkpoints" / "1"), 10)
  with opened(run) as checkpoints:
    for step in (3, 4, 5):
      save(checkpoints, make_state(step), 32 * step)
  assert names(run) == ["1", "2", "4", "5"]  # 2 is the best.
  assert assert_resumes_from(run, 5, caplog) == []


def test_a_save_that_fails_is_one_error(run, caplog, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  checkpoints = checkpoint_cases.opened(run)
  with monkeypatch.context() as change:
    change.setattr(manifest, "_replace", full)
    save(checkpoints, make_state(3), 96)
    with pytest.raises(errors.StorageError, match=r"step 3 .*: No space left"):
      checkpoints.wait()
  checkpoints.close()  # It is reported only once.
  warned = assert_resumes_from(run, 2, caplog)
  assert len(warned) == 1 and "/3: the save was interrupted" in warned[0]
  assert names(run) == ["1", "2"]


FAILS = """
import contextlib, pathlib, resource, sys
import jax.numpy as jnp
import numpy as np
from checkpoint_cases import make_state, opened, save
from metaformer_jax import errors

workdir = pathlib.Path(sys.argv[1])
run = opened(workdir)
rng = np.random.default_rng(0)
other = workdir.parent / "other"
if sys.argv[2] == "full":
  with open(other, "wb", 0) as f, contextlib.suppress(OSError):
    while True:
      f.write(rng.bytes(4096))
else:
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, -1))
for step in (3, 4):
  noise = jnp.asarray(rng.normal(size=(256, 256)), jnp.float32)
  try:
    save(run, make_state(step).replace(params={"a": noise}))
    run.wait()
    sys.exit("was saved")
  except errors.StorageError as e:
    assert f"step {step} cannot be saved: {sys.argv[3]};" in str(e), e
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
other.unlink(missing_ok=True)
save(run, make_state(5, stats=True, rows=1024), 160)
run.close()
assert run.steps() == [2, 5], run.steps()
"""


@pytest.mark.parametrize("how, why", [
    ("full", "No space left on device"),
    pytest.param("limited", "File too large", marks=pytest.mark.slow)])
def test_full_disk(saved, tmp_path, caplog, how, why):
  """In its own process, as threads of Orbax write to stderr; it saves again."""
  disk = small_disk.mounted if how == "full" else contextlib.nullcontext
  with disk(tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    subprocess.run(
        [sys.executable, "-c", FAILS, run, how, why], check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(
            [os.path.dirname(checkpoint_cases.__file__), *sys.path])})
    warned = assert_resumes_from(run, 5, caplog)
    assert all("was interrupted" in line for line in warned)
