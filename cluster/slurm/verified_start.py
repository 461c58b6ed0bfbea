"""Run a program from the code snapshot of a job, or nothing if the snapshot is gone or was changed.

    python -IS -c THIS_TEXT CODE SHA256 STAGE [ARGUMENT...]

The job script holds this text and the snapshot's hash, so nothing of the snapshot runs before it was compared. Without
arguments the program only compares. It needs nothing but Python's library.

Exit codes: 78 if the snapshot is gone or changed, which no other node would mend; 70 if this node cannot read it.
"""

import hashlib
import json
import os
import signal
import sys
import time

CHANGED, UNREADABLE = 78, 70  # of cluster.slurm.supervisor: fail the stage, retry it
TRIES = 6
RECORD = "snapshot.sha256"  # the hash of a snapshot, in its folder


def hash_folder(folder: str) -> str:
    """Hash the names and contents of all files below a folder, compiled code included, but not its `RECORD`."""
    total = hashlib.sha256()

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for path in (os.path.join(place, name) for name in sorted(files + links)):
            name = os.path.relpath(path, folder)
            if name != RECORD:
                with open(os.devnull if os.path.isdir(path) else path, "rb") as file:
                    content = hashlib.sha256(file.read()).digest()
                total.update(os.fsencode(name) + b"\0" + content)
    return total.hexdigest()


def main(code: str, expected: str, stage: str, *arguments: str) -> None:
    """Compare the snapshot, then become `python ARGUMENT...`, with stop signals blocked (see `RunStage`)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
    for tries_left in range(TRIES - 1, -1, -1):
        try:
            trouble = "" if hash_folder(code) == expected else "was changed after the job was submitted"
            status = CHANGED
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            trouble = "is gone, or a part of it" if gone else f"cannot be read ({error.strerror})"
            status = CHANGED if gone and os.path.isdir(stage) else UNREADABLE
        if status == CHANGED or not tries_left:
            break
        time.sleep(5)  # a file server that is away for a moment costs no job
    if not trouble and not arguments:
        return
    if not trouble:
        os.execv(sys.executable, [sys.executable, *arguments])
    sentence = f"the copy of the code in {code} {trouble}, so nothing is run; `fcmae resume` makes a new copy"
    print(sentence, flush=True)
    if status == CHANGED and "submitit.core._submit" not in arguments:  # once, not by each rank
        event = {"event": "stopped", "time": round(time.time(), 3), "job": os.environ.get("SLURM_JOB_ID")}
        with open(os.path.join(stage, "slurm", "jobs.jsonl"), "a") as history:
            history.write(json.dumps({**event, "reason": sentence}) + "\n")
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
