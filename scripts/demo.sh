#!/usr/bin/env bash
# Sets the environment up where needed and runs the demo: scripts/demo.sh [arguments of `vllm-npu demo`]
# With --ascend-emulated: in the environment of vllm-ascend on the emulated Ascend device.
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
environment=""
case " $* " in *" --ascend-emulated "*) environment=--ascend ;; esac
PY=$("$root/scripts/setup.sh" ${environment:+"$environment"} | tail -n1)
# The current folder may hold another checkout: this one is meant.
export PYTHONSAFEPATH=1
exec "$PY" -m vllm_npu.cli demo "$@"
