#!/usr/bin/env bash
# One node's part of a run on one or more nodes. Give the same command on each of them, with that node's NODE_RANK:
#
#   NNODES=2 HEAD=10.0.0.1 NODE_RANK=0 launch/multinode.sh recipe=nemotron data.rows=... output_dir=/shared/run
#   NNODES=2 HEAD=10.0.0.1 NODE_RANK=1 launch/multinode.sh recipe=nemotron data.rows=... output_dir=/shared/run
#
# NNODES        nodes (1)
# NODE_RANK     number of this node, from 0 (0); node 0 must be the one at HEAD
# HEAD          address at which the others reach node 0 (needed for more than one node)
# PORT          of node 0, where the nodes meet (29500)
# NPROC         processes on this node (one for each GPU)
# MAX_RESTARTS  how often the processes are started again after a failure, on whichever node it was (3)
# SAVE_SECONDS  how long processes may take to save when they are told to end (600)
#
# A node that was lost joins again with the same command; the run goes on from its newest checkpoint (train.resume=auto).
# On SIGTERM or SIGUSR1 the processes save and end, and this script leaves with 75: start it again. Any other option of
# torchrun can be given as a variable: PET_RDZV_ID=mine, PET_MONITOR_INTERVAL=1.
set -euo pipefail

nodes=${NNODES:-1}
rank=${NODE_RANK:-0}
if [ "$nodes" -gt 1 ] && [ -z "${HEAD:-}" ]; then
  echo "multinode.sh: HEAD is not set: the address at which the other nodes reach node 0" >&2
  exit 2
fi
head=${HEAD:-127.0.0.1}
port=${PORT:-$([ "$nodes" -gt 1 ] && echo 29500 || echo 0)}

# torch numbers the nodes by these names, in order. So node 0 has the first process, which exports when the others are
# done, and the meeting point stays where it is for as long as it is needed. `~` sorts behind all that begins an address.
name=$head
[ "$rank" -eq 0 ] || name=$(printf '~%05d' "$rank")

# Every start of the processes gets a store of its own. In the agents', torch's default, a node that was started again
# waits for an address that is not written a second time (docs/decisions.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-600}
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_RDZV_ID=${PET_RDZV_ID:-evs}

torchrun \
  --nnodes "$nodes" \
  --nproc-per-node "${NPROC:-gpu}" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$head:$port" \
  --rdzv-conf "is_host=$([ "$rank" -eq 0 ] && echo 1 || echo 0)${RDZV_CONF:+,$RDZV_CONF}" \
  --local-addr "$name" \
  "$(dirname "${BASH_SOURCE[0]}")/uptrain.py" train.resume=auto "$@" &
torchrun=$!

told_to_end=
# Once: a second signal would end the saving.
trap '[ -n "$told_to_end" ] || kill -TERM "$torchrun" 2>/dev/null || true; told_to_end=1' TERM USR1

code=0
wait "$torchrun" || code=$?
while [ "$code" -gt 128 ] && kill -0 "$torchrun" 2>/dev/null; do # only the waiting ended, by a signal
  code=0
  wait "$torchrun" || code=$?
done
if [ -n "$told_to_end" ] && [ "$code" -ne 0 ]; then
  exit 75
fi
exit "$code"
