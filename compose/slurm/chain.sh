#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Submits the four stages; each starts when the one before it has ended with exit code 0.
#   SHARDS=16 compose/slurm/chain.sh recipe.yaml [more options of sbatch]
set -euo pipefail

recipe="${1:?the recipe, a YAML file}"
shift
here="$(dirname "$0")"
# What a job would refuse after hours in the queue is refused here.
[[ -f $recipe ]] || { echo "$recipe: expected the recipe, a YAML file, found no file." >&2; exit 2; }
for name in EYRIE_WORKSPACE EYRIE_IMAGE_{SYNTH,DUMP,TRAIN,BENCH}; do
  [[ -n ${!name:-} ]] || { echo "$name: expected a value (compose/slurm/stage.sbatch), found none." >&2; exit 2; }
done
shards="${SHARDS:-1}"
previous=""
for stage in synth dump train bench; do
  options=(--parsable --job-name="eyrie-$stage" --export="ALL,STAGE=$stage,RECIPE=$recipe")
  [[ $stage == synth || $stage == dump ]] && options+=(--array="0-$((shards - 1))")
  [[ -n $previous ]] && options+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
  previous="$(sbatch "${options[@]}" "$@" "$here/stage.sbatch")"
  previous="${previous%%;*}"
  echo "$stage: job $previous"
done
