"""Runs that start from weights, and weights taken from runs."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch_format as tf
from flax import traverse_util
from test_pretrained import tensors_of

import metaformer_jax
from metaformer_jax import command, errors
from metaformer_jax import main as main_lib
from metaformer_jax.checkpoints import manager as checkpoints
from metaformer_jax.checkpoints import manifest
from metaformer_jax.config import schema, tasks
from metaformer_jax.convert import files, layouts
from metaformer_jax.data.sources import arrays, base
from metaformer_jax.tools import convert

ROOT = pathlib.Path(__file__).parents[2]
NAME = "randformer_s12"
MODEL = {"depths": (1,), "dims": (16,), "norm": "batch_norm",
         "token_mixers": ("random",), "res_scale_init": (1.0,)}
CFG = schema.Experiment(
    model=schema.Model(name=NAME, **MODEL),
    task=tasks.Classification(num_classes=10, image_size=16),
    data=schema.Data(source="digits"),
    optim=schema.Optim(base_lr=25.6, warmup_epochs=0.0),
    train=schema.Train(batch_size=16, steps=2, ema_decay=0.5),
    mesh=schema.Mesh(data=1),
    log=schema.Log(tensorboard=False, compilation_cache=""))
STATS = "batch_stats/stage1/block1/norm1"
STILL = schema.Optim(base_lr=1e-30, warmup_epochs=0.0, min_lr=0.0)


def flat(variables):
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(
      variables, sep="/").items()}


def load(path, **kwargs):
  return flat(metaformer_jax.load_pretrained(NAME, path, **{
      "num_classes": 10, "input_size": 16, **MODEL, **kwargs}))


def assert_same(got, want):
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].dtype == value.dtype
    assert np.array_equal(got[name], value), name


def saved(workdir, item, step=None):
  """An item of a saved step, by flat names; model_state without "params"."""
  folder = workdir / "checkpoints"
  step = step or max(int(p.name) for p in folder.iterdir())
  if item == "ema_params" and not (folder / str(step) / item).is_dir():
    raise KeyError(item)
  other = folder.parent / "other"
  shutil.copytree(folder / str(step), other)
  try:
    if item == "params":
      for average in ("ema_params", "ema_state"):
        shutil.rmtree(other / average, ignore_errors=True)
      facts = dataclasses.asdict(manifest.read(other))
      del facts["time"], facts["files"]
      facts["tree"] = {name: array for name, array in facts["tree"].items()
                       if not name.startswith("ema_")}
      manifest.write(other, **facts)
    return flat(checkpoints.read_variables(other))
  finally:
    shutil.rmtree(other)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir after 2 steps; tests must not change it."""
  workdir = tmp_path_factory.mktemp("run")
  main_lib.main(CFG, workdir)
  return workdir


@pytest.fixture(scope="module")
def weights(run, tmp_path_factory):
  """(path, values) of a file in the flax layout with known values."""
  path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
  rng = np.random.default_rng(0)
  known = {k: v if "n_batches" in k
           else rng.uniform(0.5, 1, v.shape).astype(v.dtype)
           for k, v in load(run).items()}
  files.write_safetensors(path, known, {})
  return path, known


def test_a_run_loads_from_any_of_its_folders(run):
  ema = load(run)
  last = run / "checkpoints" / "2"
  for path in (str(run), run / "checkpoints", last):
    assert_same(load(path), ema)
  assert_same(ema, saved(run, "ema_params"))
  assert ema[f"{STATS}/n_batches"] == 2
  assert np.ptp(ema[f"{STATS}/mean"]) > 0
  assert "frozen/stage1/block1/token_mixer/random_matrix" in ema
  raw = saved(run, "params")
  assert raw.keys() == ema.keys()
  for name, value in raw.items():  # Statistics are averaged as well.
    same = name.startswith("frozen/") or name.endswith("/n_batches")
    assert np.array_equal(value, ema[name]) == same, name


