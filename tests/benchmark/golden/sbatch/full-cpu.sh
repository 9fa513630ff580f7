#!/bin/bash

# Parameters
#SBATCH --account='brain lab'
#SBATCH --array=0-2%2
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=2
#SBATCH --dependency=afterok:41
#SBATCH --error=/scratch/runs/store/.jobs/clusters-20261123-191500/%A_%a_0_log.err
#SBATCH --exclude='n[03-04]'
#SBATCH --exclusive
#SBATCH --job-name=clusters.clusters
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL
#SBATCH --mem=8192M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/scratch/runs/store/.jobs/clusters-20261123-191500/%A_%a_0_log.out
#SBATCH --partition=cpu
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --reservation=course
#SBATCH --signal=USR2@300
#SBATCH --time=60

# setup
module purge
module load cuda/12.4
export PYTHONPATH=/home/ada/brain-it-bench${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=2 MKL_NUM_THREADS=2
export BRAIN_IT_WEIGHTS=/data/weights
export HF_HUB_OFFLINE=1
export NOTE='it'"'"'s here'

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /scratch/runs/store/.jobs/clusters-20261123-191500/%A_%a_%t_log.out --error /scratch/runs/store/.jobs/clusters-20261123-191500/%A_%a_%t_log.err --export=ALL --cpus-per-task=2 --kill-on-bad-exit=1 apptainer exec --nv image.sif python -u -m submitit.core._submit /scratch/runs/store/.jobs/clusters-20261123-191500
