#!/bin/bash
# Train on a Slurm allocation: a Ray head on the first node, a worker on each other one.
#
#   sbatch --nodes 4 slurm.sh python jobs/phase2.py --cluster.workers 1:4
#   sbatch --array 0-2 slurm.sh python jobs/phase2.py --seed %a        # %a: the array's index
#   scancel --batch --signal TERM JOB                                  # stop with a checkpoint
#
# Before the time limit Slurm sends USR1 to this script: the job stops with a checkpoint, and the
# same command is queued again and resumes its run. USR1, because TERM is what a user sends who
# wants no other start. Runs, data and FTLIB_HOME must be on storage that all nodes share. Set the
# partition, GPUs, CPUs and the virtual environment to your site's.
#SBATCH --job-name=ftlib
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

[[ $# -gt 0 ]] || {
  echo "usage: sbatch slurm.sh python jobs/phase2.py --cluster.workers 1:4" >&2
  exit 2
}

command=("${@//%a/${SLURM_ARRAY_TASK_ID:-0}}")
# Two jobs on one node must not share ports or folders.
port=$((20000 + SLURM_JOB_ID % 20000))
nodes=()
while IFS= read -r node; do
  nodes+=("$node")
done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}')

# Ray's ports are open to everybody on the nodes; only who has this token is let in.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
cpus=${SLURM_CPUS_PER_TASK:-1}
# srun does not take this from sbatch's --cpus-per-task.
export SRUN_CPUS_PER_TASK=$cpus

start_ray() { # NODE, then the options of `ray start`
  # shellcheck disable=SC2016  # the node expands it
  srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap --export=ALL \
    bash -c 'mkdir -p "$RAY_TMPDIR" && exec ray start "$@"' ray \
    --block --disable-usage-stats --num-cpus "$cpus" "${@:2}" &
  ray_steps+=("$!")
}

# End Ray: again after a second, since a step that was only just started may not have seen the
# first TERM, and at last by force.
stop_ray() {
  local attempt step alive
  for attempt in $(seq 0 99); do
    alive=false
    for step in "${ray_steps[@]}"; do
      kill -0 "$step" 2>/dev/null || continue
      alive=true
      if ((attempt % 10 == 0)); then kill -TERM "$step" 2>/dev/null || true; fi
    done
    [[ $alive == true ]] || return 0
    sleep 0.1
  done
  for step in "${ray_steps[@]}"; do kill -KILL "$step" 2>/dev/null || true; done
}

# End Ray, then this script with CODE; or queue it again if the time limit stopped the job.
finish() { # CODE
  trap '' USR1 TERM INT
  stop_ray
  if [[ $requeue == true && $1 == 143 ]]; then
    echo "the time limit is near: queued again, to resume from the checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  exit "$1"
}

ray_steps=()
requeue=false
signalled=false
job=""

# shellcheck disable=SC2317,SC2329  # the traps call it
stop() {
  signalled=true
  # To the job alone: Ray must live until the checkpoint is written.
  [[ -z $job ]] || kill -TERM "$job" 2>/dev/null || true
}
trap 'requeue=true; stop' USR1
trap 'stop' TERM INT

# Sweeps need the dashboard: Ray asks it for trials that have ended. It listens on this node only.
start_ray "$head" --head --node-ip-address "$address" --port "$port" \
  --dashboard-host 127.0.0.1 --dashboard-port $((port + 20000))
ready=false
for _ in $(seq 60); do
  [[ $signalled == false ]] || finish 143
  kill -0 "${ray_steps[0]}" 2>/dev/null || break
  if RAY_ADDRESS="$address:$port" ray health-check >/dev/null 2>&1; then
    ready=true
    break
  fi
  sleep 2
done
if [[ $ready == false ]]; then
  echo "error: Ray did not start on $head at $address:$port; its logs are in $RAY_TMPDIR there" >&2
  finish 1
fi
for node in "${nodes[@]:1}"; do
  start_ray "$node" --address "$address:$port"
done

export RAY_ADDRESS="$address:$port"
"${command[@]}" &
job=$!
[[ $signalled == false ]] || stop # it came before there was a job to send it to
# `wait` also ends at a signal; the job ends when it has written its checkpoint.
while true; do
  signalled=false
  status=0
  wait "$job" || status=$?
  [[ $signalled == true ]] || break
done
finish "$status"
