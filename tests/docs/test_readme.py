"""The Python blocks of README.md and docs/design.md; links; the story."""

import json
import re
import runpy

import jax
import numpy as np
import pages
import pytest
from PIL import Image

import metaformer_jax
from metaformer_jax.config import default, resolve, saved, typed
from metaformer_jax.convert import files, layouts

README = pages.ROOT / "README.md"
SMALL = {"depths": (1,), "dims": (8,)}
_SETTINGS = ", ".join(f"{key}={value}" for key, value in SMALL.items())


@pytest.fixture
def published(tmp_path, monkeypatch):
  """Small weights as caformer_s18's published file, and a picture."""
  monkeypatch.setenv("METAFORMER_JAX_WEIGHTS", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  config = default()
  config.model.name = "caformer_s18"
  config.model.update(SMALL | {"token_mixers": ("attention",),
                               "res_scale_init": ()})
  config.data.source = "digits"
  config.task.class_names = tuple("abcdefg")
  config.task.num_classes, config.task.image_size = 7, 32
  cfg = resolve.resolve(config, files=False)
  model = metaformer_jax.create_model("caformer_s18", num_classes=7,
                                      **cfg.model.overrides())
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))
  files.write_safetensors(
      tmp_path / "caformer_s18.safetensors",
      layouts.to_torch("metaformer_baselines", variables, "flax"),
      {saved.METADATA: typed.to_json(cfg)})
  picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  Image.fromarray(picture).save("cat.jpg")
  return variables


def test_the_readme_in_python(published):
  found = pages.run_python(README, changes=[
      ('"poolformer_s12", num_classes=10',
       f'"poolformer_s12", num_classes=10, {_SETTINGS}, '
       'token_mixers=("pooling",)'),
      ("(2, 224, 224, 3)", "(2, 32, 32, 3)")])
  assert found["features"]["stage1"].shape == (2, 8, 8, 8)
  # The second block starts from the published weights, but for the head.
  np.testing.assert_array_equal(
      found["loaded"].variables["params"]["head"]["fc2"]["kernel"],
      published["params"]["head"]["fc2"]["kernel"])
  stem = ("params", "stage1", "downsample", "conv", "kernel")
  got, want = found["variables"], published
  for name in stem:
    got, want = got[name], want[name]
  np.testing.assert_array_equal(got, want)
  assert found["variables"]["params"]["head"]["fc2"]["bias"].shape == (10,)
  assert found["logits"].shape == (2, 7)


@pytest.mark.slow
def test_the_design_in_python():
  mask = np.arange(32)[None, None, :] < np.full((2, 32, 1), 24)
  images = np.random.default_rng(0).standard_normal((2, 32, 32, 3))
  variables = {}

  def create_model(name, **kwargs):
    model = metaformer_jax.create_model(
        name, **SMALL, token_mixers=("pooling",), **kwargs)
    variables.update(jax.jit(model.init)(jax.random.key(0), images))
    return model

  class Package:
    pass

  Package.create_model = staticmethod(create_model)
  found = pages.run_python(pages.ROOT / "docs" / "design.md", {
      "metaformer_jax": Package, "images": images, "mask": mask,
      "variables": variables})
  assert found["logits"].shape == (2, 1000)
  features = np.asarray(found["features"]["stage1"])
  assert not features[:, :, 6:].any() and features[:, :, :6].all(-1).any()


def test_every_link_has_a_target():
  """Files and anchors; of addresses elsewhere, the form."""
  for page in [*pages.PAGES, pages.ROOT / "CONTRIBUTING.md"]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(),
                  flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
      if "://" in link:
        assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w.%#~/=&?-]*)?", link), (
            f"{page.name}: {link}")
        continue
      path, _, anchor = link.partition("#")
      target = page.parent / path if path else page
      assert target.exists(), f"{page.name}: {link}"
      if anchor:
        heads = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
                 for h in heads}
        assert anchor in slugs, f"{page.name}: {link}"


def test_the_story_has_the_numbers_of_the_study():
  """Each row of docs/ablation.md: ours of results.md, the paper's published."""
  results = (pages.ROOT / "docs" / "results.md").read_text()
  ours = {name: float(top1) for name, top1 in re.findall(
      r"^\| (\w+) \| [\d,]+ \| [\d,]+ \| (\d+\.\d\d) \|", results,
      re.MULTILINE)}
  table = runpy.run_path(str(pages.ROOT / "configs" / "ablations.py"))
  paper = {name: value for name, (_, value) in table["VARIANTS"].items()}
  known = {(ours[name], paper[name]) for name in ours.keys() & paper.keys()}
  # Our baseline has LayerNorm, the paper's the whole-image norm.
  known |= {(ours["baseline"], paper["layer_norm"]),
            (ours["group_norm"], paper["baseline"])}
  rows = re.findall(r"^\| .+? \| (\d+\.\d\d)(?:, [^|]+)? \| ([^|]+) \|$",
                    (pages.ROOT / "docs" / "ablation.md").read_text(),
                    re.MULTILINE)
  assert len(ours) == 23 and len(rows) > 20
  for mine, theirs in rows:
    number = re.match(r"\d+\.\d", theirs)
    assert (float(mine), number and float(number[0])) in known, (mine, theirs)


def test_the_readme_is_short_and_sets_up_by_two_commands():
  text = README.read_text()
  assert len(text.splitlines()) < 250
  assert len(re.findall(r"^python3\.11 -m venv", text, re.MULTILINE)) == 2
  assert json.dumps(text).count("docs/") > 15
