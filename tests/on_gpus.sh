#!/usr/bin/env bash
# All that only GPUs can show, on as many as there are:
#
#     tests/on_gpus.sh PROGRAM OUTPUT [EARLIER]
#
# PROGRAM is fused-collective with its kernels inside, as `cargo xtask dist` packs it; nothing else of this repository is needed.
# EARLIER is one of an earlier version, which takes turns with it. PEERS names the peers that Python has: flashinfer,torch.
# STEPS: the names of the steps to run (default: all). LIMIT: seconds for the whole script (default: 590). Reports and logs go to the
# folder OUTPUT. A step that is ended at its own limit, or at the script's, leaves no report. The exit status is the largest of all
# steps'.
set -uo pipefail
program=$(realpath "${1:?PROGRAM}") output=$(mkdir -p "${2:?OUTPUT}" && realpath "$2") earlier=${3:+$(realpath "$3")}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)} peers=(${PEERS:+--peers "$PEERS" --peer-deadline 120}) worst=0
whole=${LIMIT:-590} ran=0
ends=$((SECONDS + whole))

# Keeps the largest exit status.
ended() { (($1 <= worst)) || worst=$1; }
# The seconds that a step may take, of so many that it asks for.
limit() { echo $(($1 < ends - SECONDS ? $1 : ends - SECONDS)); }

# True if the step is to run.
wanted() { [[ -z ${STEPS-} || " $STEPS " == *" $1 "* ]]; }

# Runs a step for at most so many seconds, and prints its last line.
step() {
  local name=$1 status=0
  wanted "$name" || return 0
  ran=$((ran + 1))
  if (($(limit "$2") <= 0)); then
    echo "        $name: no time is left" && ended 124
    return
  fi
  timeout --kill-after=10 "$(limit "$2")" "$program" "${@:3}" >"$output/$name.log" 2>&1 || status=$?
  ended $status
  printf '%4d s  %-12s %s%s\n' $((SECONDS - ends + whole)) "$name" "$(grep -v '^$' "$output/$name.log" | tail -1)" \
    "$( ((status == 0)) || echo " [status $status]")"
}
# Times fused variants, PROGRAM and EARLIER in turns; `--compare` prints rows that got slower.
turns() {
  local name=$1 turn
  [ -n "$earlier" ] && wanted "$name" || return 0
  for turn in 1 2; do
    (($(limit 60) > 0)) || return 0
    timeout "$(limit 60)" "$earlier" bench --backend cuda --allreduce custom --json "$output/$name-$turn-before.json" "${@:2}" \
      >"$output/$name-$turn-before.log" 2>&1 || ended $?
    STEPS='' step "$name-$turn" 60 bench --backend cuda --allreduce custom --tolerance 2 --compare "$output/$name-$turn-before.json" \
      --json "$output/$name-$turn.json" "${@:2}"
  done
}

tokens=1,16,64,128,256,512,1024,2048
step links 60 links --backend cuda --json "$output/links.json"
turns turns-8192 --num-tokens $tokens --residual sharded
for hidden in 2880 4096 7168 16384; do
  turns turns-$hidden --num-tokens 1,64,512 --hidden-dim $hidden
done
step verify 120 verify --quick --backend cuda --nproc-per-node "$gpus"
sizes=$(seq -s, 3 $((gpus - 1)))
if ((gpus > 3)); then
  step sizes 120 verify --quick --num-tokens 17 --backend cuda --nproc-per-node "$sizes"
  step groups 60 verify --quick --num-tokens 17 --backend cuda --nproc-per-node $((gpus / 2)) --groups 2
fi
step faults 90 faults --backend cuda --deadline 4 --cases operations/kill/1 operations/stop/1 operations/stuck/1 operations/kill/0 \
  replays/kill/1 replays/stop/1 operations/abort/1 operations/other-quant/1
step bench 240 bench --backend cuda --num-tokens $tokens --residual sharded "${peers[@]}" --trials 30 \
  --output-file "$output/bench.md" --json "$output/bench.json" --plot "$output/bench.svg"
step wires 300 bench --backend cuda --num-tokens $tokens --quant-modes none --allreduce custom --wire exact,int8,int4 \
  "${peers[@]}" --output-file "$output/wires.md" --json "$output/wires.json"
step bench-4096 120 bench --backend cuda --num-tokens 1,64,512,2048 --hidden-dim 4096 "${peers[@]}" --json "$output/bench-4096.json"
step quantized 200 bench --backend cuda --num-tokens 1,64,128,512,2048 --allreduce custom "${peers[@]}" \
  --quant-modes fp8,fp8_per_token,fp8_group128,mxfp8,fp4,mxfp4 --output-file "$output/quantized.md" --json "$output/quantized.json"
for pattern in post-norm moe; do
  step $pattern 240 bench --backend cuda --num-tokens 1,16,64,128,512 --pattern $pattern --quant-modes none "${peers[@]}" \
    --output-file "$output/$pattern.md" --json "$output/$pattern.json"
done
# In what is left, less a little for its end.
left=$((ends - SECONDS - 20))
((left < 60)) || step soak $((left + 20)) soak --minutes $((left / 60)) --backend cuda --nproc-per-node "$gpus"
((ran > 0)) || { echo "no step is named '$STEPS'" && worst=2; }
exit "$worst"
