#!/bin/bash

# Parameters
#SBATCH --chdir='/runs/my huge/pretrain'
#SBATCH --comment='ConvNeXt V2'
#SBATCH --cpus-per-task=8
#SBATCH --exclude=node013,node042
#SBATCH --gpus-per-node=4
#SBATCH --job-name=fcmae-pretrain-3a4c8cdb
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='/runs/my huge/pretrain/slurm/%j_0_log.out'
#SBATCH --partition=preemptible
#SBATCH --qos=scavenger
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=2880

# setup
export FCMAE_JOB_STARTED=$(date +%s.%3N)
trap : TERM INT USR1 USR2
export OMP_NUM_THREADS=8
export PYTHONPATH='/runs/my huge/code/0123'${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
export FCMAE_CODE='/runs/my huge/code/0123'
start=THE_TEXT_OF_VERIFIED_START code_hash=HASH-OF-THE-CODE
/opt/fcmae/bin/python -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/pretrain' || [ $? != 78 ] || exit 1
export FCMAE_TIME_LEFT="$(hostname) $(cut -d. -f1 /proc/uptime) $(squeue -h -j "$SLURM_JOB_ID" -o %L)"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/my huge/pretrain/slurm/%j_%t_log.out' --kill-on-bad-exit=1 --export=ALL --cpus-per-task=8 apptainer exec --nv '--bind=/runs/my huge:/runs/my huge' --bind=/data:/data /shared/images/fcmae.sif python3 -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/pretrain' -u -m submitit.core._submit '/runs/my huge/pretrain/slurm'


# teardown
code=$?
/opt/fcmae/bin/python -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/pretrain' -P -m cluster.slurm.supervisor '/runs/my huge/pretrain' "$code" 10