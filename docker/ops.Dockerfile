# SPDX-License-Identifier: Apache-2.0
# The operator's tools: small, without torch and without an engine.
#   docker build -f docker/ops.Dockerfile -t eyrie.invalid/ops .

ARG CPU_BASE_IMAGE=debian:bookworm-slim

FROM ${CPU_BASE_IMAGE}
ARG CPU_BASE_IMAGE
# Debian keeps one version of a package, so a pinned version would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/eyrie
ENV PATH=/opt/eyrie/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONPYCACHEPREFIX=/caches/python

RUN --mount=type=tmpfs,target=/mnt \
    --mount=type=bind,source=docker/install.py,target=/mnt/build/install.py \
    --mount=type=bind,source=docker/requirements/ops.txt,target=/mnt/build/ops.txt \
    --mount=type=bind,source=requirements.lock,target=/mnt/build/requirements.lock \
    --mount=type=cache,target=/mnt/pip \
    python3 /mnt/build/install.py stage /mnt/build/ops.txt \
    # A new named volume takes over the owner of the folder that it covers.
    && install -d -m 2775 -o 2000 -g 0 /caches /models /workspace

WORKDIR /app
COPY shared/ shared/
COPY stages/__init__.py stages/
COPY stages/ops/ stages/ops/

ARG EYRIE_VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
ARG IMAGE=eyrie.invalid/ops
# The root is read-only and the user may have no entry in /etc/passwd: what is compiled or cached
# while the stage runs goes to /caches.
ENV EYRIE_IMAGE=${IMAGE} EYRIE_REVISION=${REVISION} EYRIE_WORKSPACE=/workspace \
    HF_HOME=/models HOME=/tmp USER=eyrie PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE= PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/caches
LABEL org.opencontainers.image.title="eyrie ops" \
      org.opencontainers.image.description="Operator's tools of the pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.ref.name="${IMAGE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${EYRIE_VERSION}" \
      org.opencontainers.image.base.name="${CPU_BASE_IMAGE}"

USER 2000:0
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-m", "stages.ops"]
