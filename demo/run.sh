#!/usr/bin/env bash
# make demo: speech -> manifests -> teacher -> distil and prune -> prune -> final distillation -> report.
#
#   DATA=/path/to/LibriSpeech   use real speech instead of synthesised speech
#   OUT=demo/out                where everything goes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python} out=${OUT:-demo/out} speech=${DATA:-${OUT:-demo/out}/speech}
mkdir -p "$out"
start=$SECONDS

# Runs a command, and hands on to it the signals that ask this script to end.
run() {
    (trap - INT && exec "$@") &
    trap "kill -TERM $! 2>/dev/null; wait $!; exit 143" TERM
    trap "wait $!; exit 130" INT # the terminal sends it to the command as well
    wait $!
}

[[ -n ${DATA-} ]] || run "$python" -m demo.synthesize_speech --out "$speech" --minutes 10
export python data=$speech tsv_dir=$out/data model=demo/mini-hubert teacher_ckpt=$out/mini-hubert.pth exp_dir=$out/exp
run bash run.sh conf/demo.conf
final=$out/exp/final/ckpts/pruned_hubert_base.pth
run "$python" evaluate.py --teacher "$teacher_ckpt" --models "$out/exp/ckpts/pruned_hubert_base.pth" "$final" \
    --names "after pruning" "after final distillation" --tsv "$out/data/valid.tsv" --distill_layers 0.2,4,6 \
    --speed_seconds --device cpu --out "$out/exp/evaluation.json"
"$python" -m report "$out/exp" --evaluation "$out/exp/evaluation.json" >>"$out/exp/report.log" # run.sh has shown it
printf '\nto load it:\n  import wav2vec2\n  model = wav2vec2.load("%s")\n' "$final"
echo
echo "demo finished in $((SECONDS - start)) s"
