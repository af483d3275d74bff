"""The report of a preflight: verdict, bounds, warnings; as text or JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from metaformer_jax import imports
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry
from metaformer_jax.preflight import search, topologies
from metaformer_jax.preflight.compilation import Compiled

_GIB = 2**30
# Warn above this fraction of a device's memory: evaluation and fragmentation
# need some too.
_TIGHT = 0.9
# A state that is a smaller fraction of the memory than this is better copied to
# each device than split.
_SMALL = 0.1


@dataclasses.dataclass(frozen=True)
class Subject:
  """The experiment and the slice that a report is about.

  Attributes:
    cfg: the experiment.
    target: the slice.
    n_params: number of the model's parameters.
    n_devices: number of jax devices in the mesh.
    n_hosts: number of processes of the run.
    mesh: number of devices along each axis.
    n_steps: length of the whole run.
    n_examples: size of the training split.
    examples_are: where that number comes from.
    batch_bytes: size of a global batch.
    versions: of jax and libtpu.
    lowering: what lowering the step warned of.
  """

  cfg: Experiment
  target: topologies.Slice
  n_params: int
  n_devices: int
  n_hosts: int
  mesh: dict[str, int]
  n_steps: int
  n_examples: int
  examples_are: str
  batch_bytes: int
  versions: dict[str, str]
  lowering: tuple[str, ...] = ()

  @property
  def at_once(self) -> int:
    """Images per device in a micro-batch."""
    train = self.cfg.train
    return train.batch_size // (self.n_devices * train.accumulate)


def bounds(target: topologies.Slice, compiled: Compiled) -> dict[str, float]:
  """Lower bounds on the seconds of a step: `Generation.least_seconds`."""
  return topologies.GENERATIONS[target.generation].least_seconds(
      compiled.flops, compiled.accessed,
      sum(c.sent_bytes for c in compiled.collectives))


def to_json(subject: Subject, compiled: Compiled,
            tried: dict[int, Compiled]) -> dict[str, Any]:
  """The whole report; sizes in bytes and times in seconds, per chip.

  Args:
    subject: the experiment and the slice.
    compiled: the compiled step.
    tried: the result of `search.largest_batch`; empty if it was not run.
  """
  train, target = subject.cfg.train, subject.target
  chip = topologies.GENERATIONS[target.generation]
  report = {
      "model": subject.cfg.model.name, "n_params": subject.n_params,
      "dtype": subject.cfg.model.dtype, "optimizer": subject.cfg.optim.name,
      "batch_size": train.batch_size, "accumulate": train.accumulate,
      "images_at_once": subject.at_once,
      "topology": {"name": target.name, "libtpu": target.topology,
                   "chips": target.n_chips, "devices": subject.n_devices,
                   "hosts": subject.n_hosts, "mesh": subject.mesh},
      "fits": compiled.fits, "memory": {
          "needed": compiled.needed, "available": compiled.available,
          "state": compiled.state, "code": compiled.code},
      "flops_per_image": compiled.flops * subject.n_devices / train.batch_size,
      "checkpoint": compiled.checkpoint,
      "host_memory": host_memory(subject, compiled),
      "run": {"steps": subject.n_steps, "examples": subject.n_examples,
              "examples_are": subject.examples_are},
      "compile_seconds": compiled.seconds, "versions": subject.versions,
      "warnings": list(warnings(subject, compiled))}
  if compiled.fits:
    seconds = bounds(target, compiled)
    step = max(seconds.values())
    report |= {
        "bytes_per_image":
            compiled.accessed * subject.n_devices / train.batch_size,
        "collectives": [
            c._asdict() | {"sent_bytes": c.sent_bytes}
            for c in compiled.collectives],
        "bound": {
            "seconds": seconds, "by": max(seconds, key=seconds.get),
            "images_per_second_per_chip": (
                train.batch_size / step * chip.n_devices / subject.n_devices),
            "images_per_second_per_host":
                train.batch_size / step / subject.n_hosts,
            "peak_flops": chip.flops, "hbm_bytes_per_second": chip.hbm,
            "link_bytes_per_second": chip.links,
            "hours": step * subject.n_steps / 3600}}
  if tried:
    report["search"] = {
        "largest_images_at_once": max(
            (batch for batch, c in tried.items() if c.fits), default=0),
        "tried": {
            str(batch): {
                "fits": c.fits, "needed": c.needed,
                "images_per_second_per_chip":
                    train.accumulate * batch * chip.n_devices / max(
                        bounds(target, c).values()) if c.fits else None}
            for batch, c in tried.items()}}
  return report


def host_memory(subject: Subject, compiled: Compiled) -> int:
  """Upper bound on the bytes of arrays in the first host's memory.

  These are the copy of the state that is being saved, and three batches: one
  being assembled, one read ahead, one on its way to the devices. The program
  and its worker processes are not included.
  """
  return compiled.checkpoint + 3 * subject.batch_bytes // subject.n_hosts


def warnings(subject: Subject, compiled: Compiled) -> Iterator[str]:
  """What would work, but slowly or with little to spare."""
  cfg, n = subject.cfg, subject.at_once
  yield from _of_compile(subject, compiled)
  if n % search.LANES:
    yield (f"{n} images per device at once are not a multiple of "
           f"{search.LANES}; a TPU pads them to one")
  if cfg.model.dtype == "float32":
    yield ("config.model.dtype is float32; bfloat16 moves half the bytes and "
           "multiplies faster")
  yield from subject.lowering
  if not compiled.fits:
    return
  if compiled.needed > _TIGHT * compiled.available:
    yield (f"{compiled.needed / compiled.available:.0%} of the memory is used; "
           "evaluation and fragmentation need some too")
  reduced = [c for c in compiled.collectives
             if c.kind in ("all-reduce", "reduce-scatter")]
  rounded = sum(c.count * c.n_bytes for c in reduced if c.dtype == "bf16")
  if rounded > subject.n_params:  # At least half of the gradients.
    whole = cfg.train.accumulate == 1 and subject.mesh["fsdp"] == 1
    yield (f"{rounded / 1e6:.1f} MB of gradients are summed over "
           f"{subject.n_devices} devices in bfloat16" + (
               "; config.train.accumulate above 1 sums in float32"
               if whole else ""))
  if (subject.mesh["fsdp"] > 1
      and compiled.checkpoint < _SMALL * compiled.available):
    yield (f"config.mesh.fsdp is {subject.mesh['fsdp']}, but the whole state "
           f"is only {_size(compiled.checkpoint)}; with 1, parameters are not "
           "gathered")


def _of_compile(subject: Subject, compiled: Compiled) -> Iterator[str]:
  """What another `config.compile` would change."""
  cfg = subject.cfg

  def possible(**changes):
    name = cfg.model.name
    if name is None or imports.is_path(name):  # A user's own.
      return False
    settings = registry.get_spec(name).override(**cfg.model.overrides())
    changed = dataclasses.replace(cfg.compile, **changes)
    return not any(changed.check(name, settings))

  keeps_all = "none" in cfg.compile.remat
  if cfg.compile.scan and keeps_all:
    yield ("config.compile.scan keeps about twice as much for the gradient, "
           "unless config.compile.remat is ('dots',) or ('block',)")
  elif not compiled.fits and keeps_all and possible(remat=("block",)):
    yield ("config.compile.remat=('dots',) needs less memory, ('block',) "
           "least, and a third more multiplications")
  bound = bounds(subject.target, compiled) if compiled.fits else {}
  if (bound and max(bound, key=bound.get) == "memory"
      and cfg.compile.kernels == "xla" and possible(kernels="pallas")):
    yield ("memory is the limit: config.compile.kernels=pallas moves fewer "
           "bytes; the kernels were compiled for TPUs, not yet run on one")


def lines(report: dict[str, Any]) -> Iterator[str]:
  """The report of `to_json` as text."""
  r, where = report, report["topology"]
  memory, run = r["memory"], r["run"]
  n = r["images_at_once"]
  chips = "chip" if where["chips"] == 1 else "chips"
  hosts = "host" if where["hosts"] == 1 else "hosts"
  device = "chip" if where["devices"] <= where["chips"] else "core"
  yield _line("config", f"{r['model']}, {r['n_params']:,} parameters, "
              f"{r['dtype']}, {r['optimizer']}; {r['batch_size']} images per "
              "step" + (f" in {r['accumulate']} micro-batches"
                        if r["accumulate"] > 1 else ""))
  yield _line("target", f"{where['name']}: {where['chips']} {chips} on "
              f"{where['hosts']} {hosts}, mesh " + " x ".join(
                  f"{axis} {size}" for axis, size in where["mesh"].items())
              + f"; {n} images per {device} at once")
  yield _line("verdict", ("FITS: " if r["fits"] else "DOES NOT FIT: ")
              + f"needs {_size(memory['needed'])} of "
              f"{_size(memory['available'])} per {device}"
              + (f" ({memory['needed'] / memory['available']:.0%}), "
                 f"{_size(memory['state'])} of it for the state"
                 if r["fits"] else ""))
  if "search" in r:
    yield _line("largest", _largest(r))
  elif not r["fits"]:
    yield _line("largest", "--find_batch finds the largest batch that fits; or "
                "use more chips, or split the batch: --config.train.accumulate")
  work = f"{r['flops_per_image'] / 1e9:.3g} GFLOP"
  if r["fits"]:
    work += f" and {r['bytes_per_image'] / 1e6:.3g} MB"
  yield _line("work", f"{work} per image")
  if r["fits"]:
    bound = r["bound"]
    yield _line("bound", f"{bound['images_per_second_per_chip']:,.0f} images/s "
                f"per chip, limited by {bound['by']} (" + ", ".join(
                    f"{name} {1e3 * s:.3g}" for name, s in
                    bound["seconds"].items())
                + " ms per step); a bound, not a measurement")
    yield _line("run", f"{run['steps']:,} steps, {run['examples']:,} images "
                f"per epoch ({run['examples_are']}): "
                f"{_duration(bound['hours'])} or more")
    yield _line("exchange", "; ".join(_exchange(r["collectives"])) or "none")
    yield _line("input", f"{bound['images_per_second_per_host']:,.0f} images/s "
                "per host to keep up with the bound; tools.benchmark_input "
                "measures how many a core prepares")
  yield _line("checkpoint", f"{r['checkpoint'] / 1e6:,.0f} MB; arrays in the "
              f"first host's memory: {_size(r['host_memory'])}")
  yield _line("compiled", f"in {r['compile_seconds']:.0f} s with " + ", ".join(
      f"{name} {version}" for name, version in r["versions"].items()))
  for warning in r["warnings"]:
    yield _line("warning", warning)


def _line(name: str, text: str) -> str:
  return f"{name:<12}{text}"


def _size(n_bytes: float) -> str:
  return (f"{n_bytes / _GIB:.2f} GiB" if n_bytes >= 0.1 * _GIB else
          f"{n_bytes / 2**20:.1f} MiB")


def _duration(hours: float) -> str:
  return (f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.2g} minutes")


def _largest(r: dict[str, Any]) -> str:
  """The largest batch found, and how to split the experiment's to fit it."""
  found = r["search"]["largest_images_at_once"]
  if not found:
    return "not even one image fits"
  above = [f"{batch} need {_size(c['needed'])}"
           for batch, c in r["search"]["tried"].items() if not c["fits"]]
  text = f"{found} images at once fit" + (f"; {above[0]}" if above else "")
  share = r["images_at_once"] * r["accumulate"]
  if r["fits"]:
    return text
  parts = next(k for k in range(1, share + 1)
               if share % k == 0 and share // k <= found)
  return f"{text}; split the batch: --config.train.accumulate={parts}"


def _exchange(collectives: list[dict[str, Any]]) -> Iterator[str]:
  """By kind and dtype: the number per step, and the bytes of a device."""
  total = {}
  for c in collectives:
    key = f"{c['kind']} {c['dtype']}"
    count, n_bytes = total.get(key, (0, 0))
    total[key] = count + c["count"], n_bytes + c["count"] * c["n_bytes"]
  for key, (count, n_bytes) in sorted(total.items()):
    if n_bytes >= 1e3:  # Leave out flags and counters.
      yield f"{key} x {count}, {n_bytes / 1e6:.1f} MB"
