#!/usr/bin/env bash
# Compress one teacher by every method to every size, from the same data in as many updates, and measure all with the
# same probes: the table and the pictures of docs/results.md.
#
#   TEACHER=demo/mini-hubert LAYERS=0.2,4,6 DATA=LibriSpeech OUT=results/mini \
#       bash benchmarks/methods.sh phones/phone_segments.tsv probes/digits.tsv
#
# TEACHER is what convert_hubert_from_hf.py --model takes, LAYERS are those to distil, the last of them the teacher's
# last; the arguments are lists of labelled clips (docs/measuring.md). The rows are those of benchmarks/methods.conf.
# A run is OUT/ROW-SIZE-SEED: its compressed model is final/ckpts/pruned_hubert_base.pth, and what was measured of it
# fidelity.json and evaluation.json.
#
#   --dry-run         show the commands, run nothing
#   --train-only      measure nothing
#   --evaluate-only   measure the models that are there, train nothing
#
# From the environment, too: ROWS, SIZES and SEEDS choose runs; JOBS of them go on side by side (2), each on one thread;
# FLAGS are of both trainings, "--accelerator cpu" where there is no GPU. Call it again to continue where it was stopped:
# what is complete is left alone. Paths start from the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source benchmarks/jobs.sh

dry_run=false train=true evaluate=true
while [[ ${1-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=true ;;
        --train-only) evaluate=false ;;
        --evaluate-only) train=false ;;
        *) fail "$1: expected --dry-run, --train-only or --evaluate-only, or lists of labelled clips" ;;
    esac
    shift
done
: "${TEACHER:?}" "${LAYERS:?}" "${DATA:?}" "${OUT:?}"
probes=("$@")
$train || $evaluate || fail "--train-only and --evaluate-only leave nothing to do; give one of them"
((${#probes[@]})) || ! $evaluate || fail "give lists of labelled clips"
all_rows="published exact schedule units macs light star masked_units ema distilhubert half_width fithubert"
other_rows="published_longer units_longer units_shorter" # only if ROWS asks for them
rows=${ROWS:-$all_rows} sizes=${SIZES:-0.75 0.9 0.95} seeds=${SEEDS:-0 1} jobs=${JOBS:-2} flags=${FLAGS:-}
for row in $rows; do
    [[ " $all_rows $other_rows " == *" $row "* ]] || fail "ROWS: $row is none of: $all_rows $other_rows"
done
[[ $LAYERS =~ ^[0-9]+([.,][0-9]+)*$ ]] || fail "LAYERS: expected layers such as 0.2,4, found $LAYERS"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "JOBS: expected a number from 1, found $jobs"
for list in "${probes[@]}"; do
    [[ -f $list ]] || fail "$list: no such file in $PWD; give lists of labelled clips"
done
python=${python:-python} teacher_ckpt=$OUT/teacher.pth tsv_dir=$OUT/data students=$OUT/students
export python teacher_ckpt tsv_dir students OMP_NUM_THREADS=1
measure=("$python" evaluate.py --threads 1 --device cpu)

# The layers that a row distils.
layers_of() {
    case $1 in
        distilhubert) echo "${LAYERS#0[.,]}" ;;
        fithubert) seq -s. "${LAYERS##*[.,]}" ;;
        *) echo "$LAYERS" ;;
    esac
}

# The folder of a run, and its compressed model.
folder_of() { echo "$OUT/$1-$2-$3"; }
model_of() { echo "$(folder_of "$@")/final/ckpts/pruned_hubert_base.pth"; }

# Trains and measures one run. What is written last says that all is there.
run() {
    local row=$1 size=$2 folder model layers settings
    folder=$(folder_of "$@") model=$(model_of "$@") layers=$(layers_of "$1")
    if $train && [[ ! -f $model ]]; then
        settings=(
            row="$row" size="$size" layers="$layers" students="$students"
            exp_dir="$folder" tsv_dir="$tsv_dir" teacher_ckpt="$teacher_ckpt"
        )
        # shellcheck disable=SC2086 # flags are words
        call env "${settings[@]}" bash run.sh benchmarks/methods.conf --seed "$3" $flags
        # shellcheck disable=SC2086
        ! $dry_run || env "${settings[@]}" bash run.sh --print benchmarks/methods.conf --seed "$3" $flags | sed 's/^/    /'
    fi
    if $evaluate; then
        call "${measure[@]}" --teacher "$teacher_ckpt" --models "$model" --tsv "$tsv_dir/valid.tsv" --max_seconds 40 \
            --distill_layers "$layers" --speed_seconds --out "$folder/fidelity.json"
        call "${measure[@]}" --models "$model" --probes "${probes[@]}" --no_controls --seeds 0 --speed_seconds \
            --out "$folder/evaluation.json"
    fi
}

# What scores are compared with, once for all runs.
teacher() {
    call "${measure[@]}" --teacher "$teacher_ckpt" --probes "${probes[@]}" --seeds 0 --speed_seconds \
        --out "$OUT/teacher.json"
}

# Times all models again where one is new: they take turns, so that the times can be compared.
speed() {
    local folder folders=() is_new=$dry_run
    for folder in "$OUT"/*-*-*; do
        [[ ! -f $folder/evaluation.json ]] || folders+=("$folder")
        [[ ! $folder/evaluation.json -nt $OUT/speed.json ]] || is_new=true
    done
    ! $dry_run || folders=("$OUT/ROW-SIZE-SEED")
    ! $is_new || call "${measure[@]}" --teacher "$teacher_ckpt" \
        --models "${folders[@]/%//final/ckpts/pruned_hubert_base.pth}" --names "${folders[@]##*/}" \
        --speed_seconds 10 --out "$OUT/speed.json"
}

$dry_run || mkdir -p "$OUT/logs"
[[ -f $tsv_dir/valid.tsv ]] || call "$python" prepare_data.py --data "$DATA" --out "$tsv_dir"
[[ -f $teacher_ckpt ]] || call "$python" convert_hubert_from_hf.py --model "$TEACHER" --out "$teacher_ckpt"
# shellcheck disable=SC2086 # sizes are words
call "$python" -m benchmarks.students --teacher_ckpt "$teacher_ckpt" --sizes $sizes --out "$students"

plan=() # jobs, each a line of words
if $evaluate; then
    if [[ -f $OUT/teacher.json ]]; then done=1; else plan=(teacher); fi
fi
for seed in $seeds; do
    for size in $sizes; do
        for row in $rows; do
            model=$(model_of "$row" "$size" "$seed") last=$(folder_of "$row" "$size" "$seed")/evaluation.json
            $evaluate || last=$model
            if [[ $row =~ ^(distilhubert|half_width|fithubert)$ && ! -f $students/$row-$size.json ]] && ! $dry_run; then
                continue # benchmarks.students has said why
            elif [[ -f $last ]]; then
                done=$((done + 1))
            elif ! $train && [[ ! -f $model ]]; then
                echo "$row $size seed $seed: left out, it is not trained yet"
            else
                plan+=("run $row $size $seed")
            fi
        done
    done
done
run_plan
if $evaluate; then
    total=$((total + 1))
    start speed
    while ((${#names[@]})); do finish; done
    call "$python" -m benchmarks.methods "$OUT"
fi
check_failed
