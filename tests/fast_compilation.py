"""With what the tests compile: most programs run only once."""

import sys
import threading
from importlib import metadata

from packaging import version

_FLAGS = ["--xla_backend_optimization_level=0",
          # Otherwise the program is divided for several threads of LLVM.
          "--xla_cpu_parallel_codegen_split_count=1"]
# XLA ends the process for a flag that it does not know.
if version.Version(metadata.version("jaxlib")) < version.Version("0.11"):
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")

XLA_FLAGS = " ".join(_FLAGS)

# Programs that a thread lowers in one context. Contexts grow.
_PROGRAMS = 64


def share_contexts() -> None:
  """Lowers several programs in one MLIR context, if jax is imported.

  To make a context takes a fifth of the time in which a small program is
  lowered and compiled.
  """
  mlir = sys.modules.get("jax._src.interpreters.mlir")
  if mlir is None:
    return
  make, of_thread = mlir.make_ir_context, threading.local()

  def shared():
    n = getattr(of_thread, "n", 0)
    if n % _PROGRAMS == 0:
      of_thread.context = make()
    of_thread.n = n + 1
    return of_thread.context

  mlir.make_ir_context = shared
