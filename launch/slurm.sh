#!/usr/bin/env bash
# Trains on GPUs under SLURM, with one process per node for all its GPUs:
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh \
#     --config=configs/poolformer_s24.py --workdir=/shared/runs/s24 \
#     --config.data.path=/shared/imagenet
#
# Submit it from the repository's root; all nodes need access to its .venv, the
# workdir and the data. A workdir may be in a bucket (gs://BUCKET/FOLDER), with
# the extra gcs and credentials on each node; its notes are then in ./slurm.
# Two minutes before the time limit, and when the job is preempted, the run
# saves and ends with 143. The job is requeued unless it is done, misconfigured
# (2) or diverged (3), or six attempts in a row ended without a new checkpoint.
#SBATCH --job-name=metaformer
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

workdir=
for flag in "$@"; do
  case $flag in
    --workdir=?*) workdir=${flag#*=} ;;
  esac
done
if [ -z "$workdir" ]; then
  echo "usage: sbatch launch/slurm.sh --config=FILE --workdir=FOLDER ..." >&2
  exit 2
fi

# This job's files: exit codes by process, and the count of failed attempts.
case $workdir in
  gs://*) notes=$PWD/slurm/$SLURM_JOB_ID ;;
  *) notes=$workdir/slurm/$SLURM_JOB_ID ;;
esac
rm -rf "$notes/codes"
mkdir -p "$notes/codes"

# The newest complete checkpoint: a folder with a manifest, whose name is its
# step.
latest_step() {
  case $workdir in
    gs://*) gcloud storage ls "$workdir/checkpoints/*/manifest.json" ;;
    *) find "$workdir/checkpoints" -maxdepth 2 -name manifest.json ;;
  esac 2>/dev/null | sed -En 's|.*/([0-9]+)/manifest.json$|\1|p' |
    sort -n | tail -n 1 || true
}

# srun returns the highest exit code, so a 134 would hide a 3. SLURM sends
# SIGTERM to all processes; this shell must survive it to write the code.
# shellcheck disable=SC2016
step='trap : TERM
"${@:2}" &
pid=$! code=0
wait "$pid" || code=$?
while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
echo "$code" >"$1/$SLURM_PROCID"
exit "$code"'

before=$(latest_step)
srun bash -c "$step" - "$notes/codes" \
  "${PYTHON:-.venv/bin/python}" -m metaformer_jax.main "$@" || true

codes=$(cat "$notes"/codes/* 2>/dev/null | sort -n | uniq | tr '\n' ' ')
echo "exit codes: ${codes:-none}"
case " $codes" in
  *" 3 "*) exit 3 ;;
  *" 2 "*) exit 2 ;;
  " 0 ") exit 0 ;;
esac

fruitless=0
if [ "$(latest_step)" = "$before" ]; then
  fruitless=$(($(cat "$notes/fruitless" 2>/dev/null || echo 0) + 1))
fi
echo "$fruitless" >"$notes/fruitless"
if [ "$fruitless" -ge 6 ]; then
  echo "no new checkpoint in six attempts: giving up" >&2
  exit 1
fi
scontrol requeue "$SLURM_JOB_ID"
