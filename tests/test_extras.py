"""The extras of setup.py resolve, to versions that work together.

This is a dry run of pip's resolver, against the index, for another Python. pip
evaluates markers for the Python that runs it, so `unmet` evaluates them again
for the other one. For another Python pip accepts only wheels; the one package
without a wheel is pure Python, and its wheel is built here.
"""

import json
import os
import platform
import re
import subprocess
import sys

import pytest
from packaging import markers, requirements, utils

from metaformer_jax.doctor import versions

SOURCE_ONLY = ["promise"]  # A requirement of TensorFlow Datasets.


def pip(*args, **env):
  done = subprocess.run(
      [sys.executable, "-m", "pip", *args], capture_output=True, text=True,
      timeout=1200, env=os.environ | env, check=False)
  assert not done.returncode, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
  """A folder with the newest pip, and the wheels of `SOURCE_ONLY`.

  pip 23.2, which comes with Python 3.11, would accept packages for the running
  Python.
  """
  folder = tmp_path_factory.mktemp("tools")
  pip("install", "--quiet", f"--target={folder}", "pip")
  pip("wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", *SOURCE_ONLY)
  return folder


def resolve(extra, python, tools, folder):
  """The packages that pip would install: {name: Package}."""
  report = pip(
      "install", "--dry-run", "--quiet", "--ignore-installed", "--report=-",
      "--only-binary=:all:", f"--python-version={python}",
      f"--find-links={tools}", f"--target={folder}",
      *map(str, own_requirements(extra, python)), PYTHONPATH=str(tools))
  return {utils.canonicalize_name(item["metadata"]["name"]): versions.Package(
              item["metadata"]["version"],
              tuple(item["metadata"].get("requires_dist", ())))
          for item in json.loads(report)["install"]}


def own_requirements(extra, python):
  own = versions.installed()[versions.OWN]
  return list(applying(own, {extra}, python))


def applying(package, extras, python):
  """A package's requirements with extras on that Python, without markers."""
  env = markers.default_environment() | {
      "python_version": python, "python_full_version": f"{python}.0"}
  for requirement in map(requirements.Requirement, package.requires):
    marker = requirement.marker
    if not marker or any(marker.evaluate(env | {"extra": extra})
                         for extra in {"", *extras}):
      requirement.marker = None
      yield requirement


def unmet(roots, found, python):
  """The requirements, followed from the roots, that are not met."""
  wanted, seen, bad = list(roots), set(), []
  while wanted:
    requirement = wanted.pop()
    name = utils.canonicalize_name(requirement.name)
    package = found.get(name)
    if package is None or not requirement.specifier.contains(
        package.version, prereleases=True):
      bad.append(f"{requirement}: {package and package.version}")
    elif (name, *sorted(requirement.extras)) not in seen:
      seen.add((name, *sorted(requirement.extras)))
      wanted += applying(package, requirement.extras, python)
  return bad


def test_unmet_evaluates_markers_for_the_other_python():
  found = {
      "a": versions.Package("1.0", ('b>=2; python_version >= "3.12"',
                                    'c; extra == "more"')),
      "b": versions.Package("1.5")}
  roots = [requirements.Requirement("a[more]<2")]
  assert unmet(roots, found, "3.11") == ["c: None"]
  assert unmet(roots, found, "3.12") == ["c: None", "b>=2: 1.5"]
  found |= {"b": versions.Package("2.0"), "c": versions.Package("0.1")}
  assert unmet(roots, found, "3.12") == []


@pytest.mark.soak
@pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels of x86_64")
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    "extra", ["tpu", "cuda", "cuda13", "hub", "tfds", "gcs", "wandb", "test"])
def test_extras_resolve(extra, python, tools, tmp_path):
  found = resolve(extra, python, tools, tmp_path)
  assert not unmet(own_requirements(extra, python), found, python)
  packages = {**found, versions.OWN: versions.installed()[versions.OWN]}
  for line in (*versions.bounds(packages), *versions.pairs(packages)):
    assert line.state == versions.OK, line
  jax = found["jax"].version
  assert found["jaxlib"].version == jax
  backends = {name for name in found
              if re.match("libtpu|jax-cuda|jax-rocm", name)}
  print(f"{extra} on {python}:", ", ".join(
      f"{name} {found[name].version}" for name in sorted(
          backends | {"jax", "jaxlib", "flax", "numpy", "numba",
                      "optax", "orbax-checkpoint", "nvidia-cudnn-cu12",
                      "tensorflow-cpu", "tensorflow-datasets"} & found.keys())))
  if extra == "tpu":
    assert backends == {"libtpu"}
  elif extra == "cuda":
    assert len(backends) == 2  # The plugin, and its PJRT library.
    assert {found[name].version for name in backends} == {jax}
  else:
    assert not backends
