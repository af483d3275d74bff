"""The folder of a run: who holds it, and what is in the way."""

import shutil

import pytest
from test_integrity import small_disk

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.runtime import workdir


def test_what_a_lock_holds_is_no_matter(tmp_path):
  (tmp_path / "lock").write_bytes(b"\xff" * 300)
  with workdir.hold(tmp_path):
    assert (tmp_path / "lock").read_text().startswith("pid ")
    (tmp_path / "lock").write_bytes(b"\xff" * 300)
    with pytest.raises(errors.ConfigError, match="is in use"), workdir.hold(
        tmp_path):
      pass


def test_a_full_disk_is_no_mistake_of_the_config(tmp_path):
  """Nor told with a traceback: there may be room when it is started again."""
  run = tmp_path / "run"
  with small_disk(tmp_path):
    run.mkdir()
    (run / "config.json").touch()  # Their names need room, too.
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


@pytest.mark.parametrize("name", ["lock", "config.tmp", "config.json"])
def test_what_is_in_the_way_is_named(tmp_path, name):
  (tmp_path / name).mkdir()
  with (pytest.raises(errors.ConfigError, match=f"Is a directory.*{name}"),
        workdir.hold(tmp_path)):
    workdir.claim(schema.Experiment(), tmp_path)
