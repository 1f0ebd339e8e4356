#!/usr/bin/env bash
# Sets the environments up where needed and runs the tests: scripts/test.sh [arguments of pytest]
# Paths are relative to the checkout: scripts/test.sh tests/pure -k routing
# Tests of the emulated Ascend device have an environment, and a pytest process, of their own. So do tests beside vllm-ascend,
# which run on it: scripts/test.sh --ascend [arguments of pytest], or a path below tests/ascend.
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"

run_pytest() { # setup's option, then pytest's arguments
  local PY
  PY=$(scripts/setup.sh ${1:+"$1"} | tail -n1) || return
  shift
  "$PY" -m pytest "$@"
}

case " $* " in
  "  ")
    status=0
    run_pytest --emulator tests/emulated || status=$?
    run_pytest "" || exit
    [ $status -eq 0 ] || echo "test.sh: tests of the emulated device did not pass; their summary is further up" >&2
    exit $status
    ;;
  " --ascend"*)
    shift
    case " $* " in *" tests/"*) ;; *) set -- tests/ascend "$@" ;; esac
    run_pytest --ascend "$@"
    ;;
  *" tests/ascend"*) run_pytest --ascend "$@" ;;
  *" tests/emulated"*) run_pytest --emulator "$@" ;;
  *) run_pytest "" "$@" ;;
esac
