"""Checkpoints on gs://, against a fake server: the extra `gcs`, and
gcp-storage-emulator.
"""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import random
import re
import threading
import zlib

import checkpoint_cases
import fake_gcs
import jax
import numpy as np
import pytest
from checkpoint_cases import abstract, assert_same, restore, save
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax import errors, storage
from metaformer_jax.checkpoints import manager as manager_lib
from metaformer_jax.checkpoints import manifest, outages, steps
from metaformer_jax.runtime import leases
from metaformer_jax.runtime import workdir as workdir_lib

gcs = pytest.importorskip("metaformer_jax.gcs")
pytest.importorskip("gcp_storage_emulator")


@pytest.fixture
def folder(cloud, request):
  """A folder of the bucket that no other test uses."""
  name = re.sub(r"\W+", "_", request.node.name)
  return storage.path(f"gs://{fake_gcs.BUCKET}/{name}")


def content(folder):
  """Name -> bytes of all objects in a folder."""
  return {name: (folder / name).read_bytes() for name in folder.objects()}


def make_state(step, seed=0):
  return checkpoint_cases.make_state(step, seed, ema=False)


def opened(workdir, lock=None, **keys):
  cfg = dataclasses.replace(checkpoint_cases.CFG, **keys)
  return contextlib.closing(checkpoint_cases.opened(workdir, cfg, lock=lock))


def crc32c(data):
  """Castagnoli's CRC, bit by bit (RFC 3720, B.4)."""
  value = 2**32 - 1
  for byte in data:
    value ^= byte
    for _ in range(8):
      value = value >> 1 ^ 0x82F63B78 * (value & 1)
  return value ^ 2**32 - 1


# Files and folders


def test_files(folder):
  data = random.Random(0).randbytes(70_000)
  storage.write(folder / "a", data)
  storage.write(folder / "sub/b", "text")
  storage.write(folder / "sub/b", "other")
  assert (folder / "a").read_bytes() == data
  assert (folder / "a").read_bytes(10) == data[:10]
  assert (folder / "sub/b").read_text() == "other"
  assert b"".join((folder / "a").blocks()) == data
  assert folder.is_dir() and not folder.is_file()
  assert (folder / "a").is_file() and not (folder / "a").is_dir()
  assert sorted(p.name for p in folder.iterdir()) == ["a", "sub"]
  assert [p.name for p in (folder / "sub").glob("[b-c]")] == ["b"]
  assert not storage.exists(folder / "su") and not (folder / "c").is_file()
  with pytest.raises(FileNotFoundError):
    (folder / "c").read_bytes()
  there = storage.Contents(folder)
  assert there.names() == {"a", "sub/b"} and there.size("a") == 70_000
  crc = base64.b64encode(crc32c(data).to_bytes(4)).decode()
  assert there.checksum("a") == f"crc32c:{crc}"
  # Of another kind, as in a manifest that was copied from a disk.
  assert there.checksum("a", "0" * 64) == hashlib.sha256(data).hexdigest()
  storage.move(folder / "sub", folder / "moved")
  assert content(folder) == {"a": data, "moved/b": b"other"}
  storage.discard(folder)
  assert not folder.exists() and list(folder.iterdir()) == []


def test_checksums_where_the_service_gives_none(folder, tmp_path, monkeypatch):
  data = zlib.compress(b"weights" * 1000)
  storage.write(folder / "a", data)
  (tmp_path / "a").write_bytes(data)
  given = storage.Contents(folder).checksum("a")
  # A copy on a disk of a step that was saved here is compared alike.
  assert storage.Contents(tmp_path).checksum("a", "crc32c:?") == given
  monkeypatch.setattr(gcs.Path, "objects", lambda self: {
      "a": gcs.Object(len(data), None)})
  assert storage.Contents(folder).checksum("a") == given


def test_a_url_means_one_folder():
  for text in ("gs://", "gs://UP/x", "gs://bkt//x", "gs://bkt/../x",
               "gs://bkt/a*", "gs://bkt/a#1", "gs://bkt/a\nb", "s3://b/x",
               "gs://bkt/" + "x" * 800):
    with pytest.raises(errors.ConfigError, match=r"--workdir: \S.*; "):
      try:
        storage.path(text, "--workdir")
      except errors.ConfigError as e:
        raise errors.ConfigError(f"--workdir: {e}; ") from e
  with pytest.raises(errors.ConfigError, match="is a bucket; name a folder"):
    workdir_lib.check_path(storage.path("gs://bkt"))
  assert str(storage.path("gs://bkt/run/")) == "gs://bkt/run"
  assert storage.path("lr[0.1]").name == "lr[0.1]"


