"""The comparison of runs: its values, and what it makes of odd folders."""

import base64
import html.parser
import json
import os
import sys
import xml.etree.ElementTree

import pytest
from PIL import Image

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.config import default, resolve, saved
from metaformer_jax.tools import compare

EVIL = '<script>alert(1)</script><img src="http://a/b">&"\'$x_{$'


def experiment(task="classification", **settings):
  config = default(task)
  config.model.name = "poolformer_s12"
  config.model.depths = (1, 1, 1, 1)
  config.model.dims = (8, 16, 16, 16)
  config.task.num_classes = 10
  if task == "classification":
    config.task.image_size = 32
  config.data.source = "digits" if task == "classification" else "scenes"
  config.update_from_flattened_dict(settings)
  return resolve.resolve(config, files=False)


def write(folder, cfg, evals, summary=True, name="top1", counts=True):
  """A run's folder: {step: value of the measure}, the loss is 1 / step.

  With `counts`, it is one of a study, so that its model is not traced.
  """
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(saved.text(cfg))
  lines = []
  for step, value in evals.items():
    lines += [{"step": step, "split": "train", "loss": 1 / step,
               "images_per_second": 10.0 * step, "goodput": 0.5},
              {"step": step, "split": "eval", name: value}]
  (folder / "metrics.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines))
  if counts:
    (folder / "result.json").write_text('{"n_params": 3, "macs": 4}')
  if summary:
    (folder / "summary.json").write_text(json.dumps(
        {"step": max(evals, default=0), name: list(evals.values())[-1],
         "n_params": 5, "images_per_second": 77.0, "checkpoint": "a"}))
  return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """Runs the tool; returns what it printed, the page and its tables."""

  def call(*folders):
    monkeypatch.setattr(sys, "argv", [
        "compare", *map(str, folders), f"--output={tmp_path / 'out'}"])
    compare.main(compare.parse())
    text = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    with Image.open(tmp_path / "out/compare.png") as picture:
      assert picture.width > 300
    return capsys.readouterr().out, text, Page(text)

  return call


class Page(html.parser.HTMLParser):
  """What a browser would make of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.rows = set(), [], {}
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.add(tag)
    self.attributes += [(tag, *item) for item in attributes]
    if tag == "tr":
      self._row = []
    elif tag in ("th", "td"):
      self._row.append("")

  def handle_endtag(self, tag):
    if tag == "tr":
      self.rows.setdefault(self._row[0], []).append(self._row[1:])

  def handle_data(self, data):
    if getattr(self, "_row", None):
      self._row[-1] += data.strip()

  def pictures(self):
    """The SVGs of the page."""
    start = "data:image/svg+xml;base64,"
    found = [value for tag, name, value in self.attributes
             if (tag, name) == ("img", "src")]
    assert all(value.startswith(start) for value in found)
    return [xml.etree.ElementTree.fromstring(base64.b64decode(
        value.removeprefix(start))) for value in found]


def test_values_and_differences(run, tmp_path):
  base = experiment()
  write(tmp_path / "runs/a/seed_0", base, {10: 0.5, 20: 0.75, 30: 0.625},
        counts=False)
  write(tmp_path / "runs/b/seed_0", experiment(**{
      "optim.base_lr": 0.5, "model.dims": (8, 16, 16, 24),
      "data.path": "elsewhere"}), {10: 0.25, 20: 0.5}, summary=False,
      counts=False)
  out, _, page = run(tmp_path / "runs/a/seed_0", tmp_path / "runs/b/seed_0")
  assert page.rows[""] == [["a", "b"]] * 2
  assert page.rows["state"] == [
      ["finished at step 30", "unfinished at step 20"]]
  assert page.rows["final top1, percent \u2191"] == [["62.5", "50"]]
  assert page.rows["best top1, percent \u2191"] == [
      ["75 at step 20", "50 at step 20"]]
  assert page.rows["training images a second"] == [["77", "150"]]
  n_params = [metaformer_jax.create_model(
      "poolformer_s12", depths=(1,) * 4, dims=dims, num_classes=10)
      for dims in ((8, 16, 16, 16), (8, 16, 16, 24))]
  assert page.rows["parameters"] == [
      [f"{count(model):,}" for model in n_params]]
  macs = [int(text.replace(",", ""))
          for text in page.rows["MACs of one image"][0]]
  assert 0 < macs[0] < macs[1]
  assert {key: rows for key, rows in page.rows.items() if "." in key} == {
      "optim.base_lr": [["0.001", "0.5"]],
      "model.dims": [["[8, 16, 16, 16]", "[8, 16, 16, 24]"]],
      "data.path": [["None", "elsewhere"]]}
  assert ("td", "class", "best") in page.attributes
  assert len(page.pictures()) == 2  # The loss, and top-1.
  header, a, b, *paths = out.splitlines()
  assert header.split()[:3] == ["run", "state", "top1"]
  assert "62.5000" in a and "75.0000" in a and "50.0000" in b
  assert paths == [str(tmp_path / "out/compare.html"),
                   str(tmp_path / "out/compare.png")]


def count(model):
  import jax  # noqa: PLC0415
  import jax.numpy as jnp  # noqa: PLC0415

  shapes = jax.eval_shape(model.init, jax.random.key(0),
                          jnp.zeros((1, 32, 32, 3)))
  return sum(x.size for x in jax.tree.leaves(shapes["params"]))


def test_lower_losses_are_better(run, tmp_path):
  for name, values in (("a", {1: 0.5, 2: 0.25, 3: float("nan"), 4: 0.75}),
                       ("b", {1: 2.0, 2: float("nan")})):
    write(tmp_path / name, experiment(), values, name="loss")
  _, text, page = run(tmp_path / "a", tmp_path / "b")
  assert page.rows["best loss \u2193"] == [["0.25 at step 2", "2 at step 1"]]
  assert page.rows["final loss \u2193"] == [["0.75", "nan"]]
  assert "<td class=best>0.25 at step 2</td>" in text
  assert "<td>2 at step 1</td>" in text
  assert "There are none." in text  # No differences.


def test_runs_of_other_tasks_have_a_table_each(run, tmp_path):
  write(tmp_path / "a", experiment(), {1: 0.5})
  write(tmp_path / "b", experiment("segmentation"), {1: 0.25}, name="miou")
  _, text, page = run(tmp_path / "a", tmp_path / "b")
  assert "<h2>classification</h2>" in text and "<h2>segmentation</h2>" in text
  assert page.rows[""] == [["a"], ["b"], ["a", "b"]]
  assert page.rows["final top1, percent \u2191"] == [["50"]]
  assert page.rows["final miou, percent \u2191"] == [["25"]]
  assert page.rows["task.name"] == [["classification", "segmentation"]]
  assert len(page.pictures()) == 4


def test_one_run_and_a_run_without_evaluations(run, tmp_path):
  write(tmp_path / "a", experiment(), {1: 0.5})
  _, text, page = run(tmp_path / "a")
  assert "<title>a</title>" in text and "one run only" in text
  assert "td class=best" not in text
  assert page.rows["final top1, percent \u2191"] == [["50"]]
  write(tmp_path / "b", experiment(), {}, summary=False)
  _, text, page = run(tmp_path / "b")
  assert page.rows["state"] == [["unfinished at step 0"]]
  assert "nothing to draw yet" in text and page.pictures() == []


def test_texts_of_runs_are_escaped(run, tmp_path):
  evil = EVIL.replace("/", "%")  # As the name of a folder.
  cfg = experiment(**{"data.path": EVIL, "task.class_names": tuple(
      f"{EVIL}{i}" for i in range(10))})
  own = json.loads(saved.text(experiment(**{"data.path": "b"}))) | {
      "task": {"name": "their_task:Task", "key": EVIL}}
  write(tmp_path / evil, cfg, {1: 0.5})
  write(tmp_path / "own", cfg, {1: 0.5, 2: 0.25}, name=EVIL)
  (tmp_path / "own/config.json").write_text(json.dumps(own))
  out, text, page = run(tmp_path / evil, tmp_path / "own")
  assert page.tags == {"html", "head", "meta", "title", "style", "body", "h1",
                       "h2", "div", "table", "tr", "th", "td", "span", "img"}
  assert {name for _, name, _ in page.attributes} <= {
      "lang", "charset", "name", "content", "http-equiv", "class", "style",
      "alt", "src"}
  assert "default-src 'none'" in text and text.count("<script") == 0
  assert page.rows["data.path"] == [[EVIL, "b"]]
  assert page.rows["task.key"] == [["", EVIL]]
  assert page.rows[f"final {EVIL}"] == [["0.25"]]  # Its direction is unknown.
  assert f"best {EVIL}" not in page.rows
  for picture in page.pictures():
    for element in picture.iter():
      assert "script" not in element.tag and "image" not in element.tag
      assert all(value.startswith("#") for key, value in element.items()
                 if key.endswith("href"))
  assert evil in out


def test_their_modules_are_not_imported(run, tmp_path, monkeypatch):
  (tmp_path / "their_data.py").write_text("open('imported', 'w')\n")
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  cfg = experiment(**{"data.source": "their_data:Data"})
  write(tmp_path / "a", cfg, {1: 0.5}, counts=False)
  _, _, page = run(tmp_path / "a")
  assert page.rows["MACs of one image"] == [[""]]
  assert page.rows["parameters"] == [["5"]]  # As its summary says.
  assert not (tmp_path / "imported").exists()


def test_counts_of_a_study_are_taken(run, tmp_path):
  write(tmp_path / "a", experiment(), {1: 0.5})
  _, _, page = run(tmp_path / "a")
  assert page.rows["parameters"] == [["3"]]
  assert page.rows["MACs of one image"] == [["4"]]


@pytest.mark.parametrize("damage, says", [
    (lambda a: a.joinpath("config.json").unlink(), "not the folder of a run"),
    (lambda a: a.joinpath("config.json").write_text("{"), "config.json: "),
    (lambda a: a.joinpath("config.json").write_text('{"new": 1}'),
     "another version"),
    (lambda a: a.joinpath("summary.json").write_text("[1]"), "summary.json: "),
    (lambda a: (a.joinpath("metrics.jsonl").unlink(),
                os.mkfifo(a / "metrics.jsonl")), "metrics.jsonl: "),
    (lambda a: a.parent.joinpath("out").write_text(""), "--output: ")])
def test_mistakes_are_one_line(run, tmp_path, damage, says):
  folder = write(tmp_path / "a", experiment(), {1: 0.5})
  damage(folder)
  with pytest.raises(errors.ConfigError, match=says) as e:
    run(folder)
  assert len(errors.one_line(e.value).splitlines()) == 1


def test_a_run_twice_is_a_mistake(run, tmp_path):
  write(tmp_path / "a", experiment(), {1: 0.5})
  (tmp_path / "b").symlink_to("a")
  with pytest.raises(errors.ConfigError, match="b: is given twice"):
    run(tmp_path / "a", tmp_path / "b")
