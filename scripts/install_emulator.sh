#!/usr/bin/env bash
# Installs the emulated Ascend device into an environment, makes a tensor on it, and prints the seconds of each step:
#
#   scripts/install_emulator.sh              from this checkout: builds the libraries, which needs a C++ compiler
#   scripts/install_emulator.sh FILE.whl     from a wheel with libraries (setup.py says how it is made): builds nothing
#
# PYTHON is the environment's python (default: python3). TORCH is the version of torch (default: 2.13.0); torch_npu goes with it.
# PIP_EXTRA_INDEX_URL names PyTorch's index of CPU wheels. Without it, pip may take the build for CUDA, which has gigabytes.
set -u -e -o pipefail

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-2.13.0}
source=${1:-$root}

fail() {
  printf 'install_emulator: %s\n' "$*" >&2
  exit 1
}
step() { # runs a command, and prints its time below the name $1
  local started=$SECONDS
  "${@:2}" >&2 || fail "$1 failed; its message is above"
  printf 'install_emulator: %s: %d s\n' "$1" $((SECONDS - started))
}
install() { "$PYTHON" -m pip install -q --disable-pip-version-check "$@"; }
hook_into_environment() {
  local packages
  packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$PYTHON" -m vllm_npu.emulator hook >"$packages/zz_vllm_npu_emulator.pth"
}
build_libraries() {
  "$PYTHON" -m vllm_npu.emulator build
  "$PYTHON" -m vllm_npu.transport.hccl_direct.build
}

[ $# -le 1 ] || fail "takes at most one wheel; got: $*"
[ -e "$source" ] || fail "there is no $source"
case $source in
  "$root" | *-linux_"$(uname -m)".whl) ;;
  *) fail "$source is no wheel with libraries for this machine; make one with VLLM_NPU_WHEEL_WITH_LIBRARIES=1 (setup.py), or name none" ;;
esac
step "torch $TORCH" install "torch==$TORCH"
step "torch_npu and vllm_npu" install "$source[emulator]" "torch==$TORCH"
if [ "$source" = "$root" ]; then
  step "hook" hook_into_environment
  step "libraries" build_libraries
fi
# From another folder, so that the installed package is imported, and not the checkout.
cd /
VLLM_NPU_EMULATOR=1 TORCH_DEVICE_BACKEND_AUTOLOAD=1 \
  step "first tensor" "$PYTHON" -c 'import torch; print(torch.ones(1, device="npu"), torch.npu.get_device_name())'
