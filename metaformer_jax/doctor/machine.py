"""Checks of this machine: memory, devices, folders; for tools.doctor."""

import contextlib
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata

from metaformer_jax import errors, storage
from metaformer_jax.doctor import versions
from metaformer_jax.doctor.versions import FAIL, OK, WARN, Line

# Environment variables that jax and its libraries read, and the effect of some
# values.
_VARIABLES = re.compile(r"(JAX|XLA|PJRT|TPU|LIBTPU|CUDA|NVIDIA|NCCL)_\w+"
                        r"|LD_LIBRARY_PATH|GLIBC_TUNABLES|TF_CPP_\w+")
_CHANGING = (
    ("XLA_FLAGS", "host_platform_device_count", "all devices are the same CPU"),
    ("JAX_DISABLE_JIT", "1|true", "nothing is compiled; this is very slow"),
    ("JAX_ENABLE_X64", "1|true", "float32 values may become float64"),
    ("JAX_DEBUG_NANS", "1|true", "a non-finite step ends the run"),
    ("LD_LIBRARY_PATH", "cuda|nvidia", "may hide the CUDA that pip installed"),
)

# Who has them: [always], [madvise] (who asks), or [never].
_LARGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
_GIB = 2**30


def python() -> Line:
  """The version of Python, and the operating system."""
  version, system = platform.python_version(), platform.system()
  tested = []
  with contextlib.suppress(metadata.PackageNotFoundError):
    for value in metadata.metadata(versions.OWN).get_all("Classifier") or ():
      tested += re.findall(r":: Python :: (\d+\.\d+)$", value)
  text = f"{version} on {system} {platform.release()}, {sys.executable}"
  if system != "Linux":
    return Line("python", FAIL, f"{text}: training needs Linux")
  if tested and version.rpartition(".")[0] not in tested:
    return Line("python", WARN, f"{text}: tested with {', '.join(tested)}")
  return Line("python", OK, text)


def environment(env: Mapping[str, str]) -> Iterator[Line]:
  """Environment variables that change what jax does."""
  found = {k: env[k][:200] for k in sorted(env) if _VARIABLES.fullmatch(k)}
  for name, pattern, effect in _CHANGING:
    if re.search(pattern, found.get(name, ""), re.IGNORECASE):
      yield Line("environment", WARN, f"{name}={found.pop(name)}: {effect}")
  yield Line("environment", OK, " ".join(
      f"{k}={v}" for k, v in found.items()) or "nothing set")


def memory(meminfo: str = "/proc/meminfo",
           cgroup: str = "/sys/fs/cgroup") -> Line:
  """Memory and cores of the host, or of the container within its limits."""
  sizes = dict(re.findall(r"(\w+): +(\d+) kB",
                          pathlib.Path(meminfo).read_text()))
  total, free = (int(sizes[k]) * 1024 for k in ("MemTotal", "MemAvailable"))
  cores = f"{len(os.sched_getaffinity(0))} cores"
  limits = pathlib.Path(cgroup)
  with contextlib.suppress(OSError, ValueError):  # "max" is no limit.
    limit = int((limits / "memory.max").read_text())
    used = int((limits / "memory.current").read_text())
    total, free = min(total, limit), min(free, limit - used)
  with contextlib.suppress(OSError, ValueError):
    quota, period = map(int, (limits / "cpu.max").read_text().split())
    cores += f", limited to {quota / period:g}"
  text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free; {cores}"
  if free < 2 * _GIB:  # The quickstart needs 0.9.
    return Line("memory", WARN, f"{text}; may be too little for a run")
  return Line("memory", OK, text)


def pages(env: Mapping[str, str],
          large: str = _LARGE_PAGES) -> Iterator[Line]:
  """How a run on a CPU gets large pages of memory, if only on request.

  Each step has new memory for its temporary arrays (docs/benchmarks.md).
  """
  with contextlib.suppress(OSError):
    if ("[madvise]" in pathlib.Path(large).read_text()
        and "hugetlb" not in env.get("GLIBC_TUNABLES", "")):
      yield Line("pages", OK, "small; large ones make training on a CPU "
                 "faster: GLIBC_TUNABLES=glibc.malloc.hugetlb=1")


