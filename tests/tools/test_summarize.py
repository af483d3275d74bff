"""The table by layer, for each task, against counts of the whole model."""

import json

import command_line
import jax
import jax.numpy as jnp
import pytest
import shipped

from metaformer_jax import tasks
from metaformer_jax.config import resolve
from metaformer_jax.models import cost
from metaformer_jax.tools import layer_table


def experiment(argument, **model):
  config = shipped.load(argument)
  config.model.update(model)
  return resolve.resolve(config, files=False)


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("argument,inputs", [
    ("configs/quickstart.py", [struct(1, 32, 32, 3)]),
    # A crop; an image of training, not of initialisation.
    ("configs/segmentation_quickstart.py",
     [struct(1, 48, 48, 3), struct(1, 48, 48, dtype=bool)]),
    ("configs/detection_quickstart.py:mask_rcnn",
     [struct(1, 96, 128, 3), struct(1, 96, 128, dtype=bool)]),
])
def test_every_task_has_layers_that_add_up(argument, inputs):
  cfg = experiment(argument)
  found = layer_table.of_experiment(cfg, depth=2)
  _, task = tasks.create(cfg, files=False)
  shapes = jax.eval_shape(task.model.init, jax.random.key(0),
                          *task.init_inputs())
  assert found["inputs"] == [list(x.shape) for x in inputs]
  params = jax.tree.leaves(shapes["params"])
  total = found["total"]
  assert total["params"] == sum(x.size for x in params)
  assert total["param_bytes"] == 4 * total["params"]
  assert total["macs"] == cost.of_inputs(task.model, *inputs).macs
  layers = [row["layer"] for row in found["layers"]]
  assert len(set(layers)) == len(layers)
  if cfg.task.name == "detection":
    assert {"rpn/conv", "box_head/fc1", "mask_head/conv1"} <= set(layers)


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_depths_divide_the_same_sums(depth):
  found = layer_table.of_model("resnet18", depth)
  whole = layer_table.of_model("resnet18", 1)
  assert found["total"] == whole["total"]
  for key, total in found["total"].items():
    assert sum(row[key] for row in found["layers"]) == total
  # What is below a row of the first depth is that row, if it has no own.
  of_stage = {row["layer"]: row for row in whole["layers"]}["stage2"]
  for key in found["total"]:
    assert of_stage[key] == sum(
        row[key] for row in found["layers"]
        if row["layer"].split("/")[0] == "stage2")
  assert max(row["layer"].count("/") for row in found["layers"]) == (
      min(depth, 4) - 1)  # stage2/block1/downsample/conv.
  # Of the paper's table 1: 3x3 kernels of 64 channels at 56 x 56.
  if depth > 2:
    (conv,) = [row for row in found["layers"]
               if row["layer"] == "stage1/block2/conv1"]
    assert conv == {
        "layer": "stage1/block2/conv1", "module": "Conv",
        "output": [[1, 56, 56, 64]], "params": 9 * 64 * 64,
        "macs": 9 * 64 * 64 * 56 * 56, "activation_bytes": 4 * 64 * 56 * 56,
        "param_bytes": 4 * 9 * 64 * 64}


def test_text_has_the_same_rows():
  found = layer_table.of_model("poolformer_s12", 1)
  lines = layer_table.text(found).splitlines()
  assert lines[0] == "poolformer_s12, classification, inputs 1 x 224 x 224 x 3"
  *_, head, total = lines
  assert head.split()[:5] == ["head", "Dense", "1", "x", "1000"]
  assert total.split() == ["total", *(f"{found['total'][key]:,}" for key in (
      "params", "macs", "activation_bytes", "param_bytes"))]
  assert total.split()[1] == "11,915,176"  # The paper's 12 M.
  with pytest.raises(ValueError, match="unknown model 'resnt18'; did you mean"):
    layer_table.of_model("resnt18", 1)


def test_the_command_reads_a_config_and_its_overrides():
  done = command_line.python([
      "-m", "metaformer_jax.tools.summarize", "--depth=1", "--json",
      "--config=configs/quickstart.py", "--config.model.depths=(1,1,1,1)"])
  assert not done.returncode, done.stderr
  found = json.loads(done.stdout)
  assert found["inputs"] == [[1, 32, 32, 3]]
  assert [row["layer"] for row in found["layers"]] == [
      "stage1", "stage2", "stage3", "stage4", "norm", "head"]
  cfg = experiment("configs/quickstart.py", depths=(1, 1, 1, 1))
  assert found == layer_table.of_experiment(cfg, 1)


@pytest.mark.parametrize("argv,message", [
    (["--model=resnet18", "--config=configs/quickstart.py"],
     "command line: --model cannot be combined with --config"),
    (["--conf=x"], "command line: unrecognized arguments: --conf=x"),
])
def test_mistakes_are_one_line(argv, message):
  done = command_line.python(["-m", "metaformer_jax.tools.summarize", *argv])
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith(f"ConfigError: {message}"), done.stderr
  assert done.stderr.count("\n") == 1
