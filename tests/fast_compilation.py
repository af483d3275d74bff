"""XLA's flags with which the tests compile: most programs run only once."""

from importlib import metadata

from packaging import version

_FLAGS = ["--xla_backend_optimization_level=0"]
# XLA ends the process for a flag that it does not know.
if version.Version(metadata.version("jaxlib")) < version.Version("0.11"):
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")

XLA_FLAGS = " ".join(_FLAGS)
