#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Submits the four stages; each starts when the one before it has ended with exit code 0.
#   SHARDS=16 SHARD_GPUS=4 TRAIN_NODES=8 compose/slurm/chain.sh recipe.yaml [more options of sbatch]
# SHARDS: jobs of synth and of dump (1). SHARD_GPUS: the GPUs of each, where that is less than a node (stage.sbatch's).
# TRAIN_NODES: nodes of train (1). STAGES: those to submit, "train bench" after the others are done.
set -euo pipefail

refuse() { echo "$1: expected $2, found ${3:-none}." >&2; exit 2; }
recipe="${1:?the recipe, a YAML file}"
shift
here="$(dirname "$0")"
shards="${SHARDS:-1}" gpus="${SHARD_GPUS:-}" nodes="${TRAIN_NODES:-1}"
read -ra stages <<< "${STAGES:-synth dump train bench}"
# What a job would refuse after hours in the queue is refused here.
[[ -f $recipe ]] || refuse "$recipe" "the recipe, a YAML file" "no file"
for name in EYRIE_WORKSPACE EYRIE_IMAGE_{SYNTH,DUMP,TRAIN,BENCH}; do
  [[ -n ${!name:-} ]] || refuse "$name" "a value (compose/slurm/stage.sbatch)"
done
[[ $shards =~ ^[1-9][0-9]*$ ]] || refuse SHARDS "a number above 0" "$shards"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse TRAIN_NODES "a number above 0" "$nodes"
[[ -z $gpus || $gpus =~ ^[1-9][0-9]*$ ]] || refuse SHARD_GPUS "a number above 0" "$gpus"
[[ " synth dump train bench " == *" ${stages[*]} "* ]] || refuse STAGES "stages in the chain's order" "${STAGES}"
previous=""
for stage in "${stages[@]}"; do
  options=(--parsable --job-name="eyrie-$stage" --export="ALL,STAGE=$stage,RECIPE=$recipe")
  if [[ $stage == synth || $stage == dump ]]; then
    options+=(--array="0-$((shards - 1))")
    [[ -n $gpus ]] && options+=(--gpus-per-node="$gpus" --cpus-per-task="$((12 * gpus))")
  fi
  [[ $stage == train && $nodes -gt 1 ]] && options+=(--nodes="$nodes")
  [[ -n $previous ]] && options+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
  previous="$(sbatch "${options[@]}" "$@" "$here/stage.sbatch")"
  previous="${previous%%;*}"
  echo "$stage: job $previous"
done
