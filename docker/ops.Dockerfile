# SPDX-License-Identifier: Apache-2.0
# The operator's tools: small, without torch and without an engine.
#   docker build -f docker/ops.Dockerfile -t eyrie/ops .

ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE}
# Debian keeps one version of a package; a pinned one would be gone in a month.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

RUN --mount=type=bind,source=docker/install.py,target=/build/install.py \
    --mount=type=bind,source=docker/requirements/ops.txt,target=/build/ops.txt \
    --mount=type=bind,source=requirements.lock,target=/build/requirements.lock \
    --mount=type=cache,target=/root/.cache/pip \
    python3 /build/install.py stage /build/ops.txt \
    # A fresh named volume takes over the owner of the folder that it covers.
    && install -d -m 2775 -o 2000 -g 0 /models /workspace

WORKDIR /app
COPY shared/ shared/
COPY stages/__init__.py stages/
COPY stages/ops/ stages/ops/

ARG REVISION=unknown
ARG IMAGE=eyrie/ops
# The user may have no entry in /etc/passwd, and the root is read-only: caches go to /tmp.
ENV EYRIE_IMAGE=${IMAGE} EYRIE_REVISION=${REVISION} EYRIE_WORKSPACE=/workspace \
    HF_HOME=/models HOME=/tmp USER=eyrie PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="eyrie ops" \
      org.opencontainers.image.description="Operator's tools of the pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.ref.name="${IMAGE}"

USER 2000:0
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-m", "stages.ops"]
