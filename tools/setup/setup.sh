#!/usr/bin/env bash
# Prepare .venv for `fcmae`: Debian packages, pinned Python packages, FFCV, this checkout.
# Safe to run again: parts that are installed are skipped.
#
#   PYTHON       the interpreter to build .venv from      (python3)
#   FCMAE_EXTRA  the extra of pyproject.toml to install   (test)
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
EXTRA=${FCMAE_EXTRA:-test}
FFCV=1.0.2
LOG=.venv/setup.log

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
undo=()   # the command that must also run after an interruption
trap '"${undo[@]}"; printf "setup: interrupted; the same command goes on\n" >&2; exit 130' INT TERM HUP
quietly() { "$@" >>"$LOG" 2>&1 || { tail -n 20 "$LOG" >&2; die "'$*' failed; the whole log is in $LOG"; }; }

apt_get() { "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "$@" >>"$LOG" 2>&1; }   # with `sudo` of its caller

debian_packages() {   # debian_packages NAME...: installs the missing ones
  local missing=() name sudo=()
  for name in "$@"; do
    dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q 'install ok installed' || missing+=("$name")
  done
  [ ${#missing[@]} = 0 ] && return 0
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || die "Debian packages are missing and you have neither root nor sudo; ask an administrator for: sudo apt-get install -y --no-install-recommends ${missing[*]}"
    sudo=(sudo)
  fi
  say "Debian packages: ${missing[*]}"
  # If /usr/sbin/policy-rc.d exits with 101, packages such as slurmd and munge start no system-wide services.
  local guard=/usr/sbin/policy-rc.d code=0
  if [ ! -e "$guard" ]; then undo=("${sudo[@]}" rm -f "$guard"); "${sudo[@]}" sh -c "printf '#!/bin/sh\nexit 101\n' >$guard && chmod 755 $guard"; fi
  local install=(install -y -q --no-install-recommends "${missing[@]}")
  apt_get "${install[@]}" || { apt_get update -q && apt_get "${install[@]}"; } || code=$?
  "${undo[@]}"; undo=()
  [ $code = 0 ] || { tail -n 20 "$LOG" >&2; die "apt-get failed for: ${missing[*]}; the whole log is in $LOG"; }
}

install_ffcv() {
  .venv/bin/python -c 'import importlib.metadata as m, sys; import ffcv.libffcv; sys.exit(m.version("ffcv") != sys.argv[1])' "$FFCV" 2>/dev/null && return 0
  say "FFCV $FFCV"
  # FFCV uses only cv::resize of OpenCV: a shim header and a pkg-config file replace the 689 MB of libopencv-dev.
  local shim; shim=$(mktemp -d)
  mkdir -p "$shim/include/opencv2"
  printf '#pragma once\n#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/include/opencv2/opencv.hpp"
  printf 'Name: opencv4\nDescription: the parts that FFCV uses\nVersion: 4.6.0\nLibs: -lopencv_imgproc -lopencv_core\nCflags: -I%s/include -I/usr/include/opencv4\n' "$shim" >"$shim/opencv4.pc"
  PKG_CONFIG_PATH=$shim quietly .venv/bin/pip install --no-deps --no-cache-dir "ffcv==$FFCV"
  rm -rf "$shim"
}

command -v "$PYTHON" >/dev/null || die "no '$PYTHON'; install Python 3.11 or newer, or name one with PYTHON=..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$("$PYTHON" --version) is too old; Python 3.11 or newer is needed (PYTHON=... names another)"
if [ ! -x .venv/bin/pip ]; then
  say "a new .venv from $("$PYTHON" --version)"
  rm -rf .venv; "$PYTHON" -m venv .venv || die "venv failed; on Debian: sudo apt-get install -y python3-venv"
fi
mkdir -p .venv; : >>"$LOG"

if command -v apt-get >/dev/null; then
  debian_packages g++ make pkg-config python3-dev libturbojpeg0-dev libopencv-imgproc-dev
  case ",$EXTRA," in *,test,*) debian_packages slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge ;; esac
else
  say "no apt-get: install g++, pkg-config, libturbojpeg and OpenCV's imgproc headers yourself (see docs/install.md)"
fi

# The stamp is a hash of all pins: a second run costs nothing, a changed pin installs again.
stamp="$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16) $EXTRA $PWD"
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
  say "Python packages (minutes the first time)"
  # A CUDA build of torch brings its own triton; our pin is for tests beside a build for CPUs.
  pins=.venv/constraints.txt
  grep -v '^triton==' constraints.txt >$pins
  quietly .venv/bin/pip install --disable-pip-version-check -c $pins torch
  .venv/bin/python -c 'import importlib.metadata as m; m.version("triton")' 2>/dev/null || pins=constraints.txt
  quietly .venv/bin/pip install --disable-pip-version-check -c $pins -e ".[$EXTRA]"
  install_ffcv
  .venv/bin/fcmae --help >/dev/null || die "the fcmae command does not start; see $LOG"
  printf '%s' "$stamp" >.venv/stamp
fi
install_ffcv
.venv/bin/fcmae doctor --warm || die "the image decoder does not compile; see 'fcmae doctor'"
