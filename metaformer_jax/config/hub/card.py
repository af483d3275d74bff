"""The model card of a folder: README.md with a header for the hub."""

import dataclasses
from collections.abc import Mapping

from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry

# Of each layout: the library's name on the hub, and how it loads a folder.
_LOADING = {
    "huggingface": ("transformers", """\
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModelForImageClassification.from_pretrained("FOLDER")"""),
    "timm": ("timm", """\
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
config = timm.data.resolve_data_config(model=model)
transform = timm.data.create_transform(**config)"""),
}

# Of a family in a layout: which models its program computes otherwise.
_NOTES = {
    ("poolformer", "timm"): (
        lambda ours: ours.head_norm_first,
        "timm computes PoolFormer's head in another order than the paper's "
        "code, mean before norm: its outputs will differ"),
    ("pvt", "huggingface"): (
        lambda ours: ours.embed_norm_eps != ours.norm_eps,
        "transformers has one epsilon for all of PVT's norms, the paper's code "
        "a larger one after patches and reductions: its outputs will differ, "
        "by little"),
}

_CARD = """\
---
library_name: {library}
pipeline_tag: image-classification
tags:
- image-classification
- {library}
- metaformer_jax
---

# {name}

{what}

| | |
|---|---|
{table}

## Loading

With {library}:

```python
{loading}
```

With metaformer_jax, in JAX:

```python
import metaformer_jax

loaded = metaformer_jax.load("FOLDER")
loaded.predict("cat.jpg")[0]["classes"][:5]
```
"""


def note(cfg: Experiment, layout: str) -> str | None:
  """How the outputs of a layout's program differ from ours, if they do."""
  row = registry.get_spec(cfg.model.name)
  applies, words = _NOTES.get((row.family, layout), (None, None))
  ours = row.override(**cfg.model.overrides())
  return words if applies and applies(ours) else None


def text(cfg: Experiment, layout: str, measures: Mapping[str, float]) -> str:
  """The card of a classifier.

  It has no license: what may be done with weights depends on their data, and
  is not recorded.

  Args:
    cfg: the experiment that made the weights, complete.
    layout: "huggingface" or "timm".
    measures: of their evaluation; may be empty.
  """
  task, data = cfg.task, cfg.data
  row = registry.get_spec(cfg.model.name)
  library, loading = _LOADING[layout]
  overrides = cfg.model.overrides()
  changed = ", ".join(
      f"{f.name}={overrides[f.name]}" for f in dataclasses.fields(row.settings)
      if f.name in overrides and f.metadata["role"] != "training")
  what = f"An image classifier, the architecture {row.name}"
  what += f" with {changed}." if changed else "."
  differs = note(cfg, layout)
  rows = {
      "Classes": task.num_classes,
      "Image size": f"{task.image_size} x {task.image_size} pixels",
      "Evaluation": f"shorter side to {int(task.image_size / task.crop_pct)} "
      f"pixels, {task.interpolation}; then the centre",
      "Mean of R, G, B": _numbers(data.mean),
      "Standard deviation": _numbers(data.std),
      **{f"Measured {measure.name}": f"{measures[measure.name]:.4f}"
         for measure in task.MEASURES if measure.name in measures}}
  return _CARD.format(
      library=library, name=row.name, loading=loading,
      what="\n\n".join([what, f"{differs}."] if differs else [what]),
      table="\n".join(f"| {key} | {value} |" for key, value in rows.items()))


def _numbers(values) -> str:
  return ", ".join(f"{value:g}" for value in values)