# Checkpoints


def test_saved_kept_and_restored(folder):
  with opened(folder, keep_last=1) as checkpoints:
    assert checkpoints.latest_good() is None
    for step, top1 in ((1, 0.9), (2, 0.2), (3, 0.3)):
      save(checkpoints, make_state(step, step), 32 * step, {"top1": top1})
      checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    assert checkpoints.find("best") == 1
    for step in (1, 3):
      state, record = restore(checkpoints, step, abstract(make_state(0)))
      assert_same(state, make_state(step, step))
      assert record.position == 32 * step
  assert_same(manager_lib.read_variables(folder)["params"],
              make_state(3, 3).params)
  names = (folder / "checkpoints/3").objects()
  found = manifest.read(folder / "checkpoints/3")
  assert found.files.keys() == names.keys() - {manifest.NAME}
  assert all(c.startswith("crc32c:") for _, c in found.files.values())


@pytest.fixture(scope="module")
def template(cloud):
  folder = storage.path(f"gs://{fake_gcs.BUCKET}/saved")
  with opened(folder) as checkpoints:
    for step in (1, 2):
      save(checkpoints, make_state(step), 32 * step)
  return folder


@pytest.fixture
def saved(template, folder):
  """A run that was saved after steps 1 and 2."""
  for name in template.objects():
    (template / name).copy_to(folder / name)
  return folder


def assert_damage_is_reported(saved, caplog, n):
  """Flips a bit of an object, or deletes it; the step before is used."""
  caplog.set_level(logging.WARNING, "metaformer_jax")
  folder = saved / "checkpoints" / "2"
  whole = content(folder)
  rng = random.Random(0)
  for i, name in zip(range(n), itertools.cycle(sorted(whole))):
    data = bytearray(whole[name])
    if not data or (i % 3 == 2 and name != manifest.NAME):
      (folder / name).unlink()
    else:
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
      (folder / name).write_bytes(data)
    caplog.clear()
    with opened(saved) as checkpoints:
      assert checkpoints.latest_good() == 1, name
      assert checkpoints.steps() == [1]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1 and f"2: {name}: " in warned[0], warned
    assert "set aside by" in warned[0]
    assert content(folder).get(name) != whole[name]  # It stays in place.
    (saved / "checkpoints/2.damaged").unlink()
    (folder / name).write_bytes(whole[name])
  with opened(saved) as checkpoints:
    assert checkpoints.latest_good() == 2
    assert_same(restore(checkpoints, 2, abstract(make_state(0)))[0],
                make_state(2))


@pytest.mark.slow
def test_damage(saved, caplog):
  assert_damage_is_reported(saved, caplog, 8)


@pytest.mark.soak
def test_much_damage(saved, caplog):
  assert_damage_is_reported(saved, caplog, 200)


def test_a_step_that_was_set_aside_is_saved_again(saved, caplog):
  broken = saved / "checkpoints/2/commit_success.txt"
  broken.write_bytes(b"broken")
  with opened(saved) as checkpoints:
    assert checkpoints.latest_good() == 1
    save(checkpoints, make_state(2, seed=5), 64)
    checkpoints.wait()
    assert checkpoints.latest_good() == 2
    assert_same(restore(checkpoints, 2, abstract(make_state(0)))[0],
                make_state(2, seed=5))
  [aside] = steps.damaged(saved / "checkpoints")
  assert (aside / "commit_success.txt").read_bytes() == b"broken"
  assert not storage.exists(saved / "checkpoints/2.damaged")


def test_without_an_intact_step_the_run_does_not_start(saved):
  for step in "12":
    (saved / f"checkpoints/{step}/commit_success.txt").unlink()
  with opened(saved) as checkpoints, pytest.raises(
      errors.ConfigError, match=r"no step is intact \(2: .*; 1: .*missing"):
    checkpoints.latest_good()
  assert not storage.exists(saved / "checkpoints/2.damaged")


def test_what_is_in_the_way_of_a_step_stays(saved):
  storage.write(saved / "checkpoints/3/mine", "mine")
  with opened(saved) as checkpoints:
    with pytest.raises(errors.StorageError, match="/3: is in the way"):
      save(checkpoints, make_state(3), 96)
    assert checkpoints.steps() == [1, 2]
  assert (saved / "checkpoints/3/mine").read_bytes() == b"mine"


