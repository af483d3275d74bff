"""Checks of the installed packages and their versions; for tools.doctor.

Bounds are read from the metadata of this package and of those that it requires;
conflicts that metadata does not describe are in `PAIRS`.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

OK, WARN, FAIL = "ok", "warn", "FAIL"
OWN = "metaformer-jax"


@dataclasses.dataclass(frozen=True)
class Line:
  """A result, and the exit code if its state is FAIL."""

  name: str
  state: str
  text: str
  code: int = 1


@dataclasses.dataclass(frozen=True)
class Package:
  """An installed distribution: its version and its requirements."""

  version: str
  requires: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two distributions that do not work together.

  Attributes:
    first, second: their names.
    rule: when they conflict. "together": always; "equal": if their versions
      differ; "requires" or "extra NAME": if `second` does not meet the
      requirements in the metadata of `first`.
    state: WARN or FAIL.
    effect: what goes wrong, and what to do.
    source: where this is documented; "" for the metadata itself.
  """

  first: str
  second: str
  rule: str
  state: str = FAIL
  effect: str = ""
  source: str = ""


_CUDA = ("12", "13")
PAIRS = (
    Pair("jax", "jaxlib", "requires", FAIL, "jax refuses to start",
         "jax/_src/lib/__init__.py"),
    Pair("numba", "numpy", "requires", FAIL, "numba refuses to start",
         "numba/__init__.py"),
    # Other versions can compile for a TPU; training with them is untested.
    Pair("jax", "libtpu", "extra tpu", WARN, "untested by jax; the TPU may not "
         "start; pip install 'metaformer-jax[tpu]'"),
    Pair("libtpu", "libtpu-nightly", "together", FAIL, "both provide the "
         "module libtpu; uninstall both, then install libtpu",
         "AI-Hypercomputer/maxdiffusion#471"),
    Pair("jax", "tensorflow-tpu", "together", FAIL, "it brings another "
         "libtpu, with which jax finds no TPU; use tensorflow-cpu",
         "jax-ml/jax#29989"),
    Pair("libtpu", "torch-xla", "together", WARN, "they need different "
         "versions of libtpu; use a separate environment for each",
         "pytorch/xla#6885, jax-ml/jax#20148"),
    Pair("tensorflow", "tensorflow-cpu", "together", WARN, "both provide the "
         "module tensorflow; uninstall both, then install tensorflow-cpu",
         "tensorflow/tensor2tensor#1317"),
    Pair("jax-cuda12-plugin", "jax-cuda13-plugin", "together", WARN,
         "both provide jax's platform cuda; uninstall one, and its pjrt",
         "jax_plugins/xla_cuda12/__init__.py, xla_cuda13/__init__.py"),
    *(Pair("jaxlib", f"jax-cuda{v}-plugin", "equal", FAIL, "jax does not load "
           "the GPU's libraries, or crashes, even on a CPU",
           "jaxlib/plugin_support.py, jax-ml/jax#24901") for v in _CUDA),
    *(Pair(f"jax-cuda{v}-plugin", f"jax-cuda{v}-pjrt", "requires", FAIL,
           "the GPU may not start") for v in _CUDA),
    *(Pair(f"jax-cuda{v}-plugin", "tensorflow", "together", WARN, "it may load "
           "another cuBLAS first; use tensorflow-cpu",
           "trueagi-io/FabricPC#45") for v in _CUDA),
    *(Pair(f"jax-cuda{v}-plugin", "libtpu", "together", WARN, "jax looks for "
           "a TPU at each start; uninstall one",
           "jax/_src/xla_bridge.py") for v in _CUDA),
)


def installed() -> dict[str, Package]:
  """The installed distributions by normalised name."""
  found = {}
  for dist in metadata.distributions():
    name = dist.metadata["Name"]  # None after an interrupted installation.
    if name:
      found.setdefault(_normal(name), Package(
          str(dist.version), tuple(dist.requires or ())))
  return found


def _normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def required(package: Package, extra: str = "") -> dict[str, Any]:
  """{name: SpecifierSet} of the requirements here, including an extra's."""
  from packaging import requirements, specifiers  # noqa: PLC0415

  found = collections.defaultdict(specifiers.SpecifierSet)
  for text in package.requires:
    requirement = requirements.Requirement(text)
    if not requirement.marker or requirement.marker.evaluate({"extra": extra}):
      found[_normal(requirement.name)] &= requirement.specifier
  return dict(found)


def _fits(version: str, bound) -> bool:
  return bound.contains(version, prereleases=True)


def bounds(packages: Mapping[str, Package]) -> Iterator[Line]:
  """Whether this package's requirements are installed, within their bounds."""
  own = packages.get(OWN)
  if own is None:
    yield Line("packages", FAIL, f"{OWN} is not installed, so its requirements "
               "are not known; pip install .")
    return
  base = required(own)
  good = [f"{OWN} {own.version}"]
  for name, bound in base.items():
    version = packages[name].version if name in packages else None
    if version and _fits(version, bound):
      good.append(f"{name} {version}")
    else:
      found = f"{version} is not {bound}" if version else "is missing"
      yield Line(name, FAIL, f"{found}; pip install '{name}{bound}'")
  for extra in sorted(set(re.findall(r"extra == ['\"]([\w-]+)",
                                     "\n".join(own.requires)))):
    for name, bound in required(own, extra).items():
      if name in base or name not in packages:
        continue
      version = packages[name].version
      if not _fits(version, bound):
        yield Line(name, WARN, f"{version} is not {bound}, as the extra {extra}"
                   f" requires; pip install '{OWN}[{extra}]'")
  yield Line("packages", OK, ", ".join(good))
  backends = [f"{name} {p.version}" for name, p in sorted(packages.items())
              if re.fullmatch(r"jaxlib|libtpu.*|jax-(cuda|rocm).*", name)]
  yield Line("backends", OK, ", ".join(backends) or "none")


def pairs(packages: Mapping[str, Package]) -> Iterator[Line]:
  """Conflicts of `PAIRS`, and unmet requirements of our requirements."""
  rows = list(PAIRS)
  known = {(row.first, row.second) for row in PAIRS}
  for first in required(packages[OWN]) if OWN in packages else ():
    rows += [Pair(first, second, "requires")
             for second in required(packages.get(first, Package("")))
             if (first, second) not in known]
  n_bad = 0
  for row in rows:
    problem = _problem(row, packages)
    if problem:
      n_bad += 1
      text = "; ".join(filter(None, (problem, row.effect)))
      yield Line("pair", row.state,
                 text + (f" ({row.source})" if row.source else ""))
  if not n_bad:
    yield Line("pairs", OK, f"{len(rows)} checked, no conflict")


def _problem(pair: Pair, packages: Mapping[str, Package]) -> str | None:
  first, second = packages.get(pair.first), packages.get(pair.second)
  if first is None or (second is None and pair.rule != "requires"):
    return None
  name = f"{pair.first} {first.version}"
  if pair.rule in ("together", "equal"):
    bad = pair.rule == "together" or first.version != second.version
    return f"{name} with {pair.second} {second.version}" if bad else None
  extra = pair.rule.removeprefix("extra ") if pair.rule != "requires" else ""
  bound = required(first, extra).get(pair.second)
  if bound is None or (second and _fits(second.version, bound)):
    return None
  return (f"{name} requires {pair.second}{bound}, found "
          f"{second.version if second else 'none'}")
