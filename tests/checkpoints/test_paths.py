"""Paths of workdirs: refused at once in one line, or saved and restored.

`pytest -m soak tests/checkpoints/test_paths.py` saves in many more.
"""

import contextlib
import os
import pathlib

import numpy as np
import pytest
from checkpoint_cases import (
  abstract,
  assert_same,
  make_state,
  opened,
  restore,
  save,
)

from metaformer_jax import errors
from metaformer_jax.checkpoints import arrays, manifest
from metaformer_jax.checkpoints import manager as checkpoints_lib
from metaformer_jax.config import paths
from metaformer_jax.runtime import workdir as workdir_lib

STATE = make_state(7, ema=False)
# Of which names are drawn: patterns, quotes, spaces, marks that combine, line
# breaks, bytes that are not UTF-8, parts of addresses and of reserved names.
PIECES = [*"[]*?{}!~$%&'\"`|;:#=+,@^<> .-_\\\n\t\0\x1b\x7f",
          "a", "Z", "7", "/", "/", "..", "%2F", "\u00e9", "e\u0301", "\u65e5",
          "\U0001f600", "\u3000", "\u2028", "\u202e", "\udcff", "gs:", "s3://",
          ".__lock", "lock", "[0.1]", "**", "x" * 60, "\u65e5" * 80]
GOOD = ["lr[0.1]", "a*b", "what?", "[!a]", "**", "{a,b}", "a b", " ", "-x", "~",
        "$HOME", "%41", "a:b", "s3:", "#1", "'q\"", "\u65e5\u672c \u3000",
        "e\u0301", "\U0001f469\u200d\U0001f52c", ".x", "x.", "..x", "gs", "a/",
        "x" * 255]


def use(path):
  """Saves in a workdir, verifies and restores; as a run and the tools do."""
  with contextlib.closing(opened(path)) as checkpoints:
    save(checkpoints, STATE, 224, {"top1": 0.5})
  manifest.verify(path / "checkpoints" / "7")
  with contextlib.closing(opened(path)) as checkpoints:
    assert checkpoints.latest_good() == 7
    state, _ = restore(checkpoints, 7, abstract(STATE))
  assert_same(state, STATE)
  assert_same(checkpoints_lib.read_variables(path)["params"], STATE.params)


def refused(value):
  """Why a path is refused, as by a command line; None if it is not."""
  try:
    path = paths.local("--workdir", value)
    workdir_lib.check_path(path)
    with workdir_lib.hold(path):
      return None
  except errors.ConfigError as e:
    message = errors.one_line(e)
    assert message.startswith("--workdir: "), message
    return message


def names(rng, n):
  for _ in range(n):
    yield "".join(rng.choice(PIECES, rng.integers(1, 7)))


@pytest.mark.parametrize("name", GOOD, ids=range(len(GOOD)))
def test_odd_names_work(tmp_path, name):
  assert refused(f"{tmp_path}/{name}") is None
  use(tmp_path / name)


def inside(tmp_path, name):
  """A path below a folder; None if that is what the name leads out of."""
  path = f"{tmp_path}/{name}"
  real = os.path.realpath(path.replace("\0", ""))
  return path if real.startswith(f"{tmp_path}/") else None


def assert_refused_or_used(tmp_path, n):
  """Counts both, so that neither is all."""
  rng = np.random.default_rng(n)
  counts = {True: 0, False: 0}
  for i, name in enumerate(names(rng, n)):
    path = inside(tmp_path / str(i), name)
    if path is not None:
      ok = refused(path) is None
      counts[ok] += 1
      if ok:
        use(pathlib.Path(path))
  assert min(counts.values()) > n / 5, counts


def test_any_name_is_refused_or_works(tmp_path):
  assert_refused_or_used(tmp_path, 25)


@pytest.mark.soak
def test_a_thousand_names_are_refused_or_work(tmp_path):
  assert_refused_or_used(tmp_path, 1000)


def test_links_and_relative_paths(tmp_path, monkeypatch):
  """`link/..` is the parent of the link's target, not of the link."""
  (tmp_path / "far" / "away").mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
  monkeypatch.chdir(tmp_path)
  for path, real in (("run/", "run"), ("link/run", "far/away/run"),
                     ("link/../other", "far/other"), ("-x/./y", "-x/y"),
                     (f"/{tmp_path}/slashes//run", "slashes/run")):
    assert refused(path) is None
    use(pathlib.Path(path))
    assert (tmp_path / real / "checkpoints/7" / manifest.NAME).is_file(), path
  (tmp_path / "disk").mkdir()
  (tmp_path / "apart").mkdir()
  (tmp_path / "apart" / "checkpoints").symlink_to(tmp_path / "disk")
  use(tmp_path / "apart")
  assert (tmp_path / "disk" / "7" / manifest.NAME).is_file()


def test_what_is_no_folder_is_refused(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  for name in ("file", "file/run", "loop", "loop/run", "y" * 256):
    assert refused(str(tmp_path / name)), name


def test_a_step_that_cannot_be_opened_again_is_none(tmp_path, monkeypatch):
  """As when Orbax does not find what the processes have written."""
  with contextlib.closing(opened(tmp_path)) as checkpoints:
    save(checkpoints, make_state(1))
    checkpoints.wait()
    with monkeypatch.context() as change:
      change.setattr(arrays._Path, "glob", lambda *_: iter(()))
      save(checkpoints, make_state(2))
      with pytest.raises(errors.StorageError, match=(
          r"step 2 cannot be saved: .*params/.* is missing; earlier steps")):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    save(checkpoints, make_state(3))
  assert checkpoints.steps() == [1, 3]


def test_what_a_restore_would_not_find_is_named(tmp_path):
  with contextlib.closing(opened(tmp_path)) as checkpoints:
    save(checkpoints, STATE)
  folder = checkpoints.directory / "7"
  tree = manifest.read(folder).tree
  arrays.require(folder, tree)
  kernel, wrong = "params/a/kernel", "float32[16, 9]"
  for want, reason in (
      ({kernel: wrong}, r"kernel was saved as float32\[16, 9\], and is "
       r"float32\[16, 8\]$"),
      ({"params/a/more": wrong}, "more was saved as .*, and is missing$")):
    with pytest.raises(manifest.DamagedError, match=reason):
      arrays.require(folder, tree | want)
  for name in ("opt_state/_METADATA", "opt_state/manifest.ocdbt"):
    content = (folder / name).read_bytes()
    for damaged in (None, content[:len(content) // 2], b"{}"):
      (folder / name).unlink(missing_ok=True)
      if damaged is not None:
        (folder / name).write_bytes(damaged)
      with pytest.raises(manifest.DamagedError, match="opt_state") as e:
        arrays.require(folder, tree)
      assert len(str(e.value).splitlines()) == 1
    (folder / name).write_bytes(content)
  arrays.require(folder, tree)
