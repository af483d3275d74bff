"""The input benchmark: its JPEGs, and a short run of its command."""

import json
import subprocess
import sys

import ade_tree
import fake_gcs
import pytest
from PIL import Image

from metaformer_jax import errors, storage
from metaformer_jax.tools import benchmark_input, prepare


@pytest.mark.parametrize("kind, workers", [
    *(pytest.param(kind, 0, marks=pytest.mark.slow)
      for kind in benchmark_input.KINDS), ("host", 1)])
def test_it_measures_on_jpegs_that_it_makes(tmp_path, kind, workers):
  benchmark_input.write_jpegs(tmp_path, 6)
  files = sorted((tmp_path / "train").rglob("*.jpg"))
  assert len(files) == 6
  with Image.open(files[0]) as picture:
    assert picture.size == (500, 375)
  done = subprocess.run(
      [sys.executable, "-m", "metaformer_jax.tools.benchmark_input",
       f"--path={tmp_path}", f"--measure={kind}", f"--workers={workers}"],
      capture_output=True, text=True, check=True)
  found = json.loads(done.stdout)
  assert found["core"] > 0 and found["wall"] > 0


def test_ratios_are_of_the_same_round_and_cores_are_whole():
  rates = {"decode": [1000, 2000, 1000], "resize": [800, 1600, 800],
           "device": [800, 1600, 640], "host": [500, 1000, 600],
           "timm": [250, 500, 200]}
  lines = benchmark_input.table(rates, 19733)
  assert lines[3] == "  host       600 images/s per core; 33 cores for 19733"
  assert lines[5:] == ["  host over timm: 2.00 (2.00 to 3.00); goal 1.70",
                       "  host over decode: 0.50 (0.50 to 0.60); goal 0.60",
                       "  device over resize: 1.00 (0.80 to 1.00); goal 0.74"]
  del rates["timm"]
  assert not any("timm" in line for line in benchmark_input.table(rates))


def test_what_comes_out_in_all_is_a_median_too():
  assert benchmark_input.table(
      {"read": [10, 30, 20]}, 50, {"read": [4, 2, 3]}) == [
          "  read        20 images/s per core; 3 cores for 50; 3 in all"]


def test_data_on_gs_is_measured_as_a_copy_is(tmp_path, capsys):
  """Each record of a round is read: what is counted is what was served."""
  pytest.importorskip("metaformer_jax.gcs")
  pytest.importorskip("gcp_storage_emulator")
  root = ade_tree.make(tmp_path, 16, 1)
  prepare.main(prepare.parse(["--source=ade20k", f"--path={root}",
                              f"--output={tmp_path}/o", "--shards=2"]))
  with fake_gcs.serving() as (_, proxy):
    url = f"gs://{fake_gcs.BUCKET}/o"
    for path in (tmp_path / "o").iterdir():
      storage.write(storage.path(f"{url}/{path.name}"), path.read_bytes())
    prepare.main(prepare.parse(["--stage", f"--path={url}",
                                f"--output={tmp_path}/staged"]))
    proxy.counts = True
    for path in (url, tmp_path / "staged"):
      proxy.requests.clear()
      benchmark_input.main(benchmark_input.parse(
          ["--source=array_record", f"--path={path}", "--images=16",
           "--measure=decode"]))
      rates = json.loads(capsys.readouterr().out)
      assert min(rates.values()) > 0
      n_read = sum("alt=media" in asked and "array_record" in asked
                   for _, asked, _ in proxy.requests)
      # A warm-up and three rounds; and a few requests that open the files.
      assert n_read // 16 == (4 if path == url else 0)


@pytest.mark.parametrize("args, part", [
    (["--path=gs://b/x"], "is not a local folder; mount the bucket, as"),
    (["--source=tfds", "--name=x"], "--path: is missing, with --source=tfds"),
    (["--images=0"], "'0' is not a positive integer")])
def test_a_wrong_command_line_is_one_line(args, part):
  with pytest.raises(errors.ConfigError, match=part):
    benchmark_input.main(benchmark_input.parse(args))


def test_an_interpreter_without_timm_is_a_line():
  code = "import sys; sys.exit('No module named timm')"
  with pytest.raises(errors.ConfigError, match="No module named timm"):
    benchmark_input.run([sys.executable, "-c", code])
