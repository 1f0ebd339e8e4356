#!/usr/bin/env bash
# The first hour on Ascend hardware: runs what only NPUs can prove, and packs the results into one archive to send back.
#
#   scripts/on_hardware.sh [--ranks N] [--out FOLDER]      with PYTHON: a python that has CANN's torch_npu, vllm_npu and vllm-ascend
#   scripts/on_hardware.sh --emulated                      on the emulated device, which shows that this script works
#
# Each step has a time limit, and a step that fails does not stop the others. Nothing on the machine is changed: results, logs and
# temporary files lie in FOLDER (default: a new folder in the current one). results.md there has a row for each step.
set -u -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
ranks="" out="" emulated=""
while [ $# -gt 0 ]; do
  case $1 in
    --ranks) ranks=${2:?--ranks needs a number} && shift 2 ;;
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    --emulated) emulated=yes && shift ;;
    *) echo "on_hardware: takes --ranks N, --out FOLDER and --emulated; got: $1" >&2 && exit 2 ;;
  esac
done
case $ranks in *[!0-9]* | 0 | 1) echo "on_hardware: --ranks $ranks: give 2 or more" >&2 && exit 2 ;; esac

out=${out:-$PWD/vllm-npu-hardware-$(date +%Y%m%d-%H%M%S)}
if [ -e "$out" ] && [ -n "$(ls -A "$out" 2>/dev/null)" ]; then
  echo "on_hardware: $out is not empty; name another folder" >&2
  exit 2
fi
mkdir -p "$out/tmp" || exit 1
out=$(cd "$out" && pwd)
export TMPDIR="$out/tmp" PYTHONDONTWRITEBYTECODE=1

if [ -n "$emulated" ]; then
  PYTHON=$("$root/scripts/setup.sh" --ascend | tail -n1) || exit
  # Engines find the emulated device by these variables. The other commands find it because there is no CANN.
  emulate="VLLM_NPU_EMULATOR=1 VLLM_NPU_EMULATOR_SOC=A3 VLLM_NPU_EMULATOR_MEMORY_GB=4 VLLM_NPU_EMULATOR_UNDEFINED=zero TORCHDYNAMO_DISABLE=1"
  export VLLM_NPU_EMULATOR_SOC=A3
  ranks=${ranks:-2}
else
  PYTHON=${PYTHON:-python3}
  emulate=""
  ranks=${ranks:-$("$PYTHON" -c 'import torch_npu; print(min(8, torch_npu.npu.device_count()))' 2>/dev/null)}
  case ${ranks:-0} in
    0 | 1)
      echo "on_hardware: $PYTHON sees ${ranks:-no} NPUs and needs two; source CANN's set_env.sh, name a python with torch_npu by PYTHON, or use --emulated" >&2
      exit 1
      ;;
  esac
fi
cd "$root" || exit 1

{
  echo "# vllm_npu on ${emulated:+emulated }Ascend devices, $(date +%Y-%m-%d), $ranks ranks"
  echo
  echo "| step | exit status | seconds | last line |"
  echo "|---|---|---|---|"
} >"$out/results.md"

# Runs a command with a time limit (seconds). Its output goes to NAME.log, and its row to results.md. 124 and 137: the limit.
step() { # name, limit, command...
  local name=$1 limit=$2 status=0 started=$SECONDS last
  shift 2
  echo "on_hardware: $name (at most $limit s): $*" >&2
  timeout --kill-after=30 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || status=$?
  last=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n1 | tr '|' '/' | cut -c1-160)
  echo "| $name | $status | $((SECONDS - started)) | \`$last\` |" >>"$out/results.md"
  [ $status -eq 0 ] || failed=yes
}

# vLLM takes one of the two platforms that are installed. Without vLLM, only the step compare needs this variable.
VLLM_PLUGINS=${VLLM_PLUGINS:-$("$PYTHON" -c 'from vllm_npu.plugin import entry_points as e; print(e.without(e.ASCEND_PLATFORM).partition("=")[2])' 2>/dev/null)}
export VLLM_PLUGINS
failed=""
step machine 60 bash -c 'npu-smi info; uname -a; nproc; free -g; env | grep -E "^(ASCEND|HCCL|CANN|VLLM|TASK_QUEUE)" | sort; '"'$PYTHON'"' -m pip list 2>/dev/null | grep -iE "^(torch|vllm|numpy|transformers)"; true'
step doctor 300 "$PYTHON" -m vllm_npu doctor --json "$out/doctor.json"
if [ -z "$emulated" ]; then # on the emulated device, tests/emulated take their place
  step tests-npu 1800 "$PYTHON" -m pytest -q -p no:cacheprovider tests/npu
fi
quick="" tokens=1,8,64,512
if [ -n "$emulated" ]; then # less of the same, because nothing is timed there
  quick=--quick tokens=8
fi
step verify 1800 "$PYTHON" -m vllm_npu verify --transport hccl --ranks "$ranks" $quick --json "$out/verify.json"
step verify-graph 1800 "$PYTHON" -m vllm_npu verify --transport hccl --ranks "$ranks" --graph $quick --json "$out/verify-graph.json"
step buffers 1800 "$PYTHON" -m vllm_npu.tools.hardware_checks buffers --ranks "$ranks"
step sums 300 "$PYTHON" -m vllm_npu.tools.hardware_checks sums
step compare 900 env $emulate HCCL_BUFFSIZE=300 "$PYTHON" -m vllm_npu.tools.hardware_checks compare --ranks 2
step bench 1800 "$PYTHON" -m vllm_npu bench --transport hccl --ranks "$ranks" --tokens "$tokens" --json "$out/bench.json"

rm -rf "$out/tmp"
archive=$out.tar.gz
tar -C "$(dirname "$out")" -czf "$archive" "$(basename "$out")"
cat "$out/results.md"
echo "on_hardware: send back $archive" >&2
[ -z "$failed" ]
