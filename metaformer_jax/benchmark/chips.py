"""Peak rates of chips, by the names that jax gives them."""

import re

from metaformer_jax.preflight import topologies

# Of matrix products of bfloat16, dense, 1/s; the first pattern that is in a
# GPU's name is its. Sources: NVIDIA's data sheets of each (where only the rate
# with sparsity is given, half of it), and the whitepapers of the architectures
# GA102 and Ada for the RTX 3090 and 4090 (with sums in float32). Older GPUs do
# not compute in bfloat16.
_GPUS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200|GH200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A30", 165e12),
    ("A40", 150e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)

# jax's names of TPUs, in which "lite" is what Google calls e.
_TPUS = {"TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e",
         "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
         "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}


def peak_flops(kind: str) -> float | None:
  """The bfloat16 peak of a jax device, 1/s; None if it is not known.

  Args:
    kind: `jax.Device.device_kind`, as "NVIDIA H100 80GB HBM3".
  """
  if kind in _TPUS:
    chip = topologies.GENERATIONS[_TPUS[kind]]
    return chip.flops / chip.n_devices
  return next((peak for pattern, peak in _GPUS
               if re.search(rf"\b({pattern})\b", kind)), None)
