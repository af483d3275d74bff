"""What this machine has, and lets a run do; for `tools.doctor`."""

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

from metaformer_jax.config import schema
from metaformer_jax.doctor import versions
from metaformer_jax.doctor.versions import FAIL, OK, WARN, Line

# Variables of the environment that jax and its libraries read, and what some
# values do.
_VARIABLES = re.compile(r"(JAX|XLA|TPU|LIBTPU|CUDA|NVIDIA|NCCL)_\w+"
                        r"|LD_LIBRARY_PATH|TF_CPP_\w+")
_CHANGING = (
    ("XLA_FLAGS", "host_platform_device_count", "the devices are all one CPU"),
    ("JAX_DISABLE_JIT", "1|true", "nothing is compiled, which is very slow"),
    ("JAX_ENABLE_X64", "1|true", "what is float32 may become float64"),
    ("JAX_DEBUG_NANS", "1|true", "a step that is not finite ends the run"),
    ("LD_LIBRARY_PATH", "cuda|nvidia", "may hide the CUDA that pip installed"),
)

_DOCKER_SHM = 64 * 2**20
_MIB, _GIB = 2**20, 2**30


def python() -> Line:
  """Python and the system."""
  version, system = platform.python_version(), platform.system()
  tested = []
  with contextlib.suppress(metadata.PackageNotFoundError):
    for value in metadata.metadata(versions.OWN).get_all("Classifier") or ():
      tested += re.findall(r":: Python :: (\d+\.\d+)$", value)
  text = f"{version} on {system} {platform.release()}, {sys.executable}"
  if system != "Linux":
    return Line("python", FAIL, f"{text}: runs need Linux")
  if tested and version.rpartition(".")[0] not in tested:
    return Line("python", WARN, f"{text}: tested are {', '.join(tested)}")
  return Line("python", OK, text)


def environment(env: Mapping[str, str]) -> Iterator[Line]:
  """The variables that change what jax does."""
  found = {k: env[k][:200] for k in sorted(env) if _VARIABLES.fullmatch(k)}
  for name, pattern, effect in _CHANGING:
    if re.search(pattern, found.get(name, ""), re.IGNORECASE):
      yield Line("environment", WARN, f"{name}={found.pop(name)}: {effect}")
  yield Line("environment", OK, " ".join(
      f"{k}={v}" for k, v in found.items()) or "nothing set")


def memory(meminfo: str = "/proc/meminfo",
           cgroup: str = "/sys/fs/cgroup") -> Line:
  """Memory and cores: the host's, or what a container has of them."""
  sizes = dict(re.findall(r"(\w+): +(\d+) kB",
                          pathlib.Path(meminfo).read_text()))
  total, free = (int(sizes[k]) * 1024 for k in ("MemTotal", "MemAvailable"))
  cores = str(len(os.sched_getaffinity(0)))
  limits = pathlib.Path(cgroup)
  with contextlib.suppress(OSError, ValueError):  # "max" is no limit.
    limit = int((limits / "memory.max").read_text())
    used = int((limits / "memory.current").read_text())
    total, free = min(total, limit), min(free, limit - used)
  with contextlib.suppress(OSError, ValueError):
    quota, period = map(int, (limits / "cpu.max").read_text().split())
    cores += f", of which {quota / period:g} may be used"
  text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free; {cores} cores"
  if free < 2 * _GIB:  # The quickstart takes 0.9.
    return Line("memory", WARN, f"{text}; little for a run")
  return Line("memory", OK, text)


def shared_memory(cfg: schema.Experiment | None,
                  folder: str = "/dev/shm") -> Line:
  """Where the processes of `data.workers` leave their batches."""
  least = _DOCKER_SHM + 1
  if cfg is not None:  # A batch that is read, and the next.
    least = 2 * cfg.train.batch_size * 3 * cfg.data.image_size**2
  size = shutil.disk_usage(folder).total
  text = f"{folder} has {size / _MIB:,.0f} MiB"
  if size < least and (cfg is None or cfg.data.workers):
    return Line("shm", WARN, f"{text}; with data.workers, two batches take up "
                f"to {least / _MIB:,.0f}; docker run --shm-size")
  return Line("shm", OK, text)


def writing(name: str, folder: str | pathlib.Path, state: str = FAIL,
            mounts: str = "/proc/self/mounts") -> Line:
  """Writes, renames and removes a folder, as the saving of a checkpoint does.

  Args:
    name: of the line.
    folder: need not exist; then it is tried in the parent that does.
    state: of the line where it is not possible.
    mounts: the file that tells which file systems there are.
  """
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
    made = made.rename(made.with_suffix(".renamed"))
    if (made / "file").read_bytes() != b"checkpoint":
      raise OSError(0, "what was written is not what is read")
    shutil.rmtree(made)
    free = shutil.disk_usage(where).free
  except (OSError, RuntimeError) as e:
    text = f"{folder}: {getattr(e, 'strerror', None) or e}"
    if made is not None:
      shutil.rmtree(made, ignore_errors=True)
      if "gcsfuse" in kind:
        text += ("; folders are renamed only in buckets with a hierarchical "
                 "namespace (docs/tpu.md)")
    return Line(name, state, text)
  text = f"{where} is writable, {kind}"
  if "gcsfuse" in kind:
    return Line(name, OK, text)  # The room there is none's to tell.
  text += f", {free / _GIB:,.1f} GiB free"
  return Line(name, WARN if free < _GIB else OK, text)


def _file_system(folder: pathlib.Path, mounts: str) -> str:
  """The kind of the file system that holds a folder, as the kernel names it."""
  folder, best, kind = folder.resolve(), -1, "unknown"
  for line in mounts.splitlines():
    _, point, this, *_ = line.split(" ")
    parts = pathlib.Path(point.replace("\\040", " ")).parts
    if len(parts) >= best and folder.parts[:len(parts)] == parts:
      best, kind = len(parts), this
  return kind


def folder_of_data(folder: str) -> Line:
  """Whether a folder can be read, as far as that shows without a config."""
  root = pathlib.Path(folder).expanduser()
  try:
    splits = sorted(e.name for e in os.scandir(root)
                    if e.is_dir() and not e.name.startswith("."))
    parts = [f"{s} ({sum(1 for _ in os.scandir(root / s)):,} entries)"
             for s in splits[:8]]
    first = next((os.path.join(where, names[0])
                  for where, _, names in os.walk(root) if names), None)
    if first is None:
      return Line("data", FAIL, f"{folder}: holds no file")
    with open(first, "rb") as file:
      file.read(1)
  except OSError as e:
    return Line("data", FAIL, f"{folder}: {e.strerror}")
  return Line("data", OK, f"{root}: {', '.join(parts) or 'files'}; a file was "
              "read")


def accelerators(dev: pathlib.Path = pathlib.Path("/dev")) -> list[str]:
  """What in /dev may be a TPU or an NVIDIA GPU."""
  return sorted(str(path) for pattern in (
      "accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")
                for path in dev.glob(pattern))
