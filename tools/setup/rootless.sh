#!/usr/bin/env bash
# Like tools/setup/setup.sh, but without root on Debian and Ubuntu: unpacks the missing libraries of FFCV into .venv/debian
# and builds FFCV with their path. Needs a C++ compiler, pip and Python's headers.
#
#   PYTHON       the interpreter to build .venv from      (python3)
#   FCMAE_EXTRA  the extra of pyproject.toml to install   (deepspeed,s3,parquet)
set -euo pipefail
cd "$(dirname "$0")/../.."
FFCV=1.0.2
root=$PWD/.venv/debian shim=$PWD/.venv/shim

die() { printf 'rootless: %s\n' "$*" >&2; exit 1; }
for command in g++ apt-get dpkg; do command -v $command >/dev/null || die "$command is missing; see docs/install.md"; done
libraries=$root/usr/lib/$(gcc -print-multiarch)

[ -x .venv/bin/pip ] || { rm -rf .venv; "${PYTHON:-python3}" -m venv .venv; }
grep -v '^triton==' constraints.txt >.venv/constraints.txt   # a CUDA build of torch brings its own triton
.venv/bin/pip install -q -c .venv/constraints.txt torch
.venv/bin/pip install -q -c .venv/constraints.txt -e ".[${FCMAE_EXTRA:-deepspeed,s3,parquet}]"

mkdir -p "$root/archives" "$shim/include/opencv2"
missing=$(apt-get -s -o Debug::NoLocking=1 --no-install-recommends install libturbojpeg0-dev libopencv-imgproc-dev pkg-config |
  awk '/^Inst /{print $2}') || die "apt-get cannot list the missing packages; see docs/install.md"
# shellcheck disable=SC2086
[ -z "$missing" ] || (cd "$root/archives" && apt-get download -q $missing)
for archive in "$root"/archives/*.deb; do [ ! -e "$archive" ] || dpkg -x "$archive" "$root"; done

# FFCV uses only cv::resize of OpenCV.
printf '#pragma once\n#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/include/opencv2/opencv.hpp"
printf 'Name: opencv4\nDescription: the parts that FFCV uses\nVersion: 4.6.0\nLibs: -L%s -lopencv_imgproc -lopencv_core\nCflags: -I%s/include -I%s/usr/include/opencv4 -I/usr/include/opencv4\n' \
  "$libraries" "$shim" "$root" >"$shim/opencv4.pc"
printf 'Name: libturbojpeg\nDescription: of Debian\nVersion: 2\nLibs: -L%s -lturbojpeg\nCflags: -I%s/usr/include\n' \
  "$libraries" "$root" >"$shim/libturbojpeg.pc"
# RPATH instead of RUNPATH, because it also applies to the libraries' own libraries.
PKG_CONFIG_PATH=$shim PATH=$PATH:$root/usr/bin LD_LIBRARY_PATH=$libraries \
  LDFLAGS="-Wl,--disable-new-dtags,-rpath,$libraries:$libraries/lapack:$libraries/blas" LIBRARY_PATH=$libraries \
  .venv/bin/pip install -q --no-deps --no-cache-dir --force-reinstall "ffcv==$FFCV"
.venv/bin/python -c 'import ffcv.libffcv' || die "FFCV does not load; ldd .venv/lib/python*/site-packages/_libffcv*.so"
.venv/bin/fcmae doctor --warm
