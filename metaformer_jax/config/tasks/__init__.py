"""The task section of an experiment: one dataclass per task, chosen by name.

A section declares how images become examples, the loss, and the measures of
its task; what all tasks share is in `schema`.
"""

from collections.abc import Mapping

from metaformer_jax.config.tasks import (
  base,
  classification,
  detection,
  segmentation,
)

Measure = base.Measure
Task = base.Task
Own = base.Own
Classification = classification.Classification
Segmentation = segmentation.Segmentation
Detection = detection.Detection

TASKS: Mapping[str, type[Task]] = {
    "classification": Classification, "segmentation": Segmentation,
    "detection": Detection}
