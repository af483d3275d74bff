r"""Checks whether this machine can train, and reports what is wrong:

    python -m metaformer_jax.tools.doctor
    python -m metaformer_jax.tools.doctor --workdir=runs/s24 --data=/data
    python -m metaformer_jax.tools.doctor --config=configs/poolformer_s24.py \
        --config.data.path=/data/imagenet --workdir=runs/s24

Prints a line for each check, with ok, warn or FAIL: package versions and known
conflicts, imports, the devices that jax finds, memory, write access to the
workdir and the compilation cache, read access to the data. With a config and
overrides, it also checks the experiment as a run would, reads an example of its
data, and checks that its batches can be divided among the devices.

Nothing is changed: a temporary folder is created in the workdir, or its nearest
existing parent, and removed. The network is not used. Checks that may hang or
crash run in separate processes with a time limit.

Exit code: 0 if nothing FAILs; 2 if the experiment or the command line is wrong,
as for a run; 1 for any other FAIL.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

# The installation may be broken: these need nothing but Python itself.
from metaformer_jax import command, errors
from metaformer_jax.config import schema
from metaformer_jax.doctor import machine, versions
from metaformer_jax.doctor.versions import FAIL, OK, WARN, Line

# Modules that are not named as their distributions, or that alone load the
# compiled part.
_MODULES = {"absl-py": "absl.flags", "orbax-checkpoint": "orbax.checkpoint",
            "pillow": "PIL.Image", "pycocotools": "pycocotools.mask",
            "scikit-learn": "sklearn", "tensorboardx": "tensorboardX"}


def devices(found: dict[str, Any], problem: str | None, visible: list[str],
            env: Mapping[str, str]) -> Iterator[Line]:
  """Compares the devices that jax found with those in /dev.

  Args:
    found: the result of `_probe_devices`; empty if there was a problem.
    problem: why jax did not start, or None.
    visible: the result of `machine.accelerators`.
    env: the environment.
  """
  seen = f"; {', '.join(visible[:8])} in /dev" if visible else ""
  if problem:
    hint = ""
    if visible:
      hint = ("; on a slice of several hosts, start this on all hosts at the "
              "same time; otherwise find the process that uses the chips: sudo "
              f"fuser -v {' '.join(visible[:8])}")
    yield Line("devices", FAIL, f"jax does not start: {problem}{seen}{hint}")
    return
  text = f"{found['count']} x {found['kind']}, {found['platform']}"
  if found["platform"] != "cpu" or not visible:
    yield Line("devices", OK, text)
  elif env.get("JAX_PLATFORMS"):
    yield Line("devices", WARN, f"{text}{seen}, which JAX_PLATFORMS="
               f"{env['JAX_PLATFORMS']} hides")
  else:
    extra = "cuda" if any("nvidia" in v for v in visible) else "tpu"
    why = "; ".join([*(r for r in found["reasons"] if f"'{extra}'" in r),
                     f"pip install '{versions.OWN}[{extra}]'"])
    # A vfio device may be anything; only jax's message makes it certain.
    sure = "in use" in why or not all("vfio" in v for v in visible)
    yield Line("devices", FAIL if sure else WARN, f"{text}{seen}: {why}")
  if found["config"]:
    yield Line("config", FAIL, found["config"], errors.ConfigError.exit_code)


# Probes run in a separate process: JSON argument -> JSON result.


def _probe_devices(cfg: dict[str, Any] | None) -> dict[str, Any]:
  """Starts jax, computes something, and creates the experiment's mesh."""
  reasons = []
  handler = logging.Handler(logging.INFO)
  handler.emit = lambda record: reasons.append(record.getMessage())
  logger = logging.getLogger("jax._src.xla_bridge")
  logger.setLevel(logging.INFO)
  logger.addHandler(handler)
  import jax  # noqa: PLC0415

  found = jax.devices()
  if float(jax.numpy.arange(4.0).sum()) != 6:
    raise ValueError("jax computes a wrong result for 0 + 1 + 2 + 3")
  problem = None
  if cfg is not None:
    from metaformer_jax import cli  # noqa: PLC0415
    from metaformer_jax.runtime import devices as devices_lib  # noqa: PLC0415

    try:
      devices_lib.make_mesh(cli.resolve(cfg))
    except errors.ConfigError as e:
      problem = str(e)
  return {"platform": found[0].platform, "kind": found[0].device_kind,
          "count": len(found), "config": problem,
          "reasons": [r for r in reasons if r.startswith("Unable")]}


