"""Prefect's flows over the stages of ``dopsd/stages.py``."""

from dopsd.process import prepare_process

prepare_process()  # before Prefect, MLflow and Ray are asked anything, by whichever door a flow is run
