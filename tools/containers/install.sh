#!/usr/bin/env bash
# What both container definitions run, as root on Debian 12: CUDA torch, FFCV, DeepSpeed, the CUDA build of spconv.
set -euo pipefail
cd "$(dirname "$0")/../.."
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
apt-get update -q
apt-get install -y -q --no-install-recommends ca-certificates python3 python3-venv
FCMAE_EXTRA=deepspeed,s3,parquet tools/setup/setup.sh
# It brings its own CUDA 12.6 runtime and links nothing of torch's: the driver is all that both must share.
.venv/bin/pip install spconv-cu126==2.3.8
rm -rf /var/lib/apt/lists/*