def _probe_imports(names: list[str]) -> dict[str, str]:
  """{name: why it cannot be imported}."""
  failed = {}
  for name in names:
    try:
      importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
    except Exception as e:
      failed[name] = f"{type(e).__name__}: {e}"
  return failed


def _probe_data(cfg: dict[str, Any]) -> dict[str, str]:
  """Reads and transforms one example of each split."""
  from metaformer_jax import cli, tasks  # noqa: PLC0415

  (_, task), found = tasks.create(cli.resolve(cfg)), {}
  for split in ("train", "eval"):
    try:
      data = task.make_data(split)
      data.check()
      found[split] = f"{data.n_examples:,} examples to {split}"
    except errors.ConfigError as e:
      return {"config": str(e)}
  return found


_PROBES = {"devices": _probe_devices, "imports": _probe_imports,
           "data": _probe_data}


def probe(name: str, argument: Any, limit: float,
          **env: str) -> tuple[dict[str, Any], str | None]:
  """Runs one of `_PROBES` in a separate process, for at most `limit` seconds.

  Returns:
    (its result, None), or ({}, what went wrong).
  """
  command = [sys.executable, "-m", "metaformer_jax.tools.doctor",
             f"--probe={name}"]
  env = os.environ | env | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
  with contextlib.ExitStack() as stack:
    stdin, out, err = (stack.enter_context(tempfile.TemporaryFile("w+"))
                       for _ in range(3))
    json.dump(argument, stdin)
    stdin.seek(0)
    process = subprocess.Popen(
        command, stdin=stdin, stdout=out, stderr=err, env=env,
        start_new_session=True)
    try:
      code = process.wait(limit)
    except subprocess.TimeoutExpired:
      return {}, f"did not finish within {limit:g} s"
    finally:
      if process.poll() is None:  # SIGTERM does not end a hung driver call.
        os.killpg(process.pid, signal.SIGKILL)
    out.seek(0)
    err.seek(0)
    if not code:
      return json.loads(out.read().splitlines()[-1]), None
    said = [line for line in err.read().splitlines() if line.strip()] or [""]
    # The first line of a crash says why, but the last line of a traceback.
    how = (f"killed by {signal.Signals(-code).name}: {said[0]}" if code < 0
           else said[-1])
    return {}, how


def examine(args: argparse.Namespace, overrides: list[str]) -> Iterator[Line]:
  """All checks, in the order in which they are printed."""
  yield machine.python()
  packages = versions.installed()
  yield from _guarded("packages", lambda: versions.bounds(packages))
  yield from _guarded("pairs", lambda: versions.pairs(packages))
  cfg, workdir = None, args.workdir or "runs"
  if overrides:
    try:
      cfg, workdir = _experiment(args, overrides)
      yield Line("config", OK, f"{cfg.model.name}, {workdir}")
    except errors.ConfigError as e:
      yield Line("config", FAIL, str(e), e.exit_code)
    except Exception as e:
      yield Line("config", FAIL, f"cannot be read: {type(e).__name__}: {e}")
  tree = None if cfg is None else dataclasses.asdict(cfg)
  with futures.ThreadPoolExecutor() as pool:
    imports = pool.submit(probe, "imports", _names(packages), args.timeout)
    started = pool.submit(probe, "devices", tree, args.timeout)
    reading = None if cfg is None else pool.submit(
        probe, "data", tree, args.timeout, JAX_PLATFORMS="cpu")
    failed, problem = imports.result()
    if problem:
      yield Line("imports", FAIL, problem)
    for name, why in failed.items():
      yield Line(name, FAIL, f"cannot be imported: {why}")
    if not failed and not problem:
      yield Line("imports", OK, f"{len(_names(packages))} packages")
    yield from machine.environment(os.environ)
    found, problem = started.result()
    yield from devices(found, problem, machine.accelerators(), os.environ)
    yield from _guarded("memory", lambda: [machine.memory()])
    if found.get("platform") == "cpu":
      yield from machine.pages(os.environ)
    yield machine.writing("workdir", workdir)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", (
        cfg.log if cfg else schema.Log()).compilation_cache)
    if cache and "://" not in cache:
      yield machine.writing("cache", cache, WARN)
    if reading:
      yield from _data(*reading.result())
    if args.data:
      yield machine.folder_of_data(args.data)


