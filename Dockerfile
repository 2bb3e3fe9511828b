# The command of `make demo` in a container. Overrides go behind the image's name; the volume keeps data and run folders,
# so that the same command resumes an unfinished run and prints a finished one.
#
#   docker build -t mtl_jax .
#   docker run --rm -v mtl_jax:/home/researcher mtl_jax
#   docker run --rm -v mtl_jax:/home/researcher mtl_jax experiment=quick_look
#
# On NVIDIA GPUs (the CUDA libraries come with JAX's wheels; the host needs the driver and the NVIDIA Container Toolkit):
#
#   docker build --build-arg ACCELERATOR=cuda13 -t mtl_jax:cuda13 .
#   docker run --rm --gpus all -v mtl_jax:/home/researcher mtl_jax:cuda13
FROM python:3.12-slim

# An extra of pyproject.toml: cuda12 or cuda13; empty for the CPU.
ARG ACCELERATOR=""

WORKDIR /opt/mtl_jax
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY experiments experiments
COPY mtl_jax mtl_jax
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ".${ACCELERATOR:+[${ACCELERATOR}]}" \
    && useradd --create-home --uid 1000 researcher

USER 1000
WORKDIR /home/researcher
# As process 1, Python itself receives the SIGTERM of `docker stop`, writes a checkpoint and ends.
ENTRYPOINT ["python", "-m", "experiments.train"]
