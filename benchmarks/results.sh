#!/usr/bin/env bash
# The tables of docs/results.md for one teacher: compress it to each of $targets, and measure all with the same probes.
#
#   teacher=demo/mini-hubert layers=0.2,4,6 targets="0.75 0.85" corpus=LibriSpeech out=results/mini \
#       bash benchmarks/results.sh phones/phone_segments.tsv probes/keywords.tsv
#
# $teacher is what convert_hubert_from_hf.py --model takes; the arguments are lists of labelled clips. Flags for training,
# such as "--accelerator cpu --seed 1", come in $flags, another config file in $conf. Call it again to continue where it
# was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${teacher:?}" "${layers:?}" "${targets:?}" "${corpus:?}" "${out:?}" "${1:?give lists of labelled clips}"
python=${python:-python} flags=${flags:-}
export python tsv_dir=$out/data teacher_ckpt=$out/teacher.pth

[[ -f $tsv_dir/valid.tsv ]] || "$python" prepare_data.py --data "$corpus" --out "$tsv_dir"
[[ -f $teacher_ckpt ]] || "$python" convert_hubert_from_hf.py --model "$teacher" --out "$teacher_ckpt"
models=() names=()
for target in $targets; do
    # shellcheck disable=SC2086 # flags are words
    target=$target exp_dir=$out/$target bash run.sh "${conf:-conf/small.conf}" --distill_layers "$layers" $flags
    models+=("$out/$target/final/ckpts/pruned_hubert_base.pth") names+=("$target off")
done
"$python" evaluate.py --teacher "$teacher_ckpt" --models "${models[@]}" --names "${names[@]}" --tsv "$tsv_dir/valid.tsv" \
    --max_seconds 40 --distill_layers "$layers" --probes "$@" --threads 1 --device cpu --speed_seconds 10 \
    --out "$out/evaluation.json"
