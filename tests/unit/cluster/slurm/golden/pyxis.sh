#!/bin/bash

# Parameters
#SBATCH --chdir='/runs/my huge/a-b'
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:7
#SBATCH --exclusive
#SBATCH --gpus-per-node=a100_1g.10gb+me:8
#SBATCH --job-name=fcmae-a-b-3a4c8cdb
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=512M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='/runs/my huge/a-b/slurm/%j_0_log.out'
#SBATCH --requeue
#SBATCH --reservation=spring
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
export FCMAE_JOB_STARTED=$(date +%s.%3N)
trap : TERM INT USR1 USR2
module load gcc/13
module load 'it'"'"'s'
source /etc/site.sh
export OMP_NUM_THREADS=1
export NAME='$(touch /tmp/x)'
export PYTHONPATH='/runs/my huge/code/0123'${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
export FCMAE_CODE='/runs/my huge/code/0123'
start=THE_TEXT_OF_VERIFIED_START code_hash=HASH-OF-THE-CODE
/opt/fcmae/bin/python -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/a-b' || [ $? != 78 ] || exit 1
export FCMAE_TIME_LEFT="$(hostname) $(cut -d. -f1 /proc/uptime) $(squeue -h -j "$SLURM_JOB_ID" -o %L)"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/my huge/a-b/slurm/%j_%t_log.out' --kill-on-bad-exit=1 --export=ALL --cpus-per-task=1 '--container-image=registry#fcmae:1' '--container-mounts=/runs/my huge:/runs/my huge,/data:/data:ro' python3 -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/a-b' -u -m submitit.core._submit '/runs/my huge/a-b/slurm'


# teardown
code=$?
/opt/fcmae/bin/python -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/a-b' -P -m cluster.slurm.supervisor '/runs/my huge/a-b' "$code" 3