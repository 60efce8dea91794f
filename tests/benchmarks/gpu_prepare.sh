#!/usr/bin/env bash
# On a machine with a package registry: wheels that a GPU machine with torch and NumPy alone lacks, for gpu_in_one_go.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
python_version=${1:-3.12}
mkdir -p .gpu-wheels
fetch() { # into a folder, packages
  local folder=$1
  shift
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" \
    --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform any --dest "$folder" "$@"
}

fetch .gpu-wheels annotated-types click crc32c donfig google-crc32c markdown-it-py mdurl numcodecs packaging psutil \
  pydantic \
  pydantic-core==$(python3 -c "import pydantic_core; print(pydantic_core.__version__)") \
  pygments python-json-logger pyyaml rich tenacity threadpoolctl typing-extensions typing-inspection zarr
# For pytest, and for Ray, of which half is left out.
fetch .gpu-wheels execnet hypothesis pytest-xdist sortedcontainers
fetch .gpu-wheels attrs certifi charset-normalizer filelock idna jsonschema jsonschema-specifications msgpack protobuf \
  referencing requests rpds-py urllib3
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fetch "$scratch" ray=="$(python3 -c "import ray; print(ray.__version__)")"
python3 tests/benchmarks/slim_wheel.py "$scratch"/ray-*.whl ".gpu-wheels/$(basename "$scratch"/ray-*.whl)"
du -sh .gpu-wheels