def writing(name: str, folder: str | pathlib.Path, state: str = FAIL,
            mounts: str = "/proc/self/mounts") -> Line:
  """Writes, replaces and removes a file, as saving a checkpoint does.

  Args:
    name: of the line.
    folder: to test, which may be on gs://; if it does not exist, its nearest
      existing parent is.
    state: of the line if it is not writable.
    mounts: the file that lists the mounted file systems.
  """
  if storage.is_remote(folder):
    return _writing_object(name, folder, state)
  made = None
  try:
    where = pathlib.Path(folder).expanduser().absolute()
    while not where.exists():
      where = where.parent
    kind = _file_system(where, pathlib.Path(mounts).read_text())
    made = pathlib.Path(tempfile.mkdtemp(prefix=".doctor-", dir=where))
    with open(made / "file", "wb") as file:
      file.write(b"checkpoint")
      file.flush()
      os.fsync(file.fileno())
    (made / "file").replace(made / "manifest")
    if (made / "manifest").read_bytes() != b"checkpoint":
      raise OSError(0, "a file read back differs from what was written")
    shutil.rmtree(made)
    free = shutil.disk_usage(where).free
  except (OSError, RuntimeError) as e:
    text = f"{folder}: {(isinstance(e, OSError) and e.strerror) or e}"
    if made is not None:
      shutil.rmtree(made, ignore_errors=True)
    return Line(name, state, text)
  text = f"{where} is writable, {kind}"
  if "gcsfuse" in kind:
    return Line(name, OK, text)  # A bucket has no limit to report.
  text += f", {free / _GIB:,.1f} GiB free"
  return Line(name, WARN if free < _GIB else OK, text)


def _writing_object(name: str, folder: str | pathlib.Path, state: str) -> Line:
  """Writes, reads and deletes an object in a folder on gs://."""
  try:
    path = storage.path(str(folder)) / f".doctor-{os.getpid()}"
    try:
      storage.write(path, b"checkpoint")
      if path.read_bytes() != b"checkpoint":
        raise OSError(0, "an object read back differs from what was written")
    finally:
      path.unlink(missing_ok=True)
  except errors.UserError as e:
    return Line(name, state, str(e))
  except OSError as e:
    return Line(name, state, f"{folder}: {e.strerror or e}")
  return Line(name, OK, f"{folder} is writable, object storage")


def _file_system(folder: pathlib.Path, mounts: str) -> str:
  """The type of the file system that holds a folder, as in `mounts`."""
  folder, best, kind = folder.resolve(), -1, "unknown"
  for line in mounts.splitlines():
    _, point, this, *_ = line.split(" ")
    parts = pathlib.Path(point.replace("\\040", " ")).parts
    if len(parts) >= best and folder.parts[:len(parts)] == parts:
      best, kind = len(parts), this
  return kind


def folder_of_data(folder: str) -> Line:
  """Whether a folder can be read; without a config its format is unknown."""
  root = pathlib.Path(folder).expanduser()
  try:
    splits = sorted(e.name for e in os.scandir(root)
                    if e.is_dir() and not e.name.startswith("."))
    parts = [f"{s} ({sum(1 for _ in os.scandir(root / s)):,} entries)"
             for s in splits[:8]]
    first = next((os.path.join(where, names[0])
                  for where, _, names in os.walk(root) if names), None)
    if first is None:
      return Line("data", FAIL, f"{folder}: contains no file")
    with open(first, "rb") as file:
      file.read(1)
  except OSError as e:
    return Line("data", FAIL, f"{folder}: {e.strerror}")
  return Line("data", OK,
              f"{root}: {', '.join(parts) or 'files'}; one file was read")


def accelerators(dev: pathlib.Path = pathlib.Path("/dev")) -> list[str]:
  """Paths in /dev that may be a TPU or an NVIDIA GPU."""
  return sorted(str(path) for pattern in (
      "accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")
                for path in dev.glob(pattern))
