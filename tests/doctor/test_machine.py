"""The doctor's checks of a machine: devices, folders, memory, variables."""

import errno
import itertools
import os
import pathlib
import shutil

import fake_gcs
import pytest

from metaformer_jax import storage
from metaformer_jax.doctor import machine
from metaformer_jax.doctor.versions import FAIL, OK, WARN, Line


def test_accelerators_in_dev(tmp_path):
  (tmp_path / "vfio").mkdir()
  (tmp_path / "accel").mkdir()
  for name in ("accel0", "vfio/3", "vfio/vfio", "nvidia1", "nvidiactl", "null"):
    (tmp_path / name).touch()
  assert machine.accelerators(tmp_path) == [
      f"{tmp_path}/{name}" for name in ("accel0", "nvidia1", "vfio/3")]


def test_a_folder_that_cannot_be_written_fails(tmp_path):
  (tmp_path / "file").touch()
  for folder in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
    line = machine.writing("workdir", folder)
    assert line.state == FAIL and str(folder) in line.text
  assert machine.writing("cache", "/proc/run", WARN).state == WARN
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_bucket_that_cannot_replace_files_fails(tmp_path, monkeypatch):
  mounts = tmp_path / "mounts"
  bucket = tmp_path / "a bucket"
  bucket.mkdir()
  mounts.write_text(f"/dev/sda / ext4 rw 0 0\nname {tmp_path}/a\\040bucket "
                    f"fuse.gcsfuse rw 0 0\ntmpfs {tmp_path}/a tmpfs rw 0 0\n")

  def write(folder):
    return machine.writing("workdir", folder, mounts=str(mounts))

  assert write(bucket / "runs").text == (
      f"{bucket} is writable, fuse.gcsfuse")
  assert write(tmp_path).text.startswith(f"{tmp_path} is writable, ext4, ")

  def refuse(self, target):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

  monkeypatch.setattr(pathlib.Path, "replace", refuse)
  line = write(bucket)
  assert line.state == FAIL and "Too many open files" in line.text
  assert list(bucket.iterdir()) == []


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=2**29)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  line = machine.writing("workdir", tmp_path)
  assert line.state == WARN and "0.5 GiB free" in line.text


def test_a_bucket_is_written_to():
  pytest.importorskip("metaformer_jax.gcs")
  pytest.importorskip("gcp_storage_emulator")
  with fake_gcs.serving() as (_, proxy):
    folder = storage.path(f"gs://{fake_gcs.BUCKET}/runs/s24")
    assert machine.writing("workdir", folder) == Line(
        "workdir", OK, f"{folder} is writable, object storage")
    assert not folder.exists()
    line = machine.writing("workdir", "gs://another-bucket/run")
    assert (line.state, line.text) == (
        FAIL, "gs://another-bucket/run: there is no such object or bucket")
    line = machine.writing("workdir", "gs://b")
    assert line.state == FAIL and "no valid name of a bucket" in line.text
    proxy.faults = itertools.repeat("403")
    line = machine.writing("workdir", str(folder))
    assert line.state == FAIL and line.text.startswith(f"{folder}: ")


def test_a_folder_of_data_is_read(tmp_path):
  assert machine.folder_of_data(str(tmp_path)).state == FAIL
  for name in ("train/cat", "train/dog", "val/cat", ".hidden"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "train" / "cat" / "0.jpg").write_bytes(b"jpeg")
  line = machine.folder_of_data(str(tmp_path))
  assert (line.state, line.text) == (
      OK, f"{tmp_path}: train (2 entries), val (1 entries); one file was read")
  line = machine.folder_of_data(str(tmp_path / "none"))
  assert line.state == FAIL and "No such file" in line.text


def test_the_limits_of_a_container_apply(tmp_path):
  meminfo = tmp_path / "meminfo"
  meminfo.write_text("MemTotal:  16777216 kB\nMemFree: 1 kB\n"
                     "MemAvailable:  12582912 kB\n")
  line = machine.memory(str(meminfo), str(tmp_path))
  assert line.state == OK
  assert line.text.startswith("12.0 of 16.0 GiB free; ")
  for name, value in (("memory.max", 4 * 2**30), ("memory.current", 3 * 2**30),
                      ("cpu.max", "150000 100000")):
    (tmp_path / name).write_text(f"{value}\n")
  line = machine.memory(str(meminfo), str(tmp_path))
  assert line.state == WARN
  assert line.text.startswith("1.0 of 4.0 GiB free; ")
  assert "cores, limited to 1.5" in line.text
  (tmp_path / "memory.max").write_text("max\n")
  assert machine.memory(str(meminfo), str(tmp_path)).state == OK


def test_large_pages_that_a_process_must_ask_for_are_named(tmp_path):
  large = tmp_path / "enabled"
  assert not list(machine.pages({}, str(large)))
  for text, n in (("[always] madvise never", 0), ("always madvise [never]", 0),
                  ("always [madvise] never", 1)):
    large.write_text(f"{text}\n")
    assert len(list(machine.pages({}, str(large)))) == n
  (line,) = machine.pages({}, str(large))
  name, _, value = line.text.rpartition(" ")[2].partition("=")
  assert line.state == OK and not list(machine.pages({name: value}, str(large)))


def test_variables_that_change_jax_are_reported():
  lines = list(machine.environment({
      "HOME": "/root", "JAX_PLATFORMS": "tpu", "JAX_DISABLE_JIT": "0",
      "JAX_ENABLE_X64": "True", "LIBTPU_INIT_ARGS": "--x",
      "LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}))
  assert [(line.state, line.text.partition(":")[0]) for line in lines] == [
      (WARN, "JAX_ENABLE_X64=True"),
      (WARN, "LD_LIBRARY_PATH=/usr/local/cuda/lib64"),
      (OK, "JAX_DISABLE_JIT=0 JAX_PLATFORMS=tpu LIBTPU_INIT_ARGS=--x")]
  [line] = machine.environment({"HOME": "/root"})
  assert (line.state, line.text) == (OK, "nothing set")
