#!/usr/bin/env bash
# What labels give, and when in the compression: each list of labelled clips by every recipe, from one teacher to one
# size. It makes a table of docs/results.md.
#
#   METHODS=results/8m LAYERS=0.2,4 OUT=results/8m-tasks bash benchmarks/tasks.sh probes/digits.tsv phones/segments.tsv
#
# METHODS is a folder of benchmarks/methods.sh: with its teacher, and the models that it compressed without labels (the
# row units_shorter). LAYERS are those to distil. The recipes:
#
#   compressed          compress without labels, fine-tune
#   compressed_longer   the same, fine-tuned for as many updates as the others meet labels in
#   finetune_first      fine-tune the teacher, compress it with the labels, fine-tune again
#   by_task             prune by the loss of the labels alone, without a teacher, fine-tune
#   scratch             learn the labels in the compressed shape, from random weights
#
# But for compressed_longer the small model makes as many updates in each, by the flags of benchmarks/tasks.conf; the
# teacher's fine-tuning in finetune_first comes on top, and is in the table, too. A run is OUT/RECIPE-LIST-SEED, and
# finetuned/finetuned.json in it what it reaches.
#
#   --dry-run   show the commands, run nothing
#
# From the environment, too: RECIPES, SIZE (0.9) and SEEDS choose runs; JOBS of them go on side by side (2), each on one
# thread; FLAGS are of all trainings, "--accelerator cpu --precision 32" where there is no GPU. Call it again to continue
# where it was stopped: what is complete is left alone. Paths start from the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source benchmarks/jobs.sh

dry_run=false
if [[ ${1-} == --dry-run ]]; then dry_run=true && shift; fi
: "${METHODS:?}" "${LAYERS:?}" "${OUT:?}"
all_recipes="compressed compressed_longer finetune_first by_task scratch"
recipes=${RECIPES:-$all_recipes} size=${SIZE:-0.9} seeds=${SEEDS:-0 1 2} jobs=${JOBS:-2} flags=${FLAGS:-}
for recipe in $recipes; do
    [[ " $all_recipes " == *" $recipe "* ]] || fail "RECIPES: $recipe is none of: $all_recipes"
done
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "JOBS: expected a number from 1, found $jobs"
(($#)) || fail "give lists of labelled clips"
declare -A lists=() # by name
for list in "$@"; do
    [[ -f $list ]] || fail "$list: no such file in $PWD; give lists of labelled clips"
    lists[$(basename "${list%.tsv}")]=$list
done
compressed() { echo "$METHODS/units_shorter-$size-$1/final/ckpts/pruned_hubert_base.pth"; }
for seed in $seeds; do
    $dry_run || [[ -f $(compressed "$seed") ]] ||
        fail "$(compressed "$seed"): does not exist; make it by ROWS=units_shorter SIZES=$size SEEDS=$seed OUT=$METHODS benchmarks/methods.sh"
done
python=${python:-python} teacher_ckpt=$METHODS/teacher.pth
export python teacher_ckpt OMP_NUM_THREADS=1

with_random_weights='import sys, torch; from wav2vec2 import checkpoint, model
torch.manual_seed(int(sys.argv[2]))
config = checkpoint.read_model_file(sys.argv[1])["config"]
checkpoint.save(sys.argv[3], {"config": config, "state_dict": model.wav2vec2_model(**config).state_dict()})'

# Makes one run.
run() {
    local recipe=$1 labels=${lists[$2]} seed=$3 settings model
    settings=(recipe="$recipe" labels="$labels" size="$size" layers="$LAYERS" exp_dir="$OUT/$1-$2-$3")
    # shellcheck disable=SC2086 # flags are words
    case $recipe in
        finetune_first | by_task)
            call env "${settings[@]}" bash run.sh benchmarks/tasks.conf --seed "$seed" $flags
            ;;
        *)
            model=$(compressed "$seed")
            if [[ $recipe == scratch ]]; then
                call "$python" -c "$with_random_weights" "$model" "$seed" "$OUT/$1-$2-$3/random.pth"
                model=$OUT/$1-$2-$3/random.pth
            fi
            local finetune
            source benchmarks/tasks.conf
            call "$python" finetune.py --model "$model" "${finetune[@]}" --exp_dir "$OUT/$1-$2-$3/finetuned" \
                --resume_checkpoint auto --seed "$seed" $flags
            ;;
    esac
}

$dry_run || mkdir -p "$OUT/logs"
plan=()
for seed in $seeds; do
    for name in "${!lists[@]}"; do
        for recipe in $recipes; do
            if [[ -f $OUT/$recipe-$name-$seed/finetuned/finetuned.json ]]; then
                done=$((done + 1))
            else
                plan+=("run $recipe $name $seed")
            fi
        done
    done
done
run_plan
((${#failed[@]} == total)) || call "$python" -m benchmarks.tasks "$OUT"
check_failed
