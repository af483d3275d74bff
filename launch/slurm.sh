#!/usr/bin/env bash
# Trains on GPUs under SLURM, one process a node with all its GPUs:
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh \
#     --config=configs/poolformer_s24.py --workdir=/shared/runs/s24 \
#     --config.data.path=/shared/imagenet
#
# Submit it from the repository's root; its .venv, the workdir and the data must
# be seen by all nodes. Two minutes before the time limit, and when the job is
# preempted, the run saves and ends with 143. It is queued again unless it is
# done, misconfigured (2) or diverged (3), or made no checkpoint in six attempts
# in a row.
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

# Of this job: each process's exit code, and what came of the last attempt.
notes=$workdir/slurm/$SLURM_JOB_ID
rm -rf "$notes/codes"
mkdir -p "$notes/codes"

# The newest complete step: a folder that is named by a number.
latest_step() {
  find "$workdir/checkpoints" -maxdepth 1 -type d -regex '.*/[0-9]+' \
    -printf '%f\n' 2>/dev/null | sort -n | tail -n 1 || true
}

# srun returns the highest code of all, which hides a 3 behind a 134. SLURM's
# SIGTERM is for all processes: this shell must live to note the code.
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