def _data(found: dict[str, str], problem: str | None) -> Iterator[Line]:
  if "config" in found:
    yield Line("data", FAIL, found["config"], errors.ConfigError.exit_code)
  else:
    yield Line("data", FAIL if problem else OK,
               problem or ", ".join(found.values()))


def _guarded(name: str,
             check: Callable[[], Iterator[Line] | list[Line]]) -> list[Line]:
  """The lines of a check; one FAIL if it raises, as packages may be missing."""
  try:
    return list(check())
  except Exception as e:
    return [Line(name, FAIL, f"cannot be checked: {type(e).__name__}: {e}")]


def _names(packages: Mapping[str, versions.Package]) -> list[str]:
  """The packages to import: those that are required and installed."""
  try:
    required = versions.required(packages[versions.OWN])
  except (ImportError, KeyError):
    required = ("flax", "jax", "numpy", "optax", "orbax-checkpoint")
  return [name for name in required if name in packages]


def _experiment(args: argparse.Namespace, overrides: list[str],
                ) -> tuple[schema.Experiment, pathlib.Path]:
  """The experiment and the workdir, as a run would parse them."""
  from metaformer_jax import cli  # noqa: PLC0415  Needs other packages.

  workdir = [f"--workdir={args.workdir}"] if args.workdir else []
  sys.argv = [sys.argv[0], *overrides, *workdir]
  return cli.parse()


def parse(argv: list[str] | None = None,
          ) -> tuple[argparse.Namespace, list[str]]:
  """The parsed command line, and the flags of a run: config and overrides."""
  parser = command.Parser(
      __doc__, "doctor", allow_abbrev=False,
      epilog="--config, --config_json and overrides are as for a run.")
  parser.add_argument("--workdir", help="folder of the run; default: runs, or "
                      "the config's")
  parser.add_argument("--data", help="a folder to read; not needed for the "
                      "data of a config")
  parser.add_argument("--json", action="store_true",
                      help="print a JSON object for each line")
  parser.add_argument("--timeout", type=float, default=90.0,
                      help="seconds allowed for jax to start, and for reading "
                      "data (90)")
  parser.add_argument("--probe", choices=_PROBES, help=argparse.SUPPRESS)
  args, rest = parser.parse_known_args(argv)
  if rest and not any(re.match("--?config", arg) for arg in rest):
    parser.error(f"{rest[0]!r} is not a flag")
  return args, rest


def main(argv: list[str] | None = None) -> int:
  """Prints the results; returns the exit code."""
  args, overrides = parse(argv)
  if args.probe:
    print("\n" + json.dumps(_PROBES[args.probe](json.load(sys.stdin))))
    return 0
  code = 0
  for line in examine(args, overrides):
    text = errors.one_line(line.text)
    if line.state == FAIL:
      code = max(code, line.code)
    if args.json:
      print(json.dumps({"name": line.name, "state": line.state, "text": text}))
    else:
      print(f"{line.name:<11} {line.state:<4}  {text}", flush=True)
  return code


def console() -> None:
  """The command metaformer-doctor."""
  with command.one_line_errors():
    sys.exit(main())


if __name__ == "__main__":
  console()
