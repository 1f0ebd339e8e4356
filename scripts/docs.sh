#!/usr/bin/env bash
# Builds the documents and the API reference into build/site. A warning is an error. Arguments are passed to `mkdocs build`.
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
PY=$("$root/scripts/setup.sh" --docs | tail -n1)
exec "$PY" -m mkdocs build --strict -f "$root/mkdocs.yml" -d "$root/build/site" "$@"
