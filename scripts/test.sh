#!/usr/bin/env bash
# Sets the environment up where needed and runs the tests: scripts/test.sh [arguments of pytest]
# Paths are relative to the checkout: scripts/test.sh tests/pure -k routing
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
PY=$("$root/scripts/setup.sh" | tail -n1)
cd "$root"
exec "$PY" -m pytest "$@"
