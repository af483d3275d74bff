"""tools.benchmark --compiled_for: costs by the compiler of a TPU elsewhere."""

import dataclasses
import json
import sys

import pytest

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.config import tasks as sections
from metaformer_jax.models import compiling
from metaformer_jax.preflight import compilation, topologies
from metaformer_jax.tools import benchmark

CFG = schema.Experiment(
    model=schema.Model(name="poolformer_s12", depths=(1, 1), dims=(8, 128),
                       token_mixers=("pooling",) * 2),
    task=sections.Classification(num_classes=4, image_size=32, mixup=0.8,
                                 cutmix=1.0))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)


def run(monkeypatch, *argv):
  monkeypatch.setattr(benchmark, "of_model", lambda name, task: CFG)
  monkeypatch.setattr(sys, "argv", ["benchmark", "--model=small", *argv])
  benchmark.main(*benchmark.parse())


def compiled(monkeypatch, capsys, *argv):
  """--json of a slice of eight chips, of which each row is checked."""
  run(monkeypatch, "--batch_size=32", "--compiled_for=v5litepod-8",
      "--dtype=bfloat16", "--json", *argv)
  found = json.loads(capsys.readouterr().out)
  for row in found["measured"]:
    parts = [o for o in found["operations"] if o["mode"] == row["mode"]]
    assert sum(o["MB"] for o in parts) == pytest.approx(row["MB"])
    assert 0 < sum(o["HBM"] for o in parts) == pytest.approx(row["HBM"])
    assert row["a chip"] == 4
    assert row["images/s"] <= 819e9 / (row["MB"] * 1e6) * 1.0001
    assert row["limit"] in ("memory", "compute", "links")
    mlps = sum(o["MB"] for o in parts if o["part"] == "stage2/mlp")
    assert 0 < mlps < row["MB"]
  return found


def test_parts_sum_to_the_compilers_count(monkeypatch, capsys):
  (row,) = compiled(monkeypatch, capsys, "--mode=infer")["measured"]
  assert row["mode"] == "infer"


@pytest.mark.slow
def test_a_step_costs_three_predictions_and_the_gradients(monkeypatch, capsys):
  found = compiled(monkeypatch, capsys)
  train, infer = found["measured"]
  assert (train["mode"], infer["mode"]) == ("train", "infer")
  assert {o["phase"] for o in found["operations"] if o["mode"] == "infer"} == {
      "forward"}
  assert 2.5 < train["GFLOP"] / infer["GFLOP"] < 3.2
  # The gradients of all parameters, summed over eight chips.
  assert train["MB sent"] > infer["MB sent"]


def test_tables_have_the_kinds_and_parts(monkeypatch, capsys):
  run(monkeypatch, "--batch_size=8", "--mode=infer", "--compiled_for=v5e-1")
  out = capsys.readouterr().out
  assert "HBM of an image by kind of operation" in out
  assert "stage1/mlp" in out


def test_a_stage_without_a_kernel_is_named(monkeypatch, capsys):
  """The step is lowered, and not compiled, as that takes a minute."""
  monkeypatch.setattr(compilation, "try_compile", lambda _: (None, 0))
  monkeypatch.setitem(globals(), "CFG", dataclasses.replace(
      CFG, compile=compiling.Compile(kernels="pallas")))
  with pytest.raises(errors.ConfigError, match=r"need 0\.00 GiB"):
    run(monkeypatch, "--batch_size=8", "--mode=train", "--compiled_for=v5e-1")
  lines = [line.partition("warning: ")[2] for line in
           capsys.readouterr().err.splitlines() if "warning: " in line]
  assert any(line.startswith("config.compile.kernels: there is no kernel for "
                             "the MLP of stage1") for line in lines), lines


@pytest.mark.parametrize("argv,message", [
    (["--compiled_for=v5e-3"], "^--compiled_for: there is no v5e-3"),
    (["--compiled_for=v5e-1", "--trace=t"], "--compiled_for: measures nothing"),
])
def test_a_mistake_is_a_line(monkeypatch, argv, message):
  with pytest.raises(errors.ConfigError, match=message):
    run(monkeypatch, *argv)


def test_what_does_not_fit_is_a_line(monkeypatch):
  with pytest.raises(errors.ConfigError, match=r"need .* GiB of each"):
    run(monkeypatch, "--image_size=256", "--batch_size=262144", "--mode=infer",
        "--compiled_for=v5e-1")
