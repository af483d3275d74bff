#!/usr/bin/env python3
"""Trains on a Cloud TPU slice; runs on any machine with Python and gcloud:

    python launch/tpu_vm.py supervise --name=s24 --zone=us-west4-a \\
        --accelerator=v5litepod-8 --spot -- \\
        --config=configs/poolformer_s24.py --workdir=gs://BUCKET/runs/s24 \\
        --config.data.path=gs://BUCKET/imagenet

The flags of metaformer_jax.main follow after --; see docs/tpu.md.
"""

import argparse
import pathlib
import re
import shlex
import sys

import cloud
import commands
import dry_run
import mig
import queued
import supervisor

ROOT = pathlib.Path(__file__).resolve().parents[1]

_COMMANDS = {
    "create": "request a slice",
    "run": "start a run on an active slice, and return",
    "supervise": "create a slice and run on it; repeat until the run is done",
    "status": "show the state of the slice, its hosts and the run",
    "logs": "show the end of a host's output",
    "restart": "stop the run, which saves, and start it again",
    "exec": "run the shell command given after -- on the hosts",
    "delete": "stop the run, which saves, and delete the slice",
}
# Backend -> the generations that it provides. The Cloud TPU API is no longer
# developed and does not support tpu7x; managed instance groups support only
# these (cloud.google.com/tpu/docs/tpus-and-migs).
_BACKENDS = {"queued": queued.RUNTIMES, "mig": mig.GENERATIONS}
_WITH_RUN = ("run", "supervise", "restart")
_WITH_SLICE = ("create", "supervise")


