"""The first screen, parameters.txt, and progress on terminals of any size."""

import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
import small_runs
import terminals

from metaformer_jax.models import registry
from metaformer_jax.runtime import devices, report
from metaformer_jax.training import freeze, step


def arrays(**sizes):
  """A tree of vectors: "block1/a" is named block1__a."""
  tree = {}
  for name, n in sizes.items():
    *path, last = name.split("__")
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[last] = jax.ShapeDtypeStruct((n,), jnp.float32)
  return tree


def rows_of(text):
  """{name: (parameters, share in percent, mark)} of `report.modules`."""
  found = {}
  for line in text.splitlines():
    name, n, share, mark = re.fullmatch(
        r"(.*?) +([\d,]+) +([\d.]+)%(?:  (.*))?", line).groups()
    found[name] = int(n.replace(",", "")), float(share), mark
  return found


@pytest.mark.parametrize("name,rows", [
    ("poolformer_s12",
     ["stage1", "stage2", "stage3", "stage4", "norm", "head"]),
    ("resnet18", ["stem", "stage1", "stage2", "stage3", "stage4", "head"]),
    ("deit_small_distilled_patch16_224",
     ["cls_token", "dist_token", "patch_embed", "pos_embed",
      "block1 to block12", "norm", "head", "head_dist"]),
    ("mixer_b16_224", ["patch_embed", "block1 to block12", "norm", "head"])])
