#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --chdir='/runs/my huge/finetune'
#SBATCH --cpus-per-task=12
#SBATCH --dependency=afterok:41
#SBATCH --gpus-per-node=8
#SBATCH --job-name=fcmae-finetune-3a4c8cdb
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=921600M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output='/runs/my huge/finetune/slurm/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
export FCMAE_JOB_STARTED=$(date +%s.%3N)
trap : TERM INT USR1 USR2
module load cuda
export OMP_NUM_THREADS=12
export NCCL_DEBUG=WARN
export FCMAE_SCRATCH='/scratch/$USER'
export PYTHONPATH='/runs/my huge/code/0123'${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
export FCMAE_CODE='/runs/my huge/code/0123'
start=THE_TEXT_OF_VERIFIED_START code_hash=HASH-OF-THE-CODE
/opt/fcmae/bin/python -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/finetune' || [ $? != 78 ] || exit 1
export FCMAE_TIME_LEFT="$(hostname) $(cut -d. -f1 /proc/uptime) $(squeue -h -j "$SLURM_JOB_ID" -o %L)"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/my huge/finetune/slurm/%j_%t_log.out' --kill-on-bad-exit=1 --export=ALL --cpus-per-task=12 /opt/fcmae/bin/python -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/finetune' -u -m submitit.core._submit '/runs/my huge/finetune/slurm'


# teardown
code=$?
/opt/fcmae/bin/python -IS -c "$start" '/runs/my huge/code/0123' "$code_hash" '/runs/my huge/finetune' -P -m cluster.slurm.supervisor '/runs/my huge/finetune' "$code" 3