"""The input benchmark: its JPEGs, and a short run of its command."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from metaformer_jax import errors
from metaformer_jax.tools import benchmark_input


@pytest.mark.parametrize("workers", [
    pytest.param(0, marks=pytest.mark.slow), 1])
def test_it_measures_on_jpegs_that_it_makes(tmp_path, workers):
  benchmark_input.write_jpegs(tmp_path, 6)
  files = sorted((tmp_path / "train").rglob("*.jpg"))
  assert len(files) == 6
  with Image.open(files[0]) as picture:
    assert picture.size == (500, 375)
  done = subprocess.run(
      [sys.executable, "-m", "metaformer_jax.tools.benchmark_input",
       f"--path={tmp_path}", "--measure", f"--workers={workers}"],
      capture_output=True, text=True, check=True)
  found = json.loads(done.stdout)
  assert found["core"] > 0 and found["wall"] > 0


def test_an_interpreter_without_timm_is_a_line():
  code = "import sys; sys.exit('No module named timm')"
  with pytest.raises(errors.ConfigError, match="No module named timm"):
    benchmark_input.run([sys.executable, "-c", code])
