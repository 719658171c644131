#!/usr/bin/env bash
# All that groups of several hosts need GPUs for, on one machine with one GPU or more, in twenty minutes:
#
#     tests/on_hosts.sh PROGRAM OUTPUT
#
# RANKS: the ranks of a host (default: "1 2"). STEPS: the names of the steps to run, without the ranks (default: all). LIMIT: seconds
# for the whole script (default: 1190). So RANKS=1 LIMIT=590 and RANKS=2 LIMIT=590 are two calls of ten minutes that do the same.
#
# PROGRAM is fused-collective with its kernels inside, as `cargo xtask dist` packs it. NCCL must be found: NCCL_LIBRARY names its file
# where the loader does not find it. Hosts are told apart by NCCL_HOSTID, so ranks of two hosts may share a GPU, on which they take
# turns: times mean nothing. NCCL speaks over the loopback interface, and without multicast over NVLink.
#
# Logs go to the folder OUTPUT. The last lines are a table of the steps. The exit status is the largest of all steps'.
set -uo pipefail
program=$(realpath "${1:?PROGRAM}") output=$(mkdir -p "${2:?OUTPUT}" && realpath "$2") worst=0 table=()
export NCCL_SOCKET_IFNAME=lo NCCL_NVLS_ENABLE=0
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
ends=$((SECONDS + ${LIMIT:-1190}))

# Notes a step's end: its name, status and seconds, and the last line of its log.
note() {
  local name=$1 status=$2 seconds=$3
  ((status <= worst)) || worst=$status
  table+=("$(printf '%-22s %-8s %4d s  %s' "$name" "$( ((status == 0)) && echo ok || echo "FAILED $status")" "$seconds" \
    "$(grep -v '^$' "$output/$name.log" | tail -1 | cut -c1-110)")")
  # What failed in it, so that the output alone tells.
  ((status == 0)) || grep -h "FAILED" "$output/$name.log" | head -5
}

# True if the step is to run.
wanted() { [[ -z ${STEPS-} || " $STEPS " == *" ${1%-2x*} "* ]]; }

# Runs the program for at most so many seconds.
step() {
  local name=$1 most=$2 began=$SECONDS status=0
  wanted "$name" || return 0
  ((most < ends - SECONDS)) || most=$((ends - SECONDS))
  if ((most <= 0)); then
    echo "no time is left" >"$output/$name.log"
    note "$name" 124 0
    return
  fi
  timeout --kill-after=10 "$most" "$program" "${@:3}" >"$output/$name.log" 2>&1 || status=$?
  note "$name" $status $((SECONDS - began))
}

# Options for so many hosts of so many ranks. Ranks share GPUs where there are fewer.
hosts() {
  echo --backend cuda --hosts "$1" --nproc-per-node "$2"
  (($1 * $2 <= gpus)) || echo --oversubscribe
}

# A host that vanishes: both ranks of host b are killed at once in the middle of a soak. Ranks 0 and 1 must say so within 30 seconds.
vanish() {
  local name=$1 ranks=$2 began=$SECONDS status=0 rank pids=() shared=()
  ((2 * ranks <= gpus)) || shared=(--oversubscribe)
  local secret address
  secret=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
  address=127.0.0.1:$((20000 + RANDOM % 10000))
  for ((rank = 0; rank < 2 * ranks; rank++)); do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$((2 * ranks)) LOCAL_WORLD_SIZE=$ranks FUSED_COLLECTIVE_KEY="vanish-$$-$name" \
      FUSED_COLLECTIVE_SECRET=$secret FUSED_COLLECTIVE_ADDRESS=$address NCCL_HOSTID=host-$((rank / ranks)) \
      timeout --kill-after=10 180 "$program" soak --minutes 2 --backend cuda --deadline 5 "${shared[@]}" \
      >"$output/$name-$rank.log" 2>&1 &
    pids+=($!)
  done
  # The first operations set up what they use.
  sleep 40
  for ((rank = ranks; rank < 2 * ranks; rank++)); do
    pkill -KILL -P "${pids[rank]}" 2>/dev/null
  done
  local struck=$SECONDS
  for ((rank = 0; rank < ranks; rank++)); do
    wait "${pids[rank]}"
    # A rank that fails says so, and its status is that of a failure.
    case $? in 1 | 90) ;; *) status=1 ;; esac
  done
  ((SECONDS - struck <= 30)) || status=1
  # At least one of the survivors names a rank that was lost.
  cat "$output/$name"-*.log >"$output/$name.log"
  grep -q "rank [0-9]* was lost" "$output/$name.log" || status=1
  wait
  note "$name" $status $((SECONDS - began))
}

if ((gpus == 0)); then
  # What can be seen without a GPU: hosts meet, and are told what the CPU backend is for.
  for ranks in ${RANKS:-1 2}; do
    name=refusal-2x$ranks began=$SECONDS status=0
    timeout 60 "$program" verify --quick --backend cpu --hosts 2 --nproc-per-node $ranks >"$output/$name.log" 2>&1
    grep -q "the CPU backend is for ranks of one host, and these are on 2" "$output/$name.log" || status=1
    note "$name" $status $((SECONDS - began))
  done
  echo "no GPU: only refusals were seen"
else
  for ranks in ${RANKS:-1 2}; do
    # NCCL's own all-reduce refuses ranks that share a GPU.
    all_reduces=custom
    ((2 * ranks > gpus)) || all_reduces=nccl,custom
    # shellcheck disable=SC2046 # words of options
    {
      step verify-2x$ranks 240 verify --quick $(hosts 2 $ranks)
      step element-2x$ranks 120 verify --quick --num-tokens 17 --partial-sums element $(hosts 2 $ranks)
      # Of few tokens and many: graphs are what is timed. Ranks that share GPUs take milliseconds for an operation.
      step graphs-2x$ranks 120 bench --num-tokens 1,17,512 --quant-modes none,fp8 --trials 2 --warmup 1 --allreduce $all_reduces \
        $(hosts 2 $ranks)
      step soak-2x$ranks 100 soak --minutes 1 $(hosts 2 $ranks)
      step faults-2x$ranks 300 faults --deadline 4 $(hosts 2 $ranks) --cases operations/kill/1 operations/stop/1 \
        operations/stuck/1 operations/kill/0 replays/kill/1 replays/stop/1 operations/abort/1 operations/other-quant/1
    }
    ! wanted vanish || vanish vanish-2x$ranks $ranks
  done
fi
printf '\n%-22s %-8s %6s  %s\n' step result time "last line"
printf '%s\n' "${table[@]}"
exit "$worst"