def test_a_runs_head_may_be_replaced_and_its_misfits_are_told(run):
  ema = load(run)
  new = load(run, num_classes=3)
  assert {k for k in ema if not np.array_equal(new[k], ema[k])} == {
      "params/head/kernel", "params/head/bias"}
  with pytest.raises(errors.WeightsError) as e:
    load(run, dims=(24,))
  assert "params/head/kernel is [16, 10], not [24, 10]" in str(e.value)
  assert str(e.value).startswith(f"{run}: in the flax layout")


@pytest.mark.parametrize("what", ["empty", "params", "metadata"])
def test_damaged_checkpoints_are_one_line(run, tmp_path, what):
  copy = tmp_path / "run"
  shutil.copytree(run, copy)
  step = copy / "checkpoints" / "2"
  ema = step / "ema_params"
  if what == "empty":
    shutil.rmtree(copy / "checkpoints")
  elif what == "params":
    shutil.rmtree(ema)
    shutil.rmtree(step / "params")
  else:
    (ema / "_METADATA").write_text("{")
  with pytest.raises(errors.WeightsError) as e:
    load(copy)
  message = str(e.value)
  assert "\n" not in message and str(copy) in message
  assert ("has no checkpoint" if what == "empty"
          else "is damaged or incomplete") in message
  assert len(message) < 1000


