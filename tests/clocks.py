"""Processes whose clock is wrong: a library that is loaded before the C library shifts what they read."""

import ctypes
import subprocess
from pathlib import Path

# The shift comes from the file $FCMAE_TEST_CLOCK.N for the N-th start of a Slurm job, or from `set_clock`.
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
long clock_shift = 0;
__attribute__((constructor)) static void read_shift(void) {
  char path[4096];
  const char *name = getenv("FCMAE_TEST_CLOCK"), *start = getenv("SLURM_RESTART_COUNT");
  if (!name) return;
  snprintf(path, sizeof path, "%s.%s", name, start ? start : "0");
  FILE *file = fopen(path, "r");
  if (file) { if (fscanf(file, "%ld", &clock_shift) != 1) clock_shift = 0; fclose(file); }
}
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, t);
  if (id == CLOCK_REALTIME) t->tv_sec += clock_shift;
  return code;
}
"""


def clock_library(folder: Path) -> Path:
    """The library, for LD_PRELOAD."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def set_clock(seconds: int) -> None:
    """Shift the clock of this process, which the library is loaded in."""
    ctypes.c_long.in_dll(ctypes.CDLL(None), "clock_shift").value = seconds
