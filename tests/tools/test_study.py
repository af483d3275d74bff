"""A study: variants and seeds are run, resumed, skipped and compared."""

import dataclasses
import json
import sys

import fake_gcs
import pytest
import shipped

from metaformer_jax import errors, storage
from metaformer_jax.config.tasks import Measure
from metaformer_jax.tools import study, study_plot, variants

TOP1 = Measure("top1", True, is_fraction=True)
LOSS = Measure("loss", False)

FAMILIES = [path for path in shipped.FILES
            if "VARIANTS" in shipped.names_of(path)]
CONFIG = '''
from metaformer_jax.config import default

SEEDS = (0, 1)
VARIANTS = {"pooling": ({}, 77.2),
            "wide": {"model.dims": (16, 16)}}

def get_config():
  config = default()
  config.model.name = "poolformer_s12"
  config.task.num_classes = 10
  config.model.depths = (1, 1)
  config.model.dims = (8, 16)
  config.model.token_mixers = ("pooling",) * 2
  config.data.source = "digits"
  config.task.image_size = 8
  config.train.batch_size = 16
  config.train.steps = 2
  config.optim.warmup_epochs = 0.0
  config.mesh.data = 1
  config.log.tensorboard = False
  config.log.compilation_cache = ""
  return config
'''
# Rows that the file's own get_config reads.
COLUMNS = CONFIG.replace('"wide": {"model.dims": (16, 16)}', (
    '"wide": ((16, 16), "more", (80.0, 70.0))')).replace('({}, 77.2)', (
        '((8, 16), "columns", None)')).replace("get_config()", (
            "get_config(variant)")).replace("(8, 16)\n", (
                "VARIANTS[variant][0]\n"))


@pytest.fixture
def run(tmp_path, monkeypatch):
  path = tmp_path / "study.py"
  path.write_text(CONFIG)
  monkeypatch.setattr(sys, "argv", ["study"])

  def call(*args):
    sys.argv = ["study", f"--config={call.config}",
                f"--workdir={call.folder}", *args]
    study.main(study.parse())
    return json.loads((call.folder / "study.json").read_text())

  call.path, call.config, call.folder = path, str(path), tmp_path / "runs"
  return call