def test_a_model_is_shown_in_ten_lines_in_order(name, rows):
  shapes = jax.eval_shape(registry.create_model(name).init, jax.random.key(0),
                          jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  found = rows_of(report.modules(shapes["params"]))
  assert list(found) == rows
  total = registry.get_spec(name).n_params
  assert sum(n for n, *_ in found.values()) == total
  for n, share, _ in found.values():
    assert share == pytest.approx(100 * n / total, abs=0.051)


def test_a_model_of_many_modules_is_summed_up():
  tree = arrays(**{f"{'abcdefghijklmnop'[i]}__x": 100 + i for i in range(16)})
  found = rows_of(report.modules(tree))
  assert list(found) == [*"hijklmnop", "7 others"]
  assert found["7 others"][0] == sum(range(100, 107))
  # Few numbered ones keep their lines.
  few = arrays(block1__x=1, block2__x=2, head__x=3)
  assert list(rows_of(report.modules(few))) == ["block1", "block2", "head"]


def test_what_is_frozen_is_marked():
  tree = arrays(stage1__a=1, stage1__b=2, stage2__a=3, stage2__b=4, head__a=5)
  frozen = freeze.find(("stage1", "stage2/a"), tree, None)
  found = rows_of(report.modules(tree, frozen))
  assert [mark for *_, mark in found.values()] == [
      "frozen", "partly frozen", None]
  lines = report.parameters(tree, frozen).splitlines()
  assert [line.split()[1] for line in lines if "frozen" in line] == [
      "stage1/a", "stage1/b", "stage2/a"]


def test_the_table_has_every_parameter_and_the_sum():
  tree = arrays(block10__k=7, block9__k=1_000, head__bias=3)
  tree["block9"]["w"] = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
  tree["scalar"] = jax.ShapeDtypeStruct((), jnp.float32)
  *lines, total = report.parameters(tree).splitlines()
  rows = [[cell.strip() for cell in line.strip("|").split("|")]
          for line in lines if line.startswith("|")]
  assert rows == [
      ["Name", "Shape", "Dtype", "Size", "Note"],
      ["scalar", "()", "float32", "1", ""],
      ["block9/k", "(1000,)", "float32", "1,000", ""],
      ["block9/w", "(2, 3)", "bfloat16", "6", ""],
      ["block10/k", "(7,)", "float32", "7", ""],
      ["head/bias", "(3,)", "float32", "3", ""]]
  assert total == "Total: 1,017"


def test_the_first_screen_begins_with_the_plan_and_fits(tmp_path):
  cfg = small_runs.line(model={"name": "a_package_of_mine.models:" + "Long" * 9,
                               "dtype": "bfloat16"})
  mesh = devices.make_mesh(cfg)
  state = step.build(cfg, small_runs.line_task.LineTask(), mesh, 10).shapes
  text = report.plan(cfg, state, (), mesh, 1_281_167, 50_000, 375_300,
                     pathlib.Path("run/parameters.txt"))
  lines = text.splitlines()
  assert lines[0].startswith("model          a_package_of_mine.models:Long")
  assert max(map(len, lines)) <= 80 and len(lines) <= 20
  assert lines[-1] == "all parameters: run/parameters.txt"
  assert text.index("1,281,167 to train") < text.index("100.0%")


METRICS = {"epoch": 79.96, "learning_rate": 1e-3, "images_per_second": 12_345.0,
           "input_wait": 0.02, "step_seconds": 0.3, "skipped_steps": 0,
           "bad_images": 0, "loss": 6.9312, "mean_average_precision_at_50": 0.5}


@pytest.mark.parametrize("columns,lines", [
    (80, 24), (100, 30), (40, 10), (0, 0)])
def test_lines_stay_above_a_bar_that_fits(monkeypatch, columns, lines):
  """Also in a small window, and where the size is unknown."""
  terminal = terminals.Terminal(columns, lines)
  root = logging.getLogger()
  # Others may write to streams that are closed: an error on the terminal.
  monkeypatch.setattr(root, "handlers", [])
  with terminals.stderr_on(terminal):
    handler = logging.StreamHandler()
    root.addHandler(handler)
    logging.getLogger("metaformer_jax").setLevel(logging.INFO)
    try:
      progress = report.Progress(99_000, 100_000, list(METRICS)[-2:], True)
      progress.say("compiling")
      for i in range(99_001, 99_021):
        progress.advance()
        if i == 99_007:
          logging.getLogger("metaformer_jax.data.loader").warning("a bad image")
        if i % 10 == 0:
          progress.show(i, METRICS | {"loss": i / 10_000, "bad_images": 3})
      progress.show_evaluation(99_020, {"top1": 0.5, "n_examples": 50_000,
                                        "bad_images": 0})
      progress.finish({"top1": 0.75}, "checkpoint run")
    finally:
      root.removeHandler(handler)
      logging.getLogger("metaformer_jax").setLevel(logging.NOTSET)
  written = terminal.finish()
  shown, n_wrapped = terminals.screen(written, columns or 80)
  assert n_wrapped == 0
  assert shown[:2] == ["compiling", "a bad image"]
  *history, bar, done, checkpoint, end = shown[2:]
  assert [done, checkpoint, end] == ["done: top1 0.7500", "checkpoint run", ""]
  text = " ".join(" ".join(history).split())
  assert text == " ".join([
      *(f"step {i} epoch 79.96 loss {i / 10_000:.4f} "
        "mean_average_precision_at_50 0.5000 lr 1.00e-03 12345 img/s bad "
        "images 3" for i in (99_010, 99_020)),
      "step 99020 eval top1 0.5000 n_examples 50,000"])
  assert "99%|" in bar and "99%|" not in text
  if columns != 40:
    assert "99020/100000" in bar and bar.endswith("input wait 2%]")


def test_without_a_terminal_a_window_is_one_line(caplog):
  caplog.set_level(logging.INFO)
  progress = report.Progress(0, 100, ["loss"], True)
  progress.advance()
  progress.show(40, METRICS)
  progress.close()
  assert caplog.messages == [
      "step 40/100  epoch 79.96  loss 6.9312  lr 1.00e-03  12345 img/s  "
      "input wait 2%  eta 00:18"]
  caplog.clear()
  report.Progress(0, 100, ["loss"], False).show(40, METRICS)
  assert not caplog.messages