class Parser(argparse.ArgumentParser):
  """Reports errors in one line."""

  def error(self, message):
    raise cloud.UsageError(f"{message}; see --help")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """(the launcher's own flags, the arguments after --)."""
  end = argv.index("--") if "--" in argv else len(argv)
  parser = Parser(description=__doc__, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  # For the sub-commands that do not have these flags.
  parser.set_defaults(accelerator="", runtime_version=None, spot=False,
                      create_flag=[])
  names = parser.add_subparsers(dest="command", required=True)
  for name, help_text in _COMMANDS.items():
    sub = names.add_parser(name, help=help_text, allow_abbrev=False)
    _add_flags(sub, name)
  return parser.parse_args(argv[:end]), argv[end + 1:]


def _add_flags(sub: argparse.ArgumentParser, name: str) -> None:
  add = sub.add_argument
  add("--name", required=True, help="of the slice; any name")
  add("--zone", required=True, help="e.g. us-west4-a")
  add("--project", help="default: gcloud's own; needed to create a managed "
      "instance group")
  add("--backend", choices=sorted(_BACKENDS),
      help="queued: a queued resource of the Cloud TPU API; mig: a managed "
      "instance group of Compute Engine; default: mig for v5p, v6e and tpu7x, "
      "queued for others and for commands without --accelerator")
  add("--dry_run", action="store_true",
      help="print the commands, one per line, without running them")
  if name in _WITH_SLICE:
    add("--accelerator", required=True,
        help="e.g. v5litepod-8, v4-32, v5p-8, v6e-16, tpu7x-16")
    add("--runtime_version", help="of a queued resource, or the image family "
        "of a managed instance group; default: depends on the accelerator")
    add("--spot", action="store_true",
        help="cheaper, but may be taken away at any time")
    add("--create_flag", action="append", default=[], metavar="FLAG",
        help="another flag for gcloud's create, of the instance template for "
        "a managed instance group, e.g. "
        "--create_flag=--service-account=ACCOUNT; may be repeated")
  if name in _WITH_RUN:
    add("--source", type=pathlib.Path, default=ROOT,
        help="git checkout to run; default: the one that holds this file")
    add("--ref", default="HEAD", help="commit of the checkout; default: HEAD")
  if name == "supervise":
    add("--poll_seconds", type=_natural, default=60, help="default: 60")
    add("--max_restarts", type=_natural, default=5,
        help="of the run, in a row and without a new checkpoint; default: 5")
    add("--max_refusals", type=_natural, default=20,
        help="requests in a row that fail or are refused for lack of quota; "
        "default: 20")
    add("--hang_seconds", type=_natural, default=7200,
        help="restart a run that makes no new checkpoint for so long; 0: "
        "never; default: 7200")
    add("--start_seconds", type=_natural, default=14400,
        help="the same from a start, with compilation, to the first new "
        "checkpoint; default: 14400")
    add("--keep", action="store_true",
        help="do not delete the slice when the run is over; it is billed")
  if name in ("logs", "exec"):
    add("--worker", default="0" if name == "logs" else "all",
        help="index of the host, or all")
  if name == "logs":
    add("--lines", type=_natural, default=100)
    add("--follow", action="store_true", help="until Ctrl-C")


def _natural(text: str) -> int:
  if not re.fullmatch("[0-9]{1,9}", text):
    raise argparse.ArgumentTypeError(
        f"{text!r} is not an integer from 0 to 999999999")
  return int(text)


def make_slice(args: argparse.Namespace) -> cloud.Slice:
  """The slice that the flags name; UsageError if a name is not valid."""
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?", args.name):
    raise cloud.UsageError(f"--name={args.name}: use lower-case letters, "
                           "digits and -, starting with a letter")
  backend = _backend(args.accelerator, args.backend)
  generation = args.accelerator.partition("-")[0]
  known = args.name, args.zone, args.project, args.accelerator
  if backend == "queued":
    return queued.QueuedSlice(
        *known, args.runtime_version or queued.RUNTIMES.get(generation, ""),
        args.spot, tuple(args.create_flag))
  if len(args.name) > 54:  # The machines' names are longer by five.
    raise cloud.UsageError(f"--name={args.name}: give at most 54 characters")
  if not re.fullmatch(r"[a-z]+-[a-z]+[0-9]+-[a-z0-9]+", args.zone):
    raise cloud.UsageError(f"--zone={args.zone}: is no zone, e.g. us-east5-a")
  if args.accelerator:
    mig.shape(args.accelerator)
    if not args.project:
      raise cloud.UsageError("--project: is missing; a managed instance group "
                             "is created with the full name of its policy")
  _, family, *_ = mig.GENERATIONS.get(generation, ("", ""))
  return mig.MigSlice(*known, args.runtime_version or family, args.spot,
                      tuple(args.create_flag))


def _backend(accelerator: str, backend: str | None) -> str:
  """The backend for an accelerator; empty: unknown."""
  generation = accelerator.partition("-")[0]
  fitting = [name for name, known in _BACKENDS.items() if generation in known]
  if accelerator and not (
      fitting and re.fullmatch(r"[a-z0-9]+-[0-9]{1,6}", accelerator)):
    known = dict.fromkeys([*queued.RUNTIMES, *mig.GENERATIONS])
    raise cloud.UsageError(
        f"--accelerator={accelerator}: give one of {', '.join(known)} with a "
        "size, e.g. v5litepod-8")
  if accelerator and backend and backend not in fitting:
    raise cloud.UsageError(
        f"--backend={backend}: does not provide {generation}; give "
        f"--backend={fitting[0]}, or leave it out")
  return backend or ("mig" if "mig" in fitting else "queued")


def main(argv: list[str]) -> int:
  """Returns the exit code."""
  try:
    args, rest = parse(argv)
    where = make_slice(args)
    run = cloud.Run.of(rest) if args.command in _WITH_RUN else None
    if rest and run is None and args.command != "exec":
      raise cloud.UsageError(f"{args.command} takes no arguments after --")
    if run and not args.dry_run:
      _warn_of_changes(args.source)
    gcloud = commands.Gcloud()
    if args.dry_run:
      gcloud = dry_run.DryRun(where, args.command != "supervise",
                              run.id if run else "")
    return _do(args, rest, gcloud, where, run)
  except cloud.UsageError as e:
    cloud.say(f"UsageError: {e}")
    return supervisor.MISCONFIGURED
  except commands.CloudError as e:
    cloud.say(f"CloudError: {e}")
    return supervisor.MISCONFIGURED if e.kind in ("refused", "auth") else 1
  except KeyboardInterrupt:
    cloud.say("stopped watching; the slice and its run continue and are "
              "billed: the same command attaches again, the sub-command delete "
              "ends them")
    return 130


def _do(args: argparse.Namespace, rest: list[str], gcloud: commands.Gcloud,
        where: cloud.Slice, run: cloud.Run | None) -> int:
  if args.command == "create":
    where.create(gcloud)
  elif args.command == "supervise":
    return supervisor.Supervisor(
        gcloud, where, run, args.source, args.ref, keep=args.keep,
        poll_seconds=0 if args.dry_run else args.poll_seconds,
        max_restarts=args.max_restarts, max_refusals=args.max_refusals,
        hang_seconds=args.hang_seconds, start_seconds=args.start_seconds,
    ).supervise()
  elif args.command in ("run", "restart"):
    if args.command == "run":
      for worker in where.workers(gcloud):
        if worker.status == "running":
          raise cloud.UsageError(f"{where.name} is already running "
                                 f"{worker.run}; the sub-command restart "
                                 "replaces it")
    supervisor.launch(gcloud, where, run, args.source, args.ref)
  elif args.command == "status":
    found = supervisor.describe(gcloud, where)
    if not args.dry_run:
      print(found)
  elif args.command == "logs":
    follow = ["follow"] if args.follow else []
    command = shlex.join(["bash", "worker.sh", "log", str(args.lines), *follow])
    return where.show(gcloud, command, args.worker)
  elif args.command == "exec":
    if not rest:
      raise cloud.UsageError("exec needs a command after --")
    return where.show(gcloud, " ".join(rest), args.worker)
  else:
    _delete(gcloud, where)
  return 0


def _delete(gcloud: commands.Gcloud, where: cloud.Slice) -> None:
  if where.state(gcloud).phase == "active":
    try:
      supervisor.stop(gcloud, where)
    except commands.CloudError as e:
      cloud.say(f"{e}; deleting the slice anyway")
  where.delete(gcloud)


def _warn_of_changes(source: pathlib.Path) -> None:
  """Warns that uncommitted changes will not run on the slice."""
  try:
    changes = commands.Gcloud()(["git", "-C", str(source), "status",
                                 "--porcelain"])
  except commands.CloudError as e:
    raise cloud.UsageError(f"--source={source}: is not a git checkout: {e}"
                           ) from e
  if changes.strip():
    cloud.say(f"{len(changes.splitlines())} uncommitted changes in {source} "
              "will not be sent")


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