@pytest.mark.slow
def test_runs_what_is_missing_and_compares_all(run, capsys):
  rows = run("--only=pooling", "--seeds", "0")
  assert [(r["variant"], len(r["top1"])) for r in rows] == [("pooling", 1)]
  before = (run.folder / "pooling/seed_0/result.json").stat().st_mtime_ns
  run("--part=0/2")  # Of four runs the first and the third.
  rows = run("--part=1/2")
  assert [(r["variant"], len(r["top1"]), r["published"]) for r in rows] == [
      ("pooling", 2, 77.2), ("wide", 2, None)]
  done = run.folder / "pooling/seed_0/result.json"
  assert done.stat().st_mtime_ns == before  # Skipped.
  assert capsys.readouterr().out.count("pooling, seed") == 2
  for row in rows:
    runs = [json.loads((run.folder / row["variant"] / f"seed_{seed}"
                        / "summary.json").read_text()) for seed in (0, 1)]
    assert row["top1"] == [100 * r["top1"] for r in runs]
    assert row["n_params"] == runs[0]["n_params"]
  assert rows[1]["macs"] > rows[0]["macs"]
  table = (run.folder / "study.md").read_text().splitlines()
  assert len(table) == 2 + 2
  mean = sum(rows[0]["top1"]) / 2
  assert [cell.strip() for cell in table[2].split("|")[1:]][:2] == [
      "pooling", f"{rows[0]['n_params']:,}"]
  assert f" {mean:.2f} |" in table[2] and table[2].endswith(" 77.2 |")
  assert (run.folder / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_study_on_gs_is_that_on_disk(run):
  pytest.importorskip("metaformer_jax.gcs")
  pytest.importorskip("gcp_storage_emulator")
  args = ("--only=pooling", "--seeds", "0")
  want = run(*args)
  with fake_gcs.serving() as (_, proxy):
    run.folder = storage.path(f"gs://{fake_gcs.BUCKET}/study")
    assert run(*args) == want
    assert (run.folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "| pooling |" in (run.folder / "study.md").read_text()
    proxy.counts = True
    assert run(*args) == want  # Its run is finished.
    asked = [path for _, path, _ in proxy.requests]
    assert asked and not any("checkpoints" in path for path in asked)


def test_runs_are_compared_by_the_best_metric(run, capsys):
  row, = run("--only=pooling", "--seeds", "0", "--set",
             "checkpoint.best_metric=loss")
  result = json.loads((run.folder / "pooling/seed_0/result.json").read_text())
  assert row["loss"] == [result["loss"]] and "top1" not in row
  text = (run.folder / "study.md").read_text()
  head, _, line = text.splitlines()
  assert [cell.strip() for cell in head.split("|")[3:6]] == [
      "MACs", "loss", "least - most"]
  assert f" {result['loss']:.2f} |" in line
  end = [str(run.folder / f"study.{kind}") for kind in ("md", "json", "png")]
  assert capsys.readouterr().out.endswith(f"{text}\n" + "\n".join(end) + "\n")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
  """Draws rows of {name: values}; returns the axes."""
  figures = []
  monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                      lambda figure, *_, **__: figures.append(figure))

  def draw(found, measure, published=None):
    study_plot.draw(
        [{"variant": name, "n_params": 10**i, "macs": 2 * 10**i,
          "published": published, measure.name: values}
         for i, (name, values) in enumerate(found.items())],
        measure, measure.name, tmp_path / "study.png")
    return figures[-1].axes

  return draw


@pytest.mark.parametrize("measure, values, order", [
    (TOP1, (80.0, 90.0), "ba"), (LOSS, (2.0, 1.5), "ba"),
    (Measure("gain", True), (2.0, 1.5), "ab")])
def test_plot_has_the_best_at_the_top(drawn, measure, values, order):
  axes, params, _ = drawn(
      {"a": [values[0]], "none": [], "b": [values[1]]}, measure)
  low, high = axes.get_ylim()
  assert low > high  # Row 0 is at the top.
  names = [label.get_text() for label in axes.get_yticklabels()]
  assert names == [*order, "none"]
  shown = [text.get_text() for text in axes.texts]
  assert shown == [*(f"{values['ab'.index(name)]:.2f}" for name in order),
                   "diverged"]
  widths = dict(zip(names, (bar.get_width() for bar in params.patches)))
  assert widths == {"a": 1, "none": 10, "b": 100}
  assert ("lower is better" in axes.get_xlabel()) != measure.higher_is_better


def test_plot_has_each_seed_and_the_published_value(drawn):
  axes, *_ = drawn({"a": [80.0, 84.0], "b": [70.0, 75.0]}, TOP1, 78.0)
  points = {(line.get_marker(), float(y)): list(map(float, line.get_xdata()))
            for line in axes.lines for y in line.get_ydata()}
  assert points == {
      ("o", 0): [80, 84], ("|", 0): [82], ("x", 0): [78],
      ("o", 1): [70, 75], ("|", 1): [72.5], ("x", 1): [78]}


def test_plot_of_many_keeps_them_apart_from_one_that_failed(drawn):
  found = {f"v{i}": [85.0 + i / 10] for i in range(20)} | {"broken": [10.0]}
  axes, *_ = drawn(found, TOP1)
  low, high = axes.get_xlim()
  assert 80 < low < 85 and 86.9 < high < 90
  assert axes.texts[-1].get_text() == "10.00"
  edge, = (line for line in axes.lines if line.get_marker() == "<")
  assert list(edge.get_xdata()) == [low]
  axes, *_ = drawn(dict(list(found.items())[:3]) | {"broken": [10.0]}, TOP1)
  assert axes.get_xlim()[0] < 10  # Of a few, all are within.


def test_variants_with_different_measures_are_refused(run):
  run.path.write_text(CONFIG.replace('"model.dims": (16, 16)', (
      '"checkpoint.best_metric": "loss"')))
  with pytest.raises(errors.ConfigError, match="differs between the variants"):
    run()


def test_table_shows_what_diverged():
  table = study.table([
      {"variant": "a", "n_params": 1000, "macs": 2000, "top1": [50.0, 52.0],
       "published": 51.0, "diverged": 1},
      {"variant": "b", "n_params": 1, "macs": 2, "top1": [], "published": None,
       "diverged": 3}], TOP1)
  assert [[cell.strip() for cell in line.split("|")[1:-1]]
          for line in table.splitlines()[2:]] == [
      ["a", "1,000", "2,000", "51.00", "50.00 - 52.00", "3, 1 diverged",
       "51.0"],
      ["b", "1", "2", "diverged", "", "3", ""]]
  assert len({len(line) for line in table.splitlines()}) == 1  # Aligned.


def names(run, *args):
  """The variants of a command line, and their experiments with seed 0."""
  sys.argv = ["study", "--config=x", "--workdir=x", *args]
  parsed = study.parse()
  file = variants.read(run.config)
  found = variants.of(file, parsed.sweep)
  return {name: variants.experiment(file, name, variant, 0, parsed.set)
          for name, variant in found.items()}


def test_settings_are_applied(run):
  cfgs = names(run, "--set", "train.batch_size=32")
  assert [cfg.model.dims for cfg in cfgs.values()] == [(8, 16), (16, 16)]
  assert all(cfg.train.batch_size == 32 for cfg in cfgs.values())
  variants.require_different(cfgs)


def test_columns_are_read_by_the_file(run):
  run.path.write_text(COLUMNS)
  found = variants.of(variants.read(run.config), [])
  assert [(variant.settings, variant.published)
          for variant in found.values()] == [((), None), ((), 80.0)]
  assert [cfg.model.dims for cfg in names(run).values()] == [
      (8, 16), (16, 16)]


@pytest.mark.parametrize("argument, prefixes", [
    (":wide", ["wide,"]), ("", ["pooling,", "wide,"])])
def test_sweeps_are_products(run, argument, prefixes):
  run.config += argument
  cfgs = names(run, "--sweep", "optim.base_lr=1e-3,0.003", "--sweep",
               'model.token_mixers=("pooling","pooling"),("identity", '
               '"depthwise_conv")')
  mixers = ("pooling", "pooling"), ("identity", "depthwise_conv")
  assert [(cfg.model.dims, cfg.optim.base_lr, cfg.model.token_mixers)
          for cfg in cfgs.values()] == [
              ((16, 16) if prefix == "wide," else (8, 16), rate, mixer)
              for prefix in prefixes for rate in (1e-3, 3e-3)
              for mixer in mixers]
  assert list(cfgs) == [
      f"{prefix}base_lr={rate},token_mixers={mixer}" for prefix in prefixes
      for rate in ("0.001", "0.003")
      for mixer in ("pooling+pooling", "identity+depthwise_conv")]
  # A published value is that of the row as it is.
  assert {v.published for v in variants.of(
      variants.read(run.config), [("seed", (1,))]).values()} == {None}


def test_names_of_sweeps_are_names_of_folders(run):
  run.path.write_text(CONFIG.replace("VARIANTS", "OTHERS"))
  file = variants.read(run.config)

  def name(key, value):
    found, = variants.of(file, [(key, (value,))])
    return found

  assert name("model.name", "a/b:c") == "model.name=a%2Fb:c"
  assert name("model.pool_size", 5) == "pool_size=5"
  one, other = (name("task.class_names", ("x" * 300, end)) for end in "ab")
  assert one != other and len(one) < 150


SHIPPED = {"configs/caformer.py:s18": [
               "--set", "data.source=digits", "--set", "task.num_classes=10",
               "--set", "data.path=None"],
           "configs/segmentation_quickstart.py": [],
           "configs/detection_quickstart.py": []}


@pytest.mark.parametrize("path", SHIPPED)
def test_every_task_is_swept(run, path):
  run.config = str(shipped.ROOT / path)
  cfgs = names(run, *SHIPPED[path], "--sweep", "optim.base_lr=0.25,0.5",
               "--sweep", "model.drop_path_rate=0.0,0.5")
  assert [(cfg.optim.base_lr, cfg.model.drop_path_rate)
          for cfg in cfgs.values()] == [
              (0.25, 0.0), (0.25, 0.5), (0.5, 0.0), (0.5, 0.5)]


@pytest.mark.parametrize("row", [
    "{}", '{"model.pool_size": 3}', '{"model.norm": "group_norm"}',
    '({"model.dims": (8, 16)}, 50.0)'])
def test_equal_variants_are_refused(run, row):
  """Also if one names what is the model's own hyper-parameter."""
  run.path.write_text(CONFIG.replace('{"model.dims": (16, 16)}', row))
  with pytest.raises(errors.ConfigError,
                     match="variants pooling and wide: are the same exper"):
    run()
  assert not run.folder.exists()


def test_a_get_config_that_ignores_its_argument_is_noticed(run):
  run.path.write_text(COLUMNS.replace("VARIANTS[variant][0]", "(8, 16)"))
  with pytest.raises(errors.ConfigError, match="pooling and wide: are the s"):
    run()


@pytest.mark.slow
def test_finished_runs_of_another_experiment_are_refused(run):
  run("--only=pooling", "--seeds", "0")
  with pytest.raises(errors.ConfigError, match=(
      r"seed_0 has another experiment \(train\.steps: 2 -> 3\)")):
    run("--only=pooling", "--seeds", "0", "--set", "train.steps=3")
  assert len(run("--only=pooling", "--seeds", "0", "--set",
                 "log.every_steps=1")) == 1


@pytest.mark.parametrize("args,says", [
    (["--only=poling"], "did you mean pooling"),
    (["--set", "train.stps=3"], "did you mean train.steps"),
    (["--set", "train.steps=many"], "train.steps"),
    (["--set", "train.steps=0"], "config.train.steps: 0 is below"),
    (["--set", "seed=3"], "use --seeds"),
    (["--sweep", "seed=3,4"], "use --seeds"),
    (["--sweep", "optim.lr=1,2"], "no such key; did you mean optim"),
    (["--sweep", "train.steps=1,many"], "variant .*: train.steps='many'"),
    (["--sweep", "train.steps"], "not KEY=VALUE,VALUE"),
    (["--sweep", "train.steps=1,,2"], "not KEY=VALUE,VALUE"),
    (["--sweep", "train.steps=1,2,1"], "train.steps=1 is given twice"),
    (["--sweep", "train.steps=1", "--sweep", "train.steps=2"], "given twice"),
    (["--sweep", "train.steps=1,2", "--set", "train.steps=2"], "is swept, too"),
    (["--part=2/2"], "not INDEX/COUNT"),
    (["--part=x"], "not INDEX/COUNT"),
    (["--seed", "1", "--nonsense"], "unrecognized"),
])
def test_mistakes_are_reported_before_anything_runs(run, args, says):
  with pytest.raises(errors.ConfigError, match="(?i)" + says) as e:
    run(*args)
  assert len(str(e.value).splitlines()) == 1
  assert not run.folder.exists()


@pytest.mark.parametrize("text,says", [
    (None, "is not a file"), ("import nonsense", "ModuleNotFoundError"),
    ("VARIANTS = {}", "has no get_config"),
    (CONFIG.replace("VARIANTS", "VARIATIONS").replace("(0, 1)", "(0,)"),
     "has no VARIANTS, so that there is nothing to compare"),
    (CONFIG.replace('"wide": ', '"../wide": '), "cannot be the name of a fold"),
    (CONFIG.replace('({}, 77.2)', '"identity"'), "neither settings"),
    (CONFIG.replace("return config", "return 3"), "returned 3, not a ConfigD"),
    (CONFIG.replace("return config", "1 / 0"), "pooling: ZeroDivisionError"),
    (CONFIG.replace('"model.dims"', '"dims"'), "did you mean model.dims")])
def test_files_that_are_not_a_study_are_refused(run, text, says):
  run.path.unlink()
  if text is not None:
    run.path.write_text(text)
  with pytest.raises(errors.ConfigError, match=says):
    run()


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_every_shipped_family_is_a_study(path, tmp_path):
  file = variants.read(str(path))
  data = [("data.source", "tfds"), ("data.name", "imagenet2012"),
          ("data.path", str(tmp_path))]
  if "ade20k" in path.stem:
    data = [("data.source", "scenes"), ("task.num_classes", 11)]
  if "coco" in path.stem:
    data = [("data.source", "scenes"), ("task.num_classes", 10)]
  cfgs = {}
  for name, variant in variants.of(file, []).items():
    assert variant.published is None or 0 < variant.published < 100
    cfgs[name] = variants.experiment(
        file, name, variant, 3, [*data, ("init", None)])
    assert cfgs[name].seed == 3
    # The weights of `init` are not on this machine.
    config = variants.get_config(file, variant)
    cfgs[name] = dataclasses.replace(cfgs[name], init=config.init)
  variants.require_different(cfgs)
