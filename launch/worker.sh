#!/usr/bin/env bash
# What launch/tpu_vm.py does on each host of a TPU slice; it copies this file
# there and runs it by ssh.
#
#   worker.sh install ARCHIVE           the code, its environment, gcsfuse
#   worker.sh start ID BUCKETS COMMAND  mounts the buckets (a,b,c), starts a run
#   worker.sh state                     prints "worker INDEX ID STATE"
#   worker.sh stop SECONDS              SIGTERM, which saves; then SIGKILL
#   worker.sh log LINES [follow]        the end of the run's output
#
# STATE is none, running, or the exit code. A run outlives the connection that
# started it: it has a session of its own, and says how it ended in a file.
set -euo pipefail

home=$HOME/metaformer_run  # Of the run: id, log, pid, session, exit, lock.
code=$HOME/metaformer_jax  # The unpacked archive.
mounts=${MOUNTS:-/gcs}
mkdir -p "$home"

# Whether any process of the run is there: each holds the lock until it ends;
# neither a reboot nor a reused process id is mistaken for one.
running() {
  ! flock --nonblock "$home/lock" true
}

index() {
  case $(hostname) in
    *-w-*) hostname | sed 's/.*-w-//' ;;
    *) hostname ;;
  esac
}

install_gcsfuse() {
  if command -v gcsfuse >/dev/null; then return; fi
  local keys=/usr/share/keyrings/cloud.google.asc
  sudo curl --fail --silent --show-error --output "$keys" \
    https://packages.cloud.google.com/apt/doc/apt-key.gpg
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt" \
    "gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A fresh machine installs its updates first.
  local apt=(sudo apt-get -o DPkg::Lock::Timeout=600 --quiet)
  "${apt[@]}" update
  "${apt[@]}" install --yes gcsfuse
}

install() {
  rm -rf "$code"
  mkdir "$code"
  tar --extract --gzip --file "$1" --directory "$code"
  install_gcsfuse
  # The machines' own Python is older than 3.11.
  python3 -m pip install --quiet --user 'uv>=0.5,<1'
  cd "$code"
  python3 -m uv venv --quiet --python 3.11
  python3 -m uv pip install --quiet '.[tpu,tfds]'
}

# Every host must see at once what another one wrote: nothing is cached, which
# gcsfuse otherwise does without end on large machines. What is synced is in
# the bucket: no streaming writes, which are there only once closed.
mount_bucket() {
  if mountpoint --quiet "$mounts/$1"; then return; fi
  sudo mkdir -p "$mounts/$1"
  sudo chown "$(id -u)" "$mounts/$1"
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --enable-streaming-writes=false --implicit-dirs "$1" "$mounts/$1"
}

start() {
  local id=$1 buckets=$2 bucket
  shift 2
  for bucket in ${buckets//,/ }; do
    mount_bucket "$bucket"
  done
  exec 9>"$home/lock"  # Handed on to the run, and by it to all its processes.
  if ! flock --wait 1 9; then
    echo "a run is there already: $(cat "$home/id")" >&2
    exit 1
  fi
  rm -f "$home/exit" "$home/pid"
  echo "$id" >"$home/id"
  nohup setsid bash "$0" run "$@" >>"$home/log" 2>&1 </dev/null &
}

# In a session of its own: runs the command and notes how it ended.
run() {
  local status=0 pid
  trap : TERM  # A machine that goes down tells all processes.
  echo "$$" >"$home/session"
  echo "--- $(date --utc +%FT%TZ) $*"
  if [ -d "$code" ]; then cd "$code"; fi
  "$@" &
  pid=$!
  echo "$pid" >"$home/pid"
  wait "$pid" || status=$?
  while kill -0 "$pid" 2>/dev/null; do  # The trap cut the wait off.
    status=0
    wait "$pid" || status=$?
  done
  echo "--- $(date --utc +%FT%TZ) exit code $status"
  keep_log "$@" || echo "the log is on this machine only"
  echo "$status" >"$home/exit.tmp"
  mv "$home/exit.tmp" "$home/exit"
}

# Copies the log into the workdir, as the machine may be deleted soon.
keep_log() {
  local flag folder
  for flag in "$@"; do
    case $flag in
      --workdir="$mounts"/*)
        folder=${flag#--workdir=}/logs
        mkdir -p "$folder" && cp "$home/log" "$folder/$(hostname).log"
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
      status=137  # Ended without a word: killed, or the machine restarted.
    fi
  fi
  echo "worker $(index) $id $status"
}

stop() {
  if running && [ ! -f "$home/exit" ]; then
    # The run's main process alone: it saves and ends its helpers itself.
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
