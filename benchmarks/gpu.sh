#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most 8 minutes: see benchmarks/gpu.py. Needs torch, transformers, peft and
# pytest at hand and no network: PYTHON=python3 bash benchmarks/gpu.sh [--out gpu.json]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
