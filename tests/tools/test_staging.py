"""Copies of data sets from gs://, against a fake server."""

import base64
import collections
import errno
import itertools
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import fake_gcs
import pods
import pytest
import source_files

from metaformer_jax import errors, gcs, storage
from metaformer_jax.tools import prepare, staging

pytest.importorskip("gcp_storage_emulator")

FILES = {"train/a/1.jpg": 70_000, "train/b/ä 2.jpg": 3, "val/empty": 0,
         "classes.txt": 100}


@pytest.fixture
def url(cloud, request):
  """A data set of `FILES`."""
  folder = storage.path("gs://{}/{}".format(
      fake_gcs.BUCKET, re.sub(r"\W+", "_", request.node.name)))
  for name, size in FILES.items():
    storage.write(folder / name, random.Random(name).randbytes(size))
  return str(folder)


def stage(url, output, *args):
  prepare.main(prepare.parse(
      ["--stage", f"--path={url}", f"--output={output}", *args]))


def content(folder):
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in pathlib.Path(folder).rglob("*") if path.is_file()}


WANTED = {name: random.Random(name).randbytes(size)
          for name, size in FILES.items()}


def test_it_copies_all_and_recognises_it(url, tmp_path, proxy, caplog):
  caplog.set_level(logging.INFO)
  proxy.counts = True
  stage(url, tmp_path / "new/data")
  assert content(tmp_path / "new") == {
      f"data/{name}": data for name, data in WANTED.items()}
  # One request for each file that has content, and what finds them.
  assert sum("alt=media" in path for _, path, _ in proxy.requests) == 3
  assert len(proxy.requests) < 3 + 5
  proxy.requests.clear()
  caplog.clear()
  stage(url, tmp_path / "new/data")
  assert not any("alt=media" in path for _, path, _ in proxy.requests)
  assert caplog.messages == [
      f"{tmp_path}/new/data is a copy of {url} already: 4 files of the same "
      "sizes"]


@pytest.mark.parametrize("change, part", [
    (lambda folder: (folder / "classes.txt").unlink(),
     "'classes.txt' is missing"),
    (lambda folder: (folder / "more").write_text(""),
     "'more' is not in the bucket"),
    (lambda folder: (folder / "val/empty").write_text("x"),
     "'val/empty' has another size"),
    (lambda folder: (folder / "link").symlink_to("val"),
     "'link' is not a regular file"),
    (lambda folder: (shutil.rmtree(folder), folder.write_text("")),
     "it is a file")])
def test_another_folder_is_refused(url, tmp_path, change, part):
  stage(url, tmp_path / "data")
  change(tmp_path / "data")
  before = os.listdir(tmp_path), content(tmp_path)
  source_files.fails(lambda: stage(url, tmp_path / "data"),
                     f"--output: {tmp_path}/data exists and is no copy of",
                     part, "delete it, or name a new folder")
  assert (os.listdir(tmp_path), content(tmp_path)) == before


def test_a_full_disk_is_found_before_it_copies(url, tmp_path, monkeypatch,
                                               proxy):
  usage = collections.namedtuple("usage", "free")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(18 * 4096 + 4095))
  proxy.counts = True
  with pytest.raises(errors.StorageError, match=re.escape(
      f"--output: {tmp_path} has 77.8 kB of free space, and the data needs "
      "81.9 kB; free space, or name")):
    stage(url, tmp_path / "data")
  assert not any("alt=media" in path for _, path, _ in proxy.requests)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(20 * 4096))
  stage(url, tmp_path / "data")
  assert content(tmp_path / "data") == WANTED


@pytest.mark.parametrize("broken, part", [
    ("checksum", "its checksum differs from the service's"),
    ("403", "Forbidden"), ("missing", "there is no such object"),
    ("disk", "No space left on device"), ("away", "")])