# The heartbeat


def test_only_one_run_holds_a_workdir(folder, monkeypatch):
  monkeypatch.setattr(leases, "INTERVAL", 0.1)
  monkeypatch.setattr(leases, "SILENCE", 1.0)
  monkeypatch.setattr(leases, "_POLL", 0.1)
  with workdir_lib.hold(folder) as lock:
    with pytest.raises(errors.ConfigError, match=r"is in use \(pid"), (
        workdir_lib.hold(folder)):
      pass
    lock.require()
    other = leases.Lease(folder / "lock")
    other.beat()
    with opened(folder, lock) as checkpoints, pytest.raises(
        errors.StorageError, match="lock: was deleted or replaced"):
      save(checkpoints, make_state(1), 32)
  assert other.is_held()  # The lock of another run is not deleted.
  # It has no heartbeats any more, and its process is alive.
  with workdir_lib.hold(folder) as lock:
    lock.require()
  assert not storage.exists(folder / "lock")


def test_a_run_that_was_killed_here_holds_nothing(folder, monkeypatch):
  monkeypatch.setattr(leases, "SILENCE", 1e9)
  dead = leases.Lease(folder / "lock")
  dead.holder = re.sub(r"^pid \d+", f"pid {2**22 + 1}", dead.holder)
  dead.beat()
  with workdir_lib.hold(folder):
    pass


# Faults


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data")])
def test_a_save_waits_for_no_request(folder, cloud, monkeypatch, spec):
  """Once it returns, the next step may take the memory of the state."""
  mesh = Mesh(np.array(jax.devices()), ("data",))

  def places(x):
    return NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())

  state = jax.tree.map(lambda x: jax.device_put(x, places(x)), make_state(1))
  go_on, ask = threading.Event(), fake_gcs._Handler._ask

  def held_up(*args):
    assert go_on.wait(60)
    return ask(*args)

  with workdir_lib.hold(folder) as lock, opened(folder, lock) as checkpoints:
    monkeypatch.setattr(fake_gcs._Handler, "_ask", held_up)
    checkpoints.save(1, state.trees(), checkpoint_cases.accounting.Record(),
                     needed=False)
    jax.tree.map(lambda x: x.delete(), state)
    checkpoints.add_metrics(1, {"top1": 0.5})
    go_on.set()
    checkpoints.wait()
    assert checkpoints.read(1).metrics == {"top1": 0.5}
    got, _ = restore(checkpoints, 1, abstract(make_state(0), places))
    assert_same(got, make_state(1))
    assert got.params["a"]["kernel"].sharding.spec == spec


@pytest.mark.slow
def test_faults_of_requests_are_repeated(folder, proxy):
  proxy.faults = fake_gcs.every(25)
  with opened(folder) as checkpoints:
    save(checkpoints, make_state(1), 32)
    checkpoints.wait()
    assert checkpoints.latest_good() == 1
    assert_same(restore(checkpoints, 1, abstract(make_state(0)))[0],
                make_state(1))
  assert proxy.n_faults >= 4


def test_a_run_goes_on_while_the_bucket_is_away(folder, proxy, caplog,
                                                monkeypatch):
  caplog.set_level(logging.WARNING, "metaformer_jax")
  monkeypatch.setattr(outages, "ANSWER", 0.5)
  monkeypatch.setattr(storage, "_LONGEST_WAIT", 1.0)
  with workdir_lib.hold(folder) as lock, opened(folder, lock) as checkpoints:
    def save_step(step, **options):
      state = make_state(step)
      checkpoints.save(step, state.trees(),
                       checkpoint_cases.accounting.Record(position=32 * step),
                       **options)

    save_step(1, needed=False)
    checkpoints.wait()
    proxy.is_away = True
    for step in (2, 3):
      save_step(step, needed=False)
      checkpoints.add_metrics(step, {"top1": 0.5})
    checkpoints.wait()
    warned = sorted(record.getMessage() for record in caplog.records)
    assert len(warned) == 2
    assert "step 2 is not saved; training goes on" in warned[0]
    # It ends when that has lasted too long.
    with monkeypatch.context() as change:
      change.setattr(outages, "PATIENCE", 0.0)
      with pytest.raises(errors.StorageError, match="no checkpoint for 0 min"):
        save_step(4, needed=False)
        checkpoints.wait()
    proxy.is_away = False
    save_step(5)  # One that is needed is complete.
    assert checkpoints.steps() == [1, 5]
    assert not caplog.records[3:]
