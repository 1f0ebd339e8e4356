#!/usr/bin/env bash
# Makes the environment if it is missing, and runs the demo: scripts/demo.sh [arguments of `vllm-npu demo`]
# With --ascend-emulated, the environment is that of vllm-ascend on the emulated Ascend device, beside vLLM 0.23.
# With --ascend-emulated=0.30, it is beside vLLM 0.30.
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
environment=""
arguments=()
for argument; do
  case $argument in
    --ascend-emulated) environment=--ascend ;;
    --ascend-emulated=*) environment=--ascend=${argument#*=} argument=--ascend-emulated ;;
  esac
  arguments+=("$argument")
done
PY=$("$root/scripts/setup.sh" ${environment:+"$environment"} | tail -n1)
# The current folder may be another checkout, and Python must not import from it.
export PYTHONSAFEPATH=1
exec "$PY" -m vllm_npu.cli demo ${arguments[@]+"${arguments[@]}"}
