"""A run of which everything is on gs://: data, workdir, and what reads it."""

import json
import signal

import ade_tree
import dense_runs
import fake_gcs
import pods
import pytest
import test_remote_runs
import test_segmentation_runs

import metaformer_jax
from metaformer_jax import storage
from metaformer_jax.checkpoints import manager
from metaformer_jax.tools import compare

pytest.importorskip("metaformer_jax.gcs")
pytest.importorskip("gcp_storage_emulator")


@pytest.mark.slow
def test_a_run_on_gs_is_told_to_stop_and_resumes(tmp_path):
  """SIGTERM saves and ends with 143; it ends as one on disk does, bit by bit.

  It begins with the data on disk, and goes on with those on gs://.
  """
  tree = ade_tree.make(tmp_path / "tree", n_train=16, n_val=5)
  home = dense_runs.prepare(tmp_path, "ade20k", tree, "segmentation",
                            test_segmentation_runs.OPTIONS)
  whole = dense_runs.finished(home, home / "whole")
  with fake_gcs.serving():
    for path in (home / "prepared").iterdir():
      storage.write(storage.path(f"gs://{fake_gcs.BUCKET}/data/{path.name}"),
                    path.read_bytes())
    remote = f"--config.data.path=gs://{fake_gcs.BUCKET}/data"
    workdir = storage.path(f"gs://{fake_gcs.BUCKET}/runs/stopped")
    for flags in ([], [remote]):
      process = dense_runs.start(home, workdir, flags=flags)
      n = len(test_remote_runs.saved(workdir))
      test_remote_runs.wait_until(
          lambda: len(test_remote_runs.saved(workdir)) > n, process)  # noqa: B023
      process.send_signal(signal.SIGTERM)
      log = (home / "stopped.log").read_text
      assert process.wait(200) == 143, log()
    steps = test_remote_runs.saved(workdir)
    assert 0 < steps[-1] < 40
    last = dense_runs.start(home, workdir,
                            flags=[remote, "--config.data.workers=2"])
    assert pods.finish([last]) == [0], log()
    assert log().count("resumed") == 2
    dense_runs.require_equal(*map(manager.read_variables, (whole, workdir)))
    assert pods.losses(workdir) == pods.losses(whole)
    found, want = map(pods.summary, (workdir, whole))
    assert found["miou"] == want["miou"] > 0

    measured = json.loads(dense_runs.tool("evaluate", f"--workdir={workdir}"))
    assert measured == json.loads(
        dense_runs.tool("evaluate", f"--workdir={whole}"))
    images = tree / "images" / "validation"
    lines = [dense_runs.tool("predict", f"--weights={where}", images, "--json")
             for where in (workdir, whole)]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 5
    dense_runs.require_equal(*(metaformer_jax.load(where).variables
                               for where in (str(workdir), whole)))
    table = dense_runs.tool("compare", workdir, whole,
                            f"--output={tmp_path}/page").splitlines()
    assert table[1].split()[:6] == [  # Its name, its state, its measure.
        f"gs/{fake_gcs.BUCKET}/runs/stopped", *table[2].split()[1:6]]
    one, two = compare.read([workdir, whole])
    assert one.values("eval", "miou") == two.values("eval", "miou") != []