@pytest.mark.slow
def test_a_truncated_array_ends_the_tool(run, tmp_path):
  """In its own process, as Orbax leaves threads that would warn."""
  copy, out = tmp_path / "run", tmp_path / "out.safetensors"
  shutil.copytree(run, copy)
  largest = max((copy / "checkpoints/2/ema_params").rglob("d/*"),
                key=lambda file: file.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  done = python("-m", "metaformer_jax.tools.convert", f"--input={copy}",
                f"--output={out}", "--layout=flax")
  assert done.returncode == 2 and not out.exists()
  assert f"WeightsError: {copy}/checkpoints/2: is damaged" in done.stderr


def start(workdir, **changes):
  """A run of one step that changes no parameter."""
  main_lib.main(dataclasses.replace(CFG, **{"optim": STILL, **changes}),
                workdir)


ONE = dataclasses.replace(CFG.train, steps=1)


@pytest.mark.slow
def test_a_run_starts_from_a_file(weights, tmp_path):
  """On eight devices that share the arrays."""
  path, known = weights
  start(tmp_path, init=str(path), train=ONE,
        mesh=schema.Mesh(data=1, fsdp=8, min_size=16))
  for item in ("params", "ema_params"):
    found = saved(tmp_path, item)
    assert found.keys() == known.keys()
    for name, value in known.items():
      # Statistics have seen the one batch.
      if not name.startswith("batch_stats"):
        assert np.array_equal(found[name], value), (item, name)
  assert found[f"{STATS}/n_batches"] == 3


@pytest.mark.slow
def test_a_run_starts_from_a_run_with_another_head(run, tmp_path, monkeypatch):
  def parity(train):
    images, labels = zip(*(source[i].values() for i in range(len(source))))
    return arrays.InMemory(np.stack(images), np.array(labels) % 2)

  source = arrays.digits(True)
  monkeypatch.setattr(arrays, "digits", parity)
  monkeypatch.setattr(arrays, "DIGITS", base.Classes(2, ("even", "odd")))
  task = dataclasses.replace(CFG.task, num_classes=2)
  start(tmp_path, init=str(run), train=dataclasses.replace(ONE, ema_decay=0.0),
        task=task)
  found, ema = saved(tmp_path, "params"), load(run)
  with pytest.raises(KeyError):
    saved(tmp_path, "ema_params")
  for name, value in ema.items():
    if name.startswith("params/head"):
      assert found[name].shape == (*value.shape[:-1], 2)
    elif not name.startswith("batch_stats"):
      assert np.array_equal(found[name], value), name


@pytest.mark.slow
def test_a_resumed_run_reads_no_weights_again(weights, tmp_path):
  path = tmp_path / "weights.safetensors"
  shutil.copy(weights[0], path)
  workdir = tmp_path / "run"
  cfg = dataclasses.replace(CFG, init=str(path), optim=STILL,
                            checkpoint=schema.Checkpoint(every_steps=1))
  main_lib.main(cfg, workdir)
  shutil.rmtree(workdir / "checkpoints" / "2")
  path.write_text("no weights")
  main_lib.main(cfg, workdir)
  found = saved(workdir, "params", 2)
  assert all(np.array_equal(found[k], v) for k, v in weights[1].items()
             if k.startswith("params/"))


def test_a_misfit_ends_the_run_in_one_line(weights, tmp_path, capsys):
  """For the channels, and for the image size of a mixing matrix."""
  model = dataclasses.replace(CFG.model, dims=(24,))
  task = dataclasses.replace(CFG.task, image_size=32)
  with pytest.raises(SystemExit) as e, command.one_line_errors():
    start(tmp_path, init=str(weights[0]), model=model, task=task)
  assert e.value.code == 2
  line, = (line for line in capsys.readouterr().err.splitlines()
           if "WeightsError" in line)
  assert line.startswith(f"WeightsError: {weights[0]}: in the flax layout")
  assert "params/head/kernel is [16, 10], not [24, 10]" in line
  assert "random_matrix is [16, 16], not [64, 64]" in line
  assert "config.task.image_size" in line


def python(*args):
  return subprocess.run(
      [sys.executable, *args], cwd=ROOT, text=True, capture_output=True,
      timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_path_that_is_not_there_is_told_at_once(weights, tmp_path):
  """Before jax starts: by the time of the processor, as it may be busy."""
  before = os.times()
  done = python(
      "-m", "metaformer_jax.main", "--config=configs/quickstart.py",
      f"--workdir={tmp_path}/run", f"--config.init={weights[0]}s")
  after = os.times()
  seconds = (after.children_user - before.children_user
             + after.children_system - before.children_system)
  assert done.returncode == 2 and seconds < 2
  line, = done.stderr.splitlines()
  assert line.startswith("ConfigError: config.init: ")
  assert f"did you mean {weights[0]}?" in line


def tool(*args):
  """Runs the tool with a command line, in this process."""
  before, sys.argv = sys.argv, ["convert", *map(str, args)]
  try:
    convert.main(convert.parse())
  finally:
    sys.argv = before


@pytest.mark.slow
def test_tool_converts_pth_to_timms_safetensors(tmp_path):
  """As a user runs it: a new process."""
  given = tensors_of("resnet18", "timm", num_classes=1000)
  pth, out = tmp_path / "weights.pth", tmp_path / "weights.safetensors"
  pth.write_bytes(tf.zipped({k: tf.tensor(v) for k, v in given.items()}))
  done = python("-m", "metaformer_jax.tools.convert", "--model=resnet18",
                f"--input={pth}", f"--output={out}", "--layout=timm")
  assert done.returncode == 0, done.stderr
  assert done.stderr == f"{out}: 122 tensors of resnet18 in the timm layout\n"
  assert_same(files.read_tensors(out), given)
  assert_same(flat(metaformer_jax.load_pretrained("resnet18", out)),
              flat(metaformer_jax.load_pretrained("resnet18", pth)))


def test_tool_converts_a_run_with_its_settings(run, tmp_path):
  out = tmp_path / "out.safetensors"
  written = []
  for path in (run, run / "checkpoints",
               run / "checkpoints" / "2"):
    tool(f"--input={path}", f"--output={out}")
    written.append(files.read_tensors(out))
    out.unlink()
  want = saved(run, "ema_params")
  tensors = layouts.to_torch("metaformer_baselines", layouts.unflatten(want),
                             "official")
  for found in written:
    assert_same(found, tensors)
  assert tensors["stages.0.0.norm1.num_batches_tracked"].shape == ()
  # Measures, as a model card has them, are those of the step that is read.
  metrics = manifest.read(run / "checkpoints" / "2").metrics
  assert "top1" in metrics and checkpoints.read_metrics(run) == metrics
  with pytest.raises(errors.ConfigError, match=f"is of {NAME}, not resnet18"):
    tool(f"--input={run}", f"--output={out}", "--model=resnet18")


@pytest.mark.slow
def test_tool_says_where_timm_computes_otherwise(run, tmp_path, caplog):
  path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
  for name, differs in (("poolformerv2_s12", False), ("poolformer_s12", True)):
    given = tensors_of(name, "official", num_classes=1000)
    files.write_safetensors(path, given, {})
    tool(f"--model={name}", f"--input={path}", f"--output={out}",
         "--layout=timm")
    assert ("outputs will differ" in caplog.text) == differs
  with pytest.raises(errors.WeightsError, match="timm layout has no name for "
                     "frozen/stage1/block1/token_mixer/random_matrix"):
    tool(f"--input={run}", f"--output={out}", "--layout=timm")


@pytest.mark.parametrize("args, says", [
    ("--model=poolfomer_s12", "did you mean poolformer_s12?"),
    ("--model=poolformer_s12 --output=x.pth", "x.pth does not end with .safe"),
    ("--model=poolformer_s12 --layout=oficial", "did you mean official?"),
    ("--model=poolformer_s12 --num_classes=-1", "num_classes"),
    ("--model=poolformer_s12 --num_classes=x", "num_classes: invalid int"),
    ("--model=poolformer_s12 --in_chans=0", "in_chans"),
    ("--model=poolformer_s12 --input_size=-5", "input_size"),
    ("--model=poolformer_s12 --head_21k --num_classes=9", "gives 1000 classes"),
    ("--model=poolformer_s12 --modl=3", "unrecognized arguments: --modl=3"),
    ("--model=poolformer_s12 --input=nosuch", "nosuch: does not exist"),
    ("--model=poolformer_s12 --input=~nobody-here/x", "~nobody-here/x"),
    (f"--model=poolformer_s12 --input={'x' * 300}", "xxx"),
    ("--model=poolformer_s12", "weights.safetensors: no tensor has"),
    ("", "does not record its model, and is not named after one"),
])
def test_tool_tells_a_mistake_in_one_line(args, says, tmp_path, capsys):
  path = tmp_path / "weights.safetensors"
  files.write_safetensors(path, {"a": np.zeros(2, np.float32)}, {})
  out = tmp_path / "out.safetensors"
  with pytest.raises(SystemExit) as e, command.one_line_errors():
    tool(f"--input={path}", f"--output={out}", *args.split())
  assert e.value.code == 2
  out_, err = capsys.readouterr()
  line, = err.splitlines()
  assert says in line and out_ == "" and not out.exists()


def test_tool_replaces_a_file_only_by_a_complete_one(run, tmp_path):
  out = tmp_path / "out.safetensors"
  out.write_text("before")
  with pytest.raises(errors.ConfigError, match="does not exist"):
    tool(f"--input={tmp_path}/none", "--model=poolformer_s12",
         f"--output={out}")
  assert out.read_text() == "before"
  with pytest.raises(errors.WeightsError, match="cannot be written"):
    tool(f"--input={run}", f"--output={tmp_path}/no/out.safetensors")
  tool(f"--input={run}", f"--output={out}")
  assert files.read_tensors(out)
  assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_tool_names_a_folder_that_is_no_run(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"architectures": []}))
  with pytest.raises(errors.ConfigError, match=(
      f"^--input: {tmp_path}/config.json: was written by another version .*"
      "no key architectures")):
    tool(f"--input={tmp_path}", "--output=x.safetensors")
  with pytest.raises(errors.ConfigError, match="was written by another"):
    load(tmp_path)
