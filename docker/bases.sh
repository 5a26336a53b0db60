#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prints the variables that name every base image with its present digest, as compose and bake read them:
#   docker/bases.sh >> .env
set -euo pipefail

bake() {
  FLAVOUR=gpu docker buildx bake --file "$(dirname "$0")/docker-bake.hcl" --print 2>/dev/null
}

with_digest() {
  printf '%s@%s\n' "$1" "$(docker buildx imagetools inspect "$1" --format '{{.Manifest.Digest}}')"
}

plan="$(bake)"
for stage in synth dump bench train; do
  name="${stage^^}"
  [[ $stage == train ]] && name=TORCH
  base="$(jq -r --arg stage "$stage" '.target[$stage].args.BASE_IMAGE' <<< "$plan")"
  echo "${name}_BASE_IMAGE=$(with_digest "$base")"
done
echo "CPU_BASE_IMAGE=$(with_digest "$(jq -r '.target.ops.args.CPU_BASE_IMAGE' <<< "$plan")")"
