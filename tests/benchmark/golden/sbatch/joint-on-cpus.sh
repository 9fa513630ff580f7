#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=16
#SBATCH --error=/scratch/runs/store/.jobs/clusters-20261123-191500/%j_0_log.err
#SBATCH --job-name=clusters.joint
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=131072M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/scratch/runs/store/.jobs/clusters-20261123-191500/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
export PYTHONPATH=/home/ada/brain-it-bench${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=16 MKL_NUM_THREADS=16
export BRAIN_IT_WEIGHTS=/data/weights

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /scratch/runs/store/.jobs/clusters-20261123-191500/%j_%t_log.out --error /scratch/runs/store/.jobs/clusters-20261123-191500/%j_%t_log.err --export=ALL --cpus-per-task=16 --kill-on-bad-exit=1 /home/ada/.venv/bin/python -u -m submitit.core._submit /scratch/runs/store/.jobs/clusters-20261123-191500
