#!/usr/bin/env bash
# Install CUDA torch, FFCV, DeepSpeed and the CUDA build of spconv; both container definitions run this as root on Debian 12.
set -euo pipefail
cd "$(dirname "$0")/../.."
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
apt-get update -q
apt-get install -y -q --no-install-recommends ca-certificates python3 python3-venv
# Layers of an image keep whole seconds, and compiled code is known by the dates of its sources.
find pipeline -name '*.py' -exec touch -d @"$(date +%s)" {} +
FCMAE_EXTRA=deepspeed,s3,parquet tools/setup/setup.sh   # compiles the image decoder, too
# spconv brings its own CUDA 12.6 runtime, so its CUDA version need not be torch's.
.venv/bin/pip install spconv-cu126==2.3.8
rm -rf /var/lib/apt/lists/*
