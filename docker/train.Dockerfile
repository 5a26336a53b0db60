# SPDX-License-Identifier: Apache-2.0
# Stage 3 of 4: the draft head. PyTorch without vLLM.
#   docker build -f docker/train.Dockerfile --build-arg FLAVOUR=cpu -t eyrie.invalid/train .

ARG FLAVOUR=gpu
ARG TORCH_VERSION=2.13.0
# A release names a digest here. The base must have a C compiler: Triton compiles kernels with it.
ARG BASE_IMAGE=pytorch/pytorch:${TORCH_VERSION}-cuda13.0-cudnn9-runtime
ARG CPU_BASE_IMAGE=debian:bookworm-slim

# From here to torch-cpu the text is that of the engine images, which share these layers.
FROM ${CPU_BASE_IMAGE} AS python
ARG CPU_BASE_IMAGE
LABEL org.opencontainers.image.base.name="${CPU_BASE_IMAGE}"
# vLLM and torch compile kernels while they run, hence the compiler. Debian keeps one version of a
# package, so a pinned version would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ libnuma1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/eyrie
# Packages are installed without bytecode, 425 MB less; Python compiles into /caches as it runs.
ENV PATH=/opt/eyrie/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONPYCACHEPREFIX=/caches/python

# One part of the lock per large layer: a change elsewhere in the lock does not rebuild the layer.
FROM python AS torch-lock
WORKDIR /locks
COPY docker/install.py requirements.lock ./
RUN python3 install.py closure torch > torch.lock && rm requirements.lock

# Build files are mounted below /mnt, so that no layer keeps an empty folder for them.
FROM python AS torch-cpu
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=tmpfs,target=/mnt \
    --mount=type=bind,from=torch-lock,source=/locks,target=/mnt/build \
    --mount=type=cache,target=/mnt/pip \
    python3 /mnt/build/install.py torch "${TORCH}" "${TORCH_INDEX}"

FROM ${BASE_IMAGE} AS torch-gpu
ARG BASE_IMAGE
LABEL org.opencontainers.image.base.name="${BASE_IMAGE}"
RUN --mount=type=tmpfs,target=/mnt \
    --mount=type=bind,source=docker/install.py,target=/mnt/build/install.py \
    python3 /mnt/build/install.py environment /opt/eyrie
# Where the base's own Python takes packages, no such folder was made and PATH finds the base's.
ENV PATH=/opt/eyrie/bin:$PATH

# hadolint ignore=DL3006
FROM torch-${FLAVOUR}
ARG TORCH_VERSION
RUN --mount=type=tmpfs,target=/mnt \
    --mount=type=bind,source=docker/install.py,target=/mnt/build/install.py \
    --mount=type=bind,source=docker/requirements/train.txt,target=/mnt/build/train.txt \
    --mount=type=bind,source=requirements.lock,target=/mnt/build/requirements.lock \
    --mount=type=cache,target=/mnt/pip \
    python3 /mnt/build/install.py stage /mnt/build/train.txt torch "${TORCH_VERSION}" \
    # A new named volume takes over the owner of the folder that it covers.
    && install -d -m 2775 -o 2000 -g 0 /caches /models /workspace

WORKDIR /app
COPY shared/ shared/
COPY stages/__init__.py stages/
COPY stages/train/ stages/train/

ARG FLAVOUR
ARG EYRIE_VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
ARG IMAGE=eyrie.invalid/train
# The root is read-only and the user may have no entry in /etc/passwd: what is compiled or cached
# while the stage runs goes to /caches.
ENV EYRIE_IMAGE=${IMAGE} EYRIE_REVISION=${REVISION} EYRIE_WORKSPACE=/workspace \
    HF_HOME=/models HOME=/tmp USER=eyrie PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE= PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/caches \
    FLASHINFER_WORKSPACE_BASE=/caches MPLCONFIGDIR=/caches/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/caches/inductor TRITON_CACHE_DIR=/caches/triton \
    VLLM_CACHE_ROOT=/caches/vllm
# No secret: hadolint takes TOKEN in the name for one.
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false
LABEL org.opencontainers.image.title="eyrie train" \
      org.opencontainers.image.description="The draft head, trained on the target's states" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.ref.name="${IMAGE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${EYRIE_VERSION}" \
      eyrie.flavour="${FLAVOUR}" \
      eyrie.torch.version="${TORCH_VERSION}"

USER 2000:0
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-m", "stages.train"]
