"""The input benchmark: its JPEGs, and a short run of its command."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from metaformer_jax import errors
from metaformer_jax.tools import benchmark_input


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


def test_an_interpreter_without_timm_is_a_line():
  code = "import sys; sys.exit('No module named timm')"
  with pytest.raises(errors.ConfigError, match="No module named timm"):
    benchmark_input.run([sys.executable, "-c", code])