def test_what_goes_wrong_leaves_nothing(url, tmp_path, monkeypatch, proxy,
                                        broken, part):
  listed = gcs.Path.objects
  monkeypatch.setattr(staging, "_PATIENCE", 0.0)

  def objects(path):
    found = listed(path)
    if broken == "checksum":
      found["classes.txt"] = gcs.Object(
          100, base64.b64encode(b"abcd").decode())
    elif broken == "missing":
      (path / "classes.txt").unlink()
    elif broken == "403":
      proxy.faults = itertools.repeat("403")
    return found

  def full(path, target, facts):
    del path, facts
    raise (gcs.UnavailableError(errno.EAGAIN, "it is away", str(target))
           if broken == "away" else OSError(errno.ENOSPC, os.strerror(
               errno.ENOSPC), str(target)))

  monkeypatch.setattr(gcs.Path, "objects", objects)
  if broken in ("disk", "away"):
    monkeypatch.setattr(gcs.Path, "download", full)
  with pytest.raises(errors.StorageError, match=re.escape(
      f"--output: {tmp_path}/data was not made: ") + f".*{part}") as caught:
    stage(url, tmp_path / "data")
  assert "\n" not in str(caught.value)
  assert os.listdir(tmp_path) == []


def test_faults_of_the_service_change_nothing(url, tmp_path, proxy):
  proxy.faults = iter(["reset", None, "truncated"])
  stage(url, tmp_path / "data")
  assert next(proxy.faults, "none left") == "none left"
  assert content(tmp_path / "data") == WANTED


@pytest.mark.parametrize("path, part", [
    ("data", "--path: data is not on gs://"),
    ("gs://bkt/none", "--path: gs://bkt/none: no object is in it, or there is"),
    ("gs://none/x", "--path: gs://none/x cannot be listed: there is no such "),
    ("gs://B/x", "has no valid name of a bucket")])
def test_a_wrong_path_is_one_line(cloud, tmp_path, path, part):
  source_files.fails(lambda: stage(path, tmp_path / "data"), part)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("names, part", [
    (["a/../b"], "'a/../b'"), (["/etc/passwd"], "'/etc/passwd'"),
    (["a//b"], "'a//b'"), (["a", "a/b"], "'a', and others in a folder"),
    (["x" * 256], "whose name cannot be"), (["./a"], "'./a'")])
def test_names_that_no_file_can_have_are_refused(cloud, tmp_path, monkeypatch,
                                                 names, part):
  monkeypatch.setattr(gcs.Path, "objects", lambda _: {
      name: gcs.Object(1, None) for name in names})
  source_files.fails(lambda: stage("gs://bkt/data", tmp_path / "data"), part)
  assert os.listdir(tmp_path) == []


def test_other_options_are_refused(tmp_path):
  source_files.fails(lambda: stage("gs://bkt/x", tmp_path, "--source=coco"),
                     "--stage copies files as they are, without --source")


def test_a_stopped_copy_leaves_nothing(url, tmp_path, proxy):
  """SIGTERM in the middle; the second time it is a copy."""
  command = [sys.executable, "-m", "metaformer_jax.tools.prepare", "--stage",
             f"--path={url}", f"--output={tmp_path}/data"]
  proxy.counts, go_on = True, threading.Event()
  ask = fake_gcs._Handler._ask

  def slow(handler, method, path, body, headers):
    if "1.jpg" in path and "alt=media" in path:
      go_on.wait(60)
    return ask(handler, method, path, body, headers)

  with pytest.MonkeyPatch.context() as change:
    change.setattr(fake_gcs._Handler, "_ask", slow)
    process = subprocess.Popen(command, env=pods.environment(1), text=True,
                               stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".data.*.partial/train")):
      assert process.poll() is None and time.monotonic() < end
      time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    go_on.set()
    said = process.communicate(timeout=60)[1]
  assert process.returncode == 143, said
  assert os.listdir(tmp_path) == []
  stage(url, tmp_path / "data")
  assert content(tmp_path / "data") == WANTED
