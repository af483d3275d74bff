#!/usr/bin/env bash
# The part of launch/tpu_vm.py that runs on each host of a TPU slice, by ssh.
#
#   worker.sh install ARCHIVE           install the code, Python and gcsfuse
#   worker.sh start ID BUCKETS COMMAND  mount the buckets (a,b,c), start a run
#   worker.sh state                     print "worker INDEX ID STATE"
#   worker.sh stop SECONDS              SIGTERM, so that it saves; then SIGKILL
#   worker.sh log LINES [follow]        show the end of the run's output
#
# STATE is none, running, or the exit code. A run has its own session, so it
# continues when the connection ends, and writes its exit code to a file.
set -euo pipefail

home=$HOME/metaformer_run  # Files: id, log, pid, session, exit, lock.
code=$HOME/metaformer_jax  # The unpacked archive.
mounts=${MOUNTS:-/gcs}
mkdir -p "$home"

# Whether any process of the run exists: each holds the lock until it ends.
# Unlike a process id, a lock cannot be left over from before a reboot.
running() {
  ! flock --nonblock "$home/lock" true
}

index() {
  case $(hostname) in
    *-w-*) hostname | sed 's/.*-w-//' ;;
    *) hostname ;;
  esac
}

install_packages() {
  # A new machine holds the lock while it installs its updates.
  local apt=(sudo apt-get -o DPkg::Lock::Timeout=600 --quiet)
  "${apt[@]}" update
  "${apt[@]}" install --yes "$@"
}

install_gcsfuse() {
  # Older versions than 3 have no profiles.
  if [[ $(gcsfuse --help 2>&1) == *--profile* ]]; then return; fi
  local keys=/usr/share/keyrings/cloud.google.asc
  sudo curl --fail --silent --show-error --output "$keys" \
    https://packages.cloud.google.com/apt/doc/apt-key.gpg
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt" \
    "gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  install_packages gcsfuse
}

install() {
  rm -rf "$code"
  mkdir "$code"
  tar --extract --gzip --file "$1" --directory "$code"
  install_gcsfuse
  # The system's Python is older than 3.11, or belongs to the system.
  if ! python3 -m pip --version >/dev/null 2>&1; then
    install_packages python3-pip
  fi
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user 'uv>=0.5,<1'
  cd "$code"
  python3 -m uv venv --quiet --python 3.11
  python3 -m uv pip install --quiet '.[tpu,tfds,gcs]'
}

# For data, which are only read and do not change during a run: names and sizes
# are kept forever, and files that are read from their beginning on the disk,
# of which a fifth stays free.
mount_bucket() {
  local free
  if mountpoint --quiet "$mounts/$1"; then return; fi
  sudo mkdir -p "$mounts/$1" "$home/cache/$1"
  sudo chown "$(id -u)" "$mounts/$1" "$home/cache/$1"
  free=$(df --block-size=1M --output=avail "$home" | tail -n 1)
  gcsfuse --profile=aiml-training --implicit-dirs -o ro \
    --cache-dir="$home/cache/$1" \
    --file-cache-max-size-mb=$((free * 4 / 5 / $2)) "$1" "$mounts/$1"
}

start() {
  local id=$1 bucket
  local -a buckets
  IFS=, read -r -a buckets <<<"$2"
  shift 2
  for bucket in "${buckets[@]}"; do
    mount_bucket "$bucket" "${#buckets[@]}"
  done
  exec 9>"$home/lock"  # Inherited by all processes of the run.
  if ! flock --wait 1 9; then
    echo "another run is active already: $(cat "$home/id")" >&2
    exit 1
  fi
  rm -f "$home/exit" "$home/pid"
  echo "$id" >"$home/id"
  nohup setsid bash "$0" run "$@" >>"$home/log" 2>&1 </dev/null &
}

# Runs the command, in its own session, and writes its exit code to a file.
run() {
  local status=0 pid
  trap : TERM  # A machine that shuts down sends SIGTERM to all processes.
  echo "$$" >"$home/session"
  echo "--- $(date --utc +%FT%TZ) $*"
  if [ -d "$code" ]; then cd "$code"; fi
  "$@" &
  pid=$!
  echo "$pid" >"$home/pid"
  wait "$pid" || status=$?
  while kill -0 "$pid" 2>/dev/null; do  # The trap interrupted the wait.
    status=0
    wait "$pid" || status=$?
  done
  echo "--- $(date --utc +%FT%TZ) exit code $status"
  keep_log "$@" || echo "the log was not copied to the workdir"
  echo "$status" >"$home/exit.tmp"
  mv "$home/exit.tmp" "$home/exit"
}

# Copies the log to the workdir, as the machine may soon be deleted.
keep_log() {
  local flag
  for flag in "$@"; do
    case $flag in
      --workdir=gs://*)
        gcloud storage cp "$home/log" \
          "${flag#--workdir=}/logs/$(hostname).log"
        ;;
    esac
  done
}

state() {
  local id=none status=none
  if [ -f "$home/id" ]; then
    id=$(cat "$home/id")
    if [ -f "$home/exit" ]; then
      status=$(cat "$home/exit")
    elif running; then
      status=running
    else
      status=137  # No exit code: killed, or the machine was restarted.
    fi
  fi
  echo "worker $(index) $id $status"
}

stop() {
  if running && [ ! -f "$home/exit" ]; then
    # Only the main process: it saves, and ends its worker processes itself.
    kill -TERM "$(cat "$home/pid")" 2>/dev/null || true
    for _ in $(seq "$1"); do
      if ! running || [ -f "$home/exit" ]; then break; fi
      sleep 1
    done
  fi
  if running; then
    kill -KILL -- "-$(cat "$home/session")" 2>/dev/null || true
  fi
}

log() {
  local follow=()
  if [ "${2:-}" = follow ]; then follow=(-F); fi
  exec tail --lines="$1" "${follow[@]}" "$home/log"
}

"$@"
