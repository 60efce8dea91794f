#!/usr/bin/env bash
# On a machine with a package registry: wheels that a GPU machine with torch and NumPy alone lacks, for gpu_in_one_go.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
python_version=${1:-3.12}
mkdir -p .gpu-wheels
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" \
  --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform any --dest .gpu-wheels \
  annotated-types click crc32c donfig google-crc32c markdown-it-py mdurl numcodecs packaging psutil pydantic \
  pydantic-core==$(python3 -c "import pydantic_core; print(pydantic_core.__version__)") \
  pygments python-json-logger pyyaml rich tenacity threadpoolctl typing-extensions typing-inspection zarr
du -sh .gpu-wheels
