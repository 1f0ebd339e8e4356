#!/usr/bin/env bash
# Sets the environments up where needed and runs the tests: scripts/test.sh [arguments of pytest]
# Paths are relative to the checkout: scripts/test.sh tests/pure -k routing
# Tests of the emulated Ascend device have an environment and a pytest process of their own. So do tests beside vllm-ascend,
# which run on that device: scripts/test.sh --ascend [arguments of pytest], or a path below tests/ascend.
# scripts/test.sh --nightly runs the tests marked nightly, in both environments. Every other run leaves them out.
# Every run of pytest gives the seconds of each folder. A plain run, and --nightly, end with those of the two environments.
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"

run_pytest() { # setup's option, then pytest's arguments
  local PY
  PY=$(scripts/setup.sh ${1:+"$1"} | tail -n1) || return
  shift
  "$PY" -m pytest "$@"
}

run_all() { # pytest's arguments, for tests in both environments
  local emulated=0 others=0 seconds
  run_pytest --emulator tests/emulated "$@" || emulated=$?
  seconds=$SECONDS
  run_pytest "" "$@" || others=$?
  echo "test.sh: $seconds s for tests/emulated, $((SECONDS - seconds)) s for the others"
  [ $# -eq 0 ] || { emulated=${emulated/#5/0} others=${others/#5/0}; } # 5: no test there is in this lane
  [ $emulated -eq 0 ] || echo "test.sh: tests of the emulated device did not pass; their summary is further up" >&2
  [ $others -eq 0 ] || exit $others
  exit $emulated
}

case " $* " in
  "  ") run_all ;;
  " --nightly ") run_all -m nightly ;;
  " --ascend"*)
    shift
    case " $* " in *" tests/"*) ;; *) set -- tests/ascend "$@" ;; esac
    run_pytest --ascend "$@"
    ;;
  *" tests/ascend"*) run_pytest --ascend "$@" ;;
  *" tests/emulated"*) run_pytest --emulator "$@" ;;
  *) run_pytest "" "$@" ;;
esac
