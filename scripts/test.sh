#!/usr/bin/env bash
# Sets the environments up where needed and runs the tests: scripts/test.sh [arguments of pytest]
# Paths are relative to the checkout: scripts/test.sh tests/pure -k routing
# Tests of the emulated Ascend device have an environment and a pytest process of their own. So do tests beside vllm-ascend,
# which run on that device: scripts/test.sh --ascend [arguments of pytest], or a path below tests/ascend. --ascend is beside vLLM
# 0.23; --ascend=0.30 is beside vLLM 0.30. --emulator=2.10 runs tests of the emulated device on torch 2.10 and its torch_npu;
# --emulator=2.10-cuda does so with PyPI's torch 2.10. --ascend=0.30 --emulator=2.10 runs the tests beside vllm-ascend on that pair.
# scripts/test.sh --nightly runs the tests marked nightly, in both environments. Every other run leaves them out.
# Every run of pytest gives the seconds of each folder.
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"

run_pytest() { # setup's options, in one argument, then pytest's arguments
  local PY options
  read -r -a options <<<"$1"
  PY=$(scripts/setup.sh ${options[@]+"${options[@]}"} | tail -n1) || return
  shift
  "$PY" -m pytest "$@"
}

# Runs all tests with these arguments of pytest. Tests of the emulated device and those of ranks mostly wait, so they run side by
# side; tests of vLLM's engines fill the cores, so they follow alone.
run_all() {
  local emulated=0 ranks=0 others=0 side_by_side
  emulated_output=$(mktemp)
  set -m # a process group of their own, so that they end with this script, also after Ctrl-C
  run_pytest --emulator tests/emulated "$@" >"$emulated_output" 2>&1 </dev/null &
  set +m
  emulated_tests=$!
  trap 'kill -TERM -- -$emulated_tests 2>/dev/null; rm -f "$emulated_output"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  run_pytest "" tests/pure tests/ranks "$@" || ranks=$?
  wait $emulated_tests || emulated=$?
  trap - EXIT
  cat "$emulated_output"
  rm "$emulated_output"
  side_by_side=$SECONDS
  run_pytest "" tests/vllm tests/cuda tests/npu "$@" || others=$?
  echo "test.sh: $side_by_side s for tests/emulated beside tests/pure and tests/ranks, $((SECONDS - side_by_side)) s for the others"
  [ $# -eq 0 ] || { emulated=${emulated/#5/0} ranks=${ranks/#5/0} others=${others/#5/0}; } # 5: no test there is in this lane
  [ $emulated -eq 0 ] || echo "test.sh: tests/emulated did not pass; the summary is further up" >&2
  [ $ranks -eq 0 ] || echo "test.sh: tests/pure or tests/ranks did not pass; the summary is further up" >&2
  [ $others -eq 0 ] || exit $others
  [ $ranks -eq 0 ] || exit $ranks
  exit $emulated
}

case " $* " in
  "  ") run_all ;;
  " --nightly ") run_all -m nightly ;;
  " --ascend"* | " --emulator"*)
    environment="" folder=tests/emulated
    while true; do
      case ${1:-} in
        --ascend*) folder=tests/ascend ;;
        --emulator*) ;;
        *) break ;;
      esac
      environment+=" $1"
      shift
    done
    case " $* " in *" tests/"*) ;; *) set -- "$folder" "$@" ;; esac
    run_pytest "$environment" "$@"
    ;;
  *" tests/ascend"*) run_pytest --ascend "$@" ;;
  *" tests/emulated"*) run_pytest --emulator "$@" ;;
  *) run_pytest "" "$@" ;;
esac
