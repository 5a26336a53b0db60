# SPDX-License-Identifier: Apache-2.0
# All images at once, named as compose.yaml names them:
#   docker buildx bake -f docker/docker-bake.hcl
#   FLAVOUR=cpu docker buildx bake -f docker/docker-bake.hcl
#
# Compose builds one image when a stage is swapped; this builds all five, for a release or for CI.

# This default cannot resolve: a release names its own registry.
variable "EYRIE_REGISTRY" { default = "eyrie.invalid" }
variable "EYRIE_REVISION" { default = "unknown" }
variable "EYRIE_SOURCE" { default = "unknown" }
variable "EYRIE_VERSION" { default = "0.1.0" }
variable "FLAVOUR" { default = "gpu" }
# "host" where package indexes can be reached from the host's own network alone.
variable "EYRIE_BUILD_NETWORK" { default = "default" }
# "linux/amd64,linux/arm64" for one image of both; the builder's own without.
variable "PLATFORMS" { default = "" }
variable "TORCH_VERSION" { default = "2.13.0" }

variable "VLLM_VERSION" { default = "0.32.0" }
variable "SYNTH_VLLM_VERSION" { default = VLLM_VERSION }
variable "DUMP_VLLM_VERSION" { default = VLLM_VERSION }
variable "BENCH_VLLM_VERSION" { default = VLLM_VERSION }

# A release gives these with their digests: vllm/vllm-openai:v0.32.0@sha256:...
variable "ENGINE_BASE_IMAGE" { default = "" }
variable "SYNTH_BASE_IMAGE" { default = ENGINE_BASE_IMAGE }
variable "DUMP_BASE_IMAGE" { default = ENGINE_BASE_IMAGE }
variable "BENCH_BASE_IMAGE" { default = ENGINE_BASE_IMAGE }
variable "TORCH_BASE_IMAGE" { default = "pytorch/pytorch:${TORCH_VERSION}-cuda13.0-cudnn9-runtime" }
variable "CPU_BASE_IMAGE" { default = "debian:bookworm-slim" }

function "image" {
  params = [stage, built_on]
  result = "${EYRIE_REGISTRY}/${stage}:${EYRIE_VERSION}-${built_on}${FLAVOUR == "cpu" ? "-cpu" : ""}"
}

function "engine_base" {
  params = [base, version]
  result = base != "" ? base : "vllm/vllm-openai:v${version}"
}

# A digest has a label of its own, where the base is named by one.
function "base_labels" {
  params = [base]
  result = {
    "org.opencontainers.image.base.digest" = length(split("@", base)) > 1 ? split("@", base)[1] : null
  }
}

group "default" {
  targets = ["synth", "dump", "train", "bench", "ops"]
}

target "_common" {
  context   = "."
  network   = EYRIE_BUILD_NETWORK
  platforms = PLATFORMS != "" ? split(",", PLATFORMS) : null
  args = {
    EYRIE_VERSION = EYRIE_VERSION
    REVISION      = EYRIE_REVISION
    SOURCE        = EYRIE_SOURCE
  }
}

target "_engine" {
  inherits = ["_common"]
  args = {
    FLAVOUR        = FLAVOUR
    CPU_BASE_IMAGE = CPU_BASE_IMAGE
  }
}

target "synth" {
  inherits   = ["_engine"]
  dockerfile = "docker/synth.Dockerfile"
  tags       = [image("synth", "vllm-${SYNTH_VLLM_VERSION}")]
  args = {
    BASE_IMAGE   = engine_base(SYNTH_BASE_IMAGE, SYNTH_VLLM_VERSION)
    VLLM_VERSION = SYNTH_VLLM_VERSION
    IMAGE        = image("synth", "vllm-${SYNTH_VLLM_VERSION}")
  }
  labels = base_labels(FLAVOUR == "cpu" ? CPU_BASE_IMAGE : engine_base(SYNTH_BASE_IMAGE, SYNTH_VLLM_VERSION))
}

target "dump" {
  inherits   = ["_engine"]
  dockerfile = "docker/dump.Dockerfile"
  tags       = [image("dump", "vllm-${DUMP_VLLM_VERSION}")]
  args = {
    BASE_IMAGE   = engine_base(DUMP_BASE_IMAGE, DUMP_VLLM_VERSION)
    VLLM_VERSION = DUMP_VLLM_VERSION
    IMAGE        = image("dump", "vllm-${DUMP_VLLM_VERSION}")
  }
  labels = base_labels(FLAVOUR == "cpu" ? CPU_BASE_IMAGE : engine_base(DUMP_BASE_IMAGE, DUMP_VLLM_VERSION))
}

target "bench" {
  inherits   = ["_engine"]
  dockerfile = "docker/bench.Dockerfile"
  tags       = [image("bench", "vllm-${BENCH_VLLM_VERSION}")]
  args = {
    BASE_IMAGE   = engine_base(BENCH_BASE_IMAGE, BENCH_VLLM_VERSION)
    VLLM_VERSION = BENCH_VLLM_VERSION
    IMAGE        = image("bench", "vllm-${BENCH_VLLM_VERSION}")
  }
  labels = base_labels(FLAVOUR == "cpu" ? CPU_BASE_IMAGE : engine_base(BENCH_BASE_IMAGE, BENCH_VLLM_VERSION))
}

target "train" {
  inherits   = ["_common"]
  dockerfile = "docker/train.Dockerfile"
  tags       = [image("train", "torch-${TORCH_VERSION}")]
  args = {
    FLAVOUR        = FLAVOUR
    TORCH_VERSION  = TORCH_VERSION
    BASE_IMAGE     = TORCH_BASE_IMAGE
    CPU_BASE_IMAGE = CPU_BASE_IMAGE
    IMAGE          = image("train", "torch-${TORCH_VERSION}")
  }
  labels = base_labels(FLAVOUR == "cpu" ? CPU_BASE_IMAGE : TORCH_BASE_IMAGE)
}

# One flavour: it needs neither an engine nor torch.
target "ops" {
  inherits   = ["_common"]
  dockerfile = "docker/ops.Dockerfile"
  tags       = ["${EYRIE_REGISTRY}/ops:${EYRIE_VERSION}"]
  args = {
    CPU_BASE_IMAGE = CPU_BASE_IMAGE
    IMAGE          = "${EYRIE_REGISTRY}/ops:${EYRIE_VERSION}"
  }
  labels = base_labels(CPU_BASE_IMAGE)
}
