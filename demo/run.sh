#!/usr/bin/env bash
# make demo: speech -> manifests -> teacher -> distil and prune -> prune -> final distillation -> report.
#
#   DATA=/path/to/LibriSpeech   use real speech instead of synthesised speech
#   OUT=demo/out                where everything goes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
out=${OUT:-demo/out}
mkdir -p "$out"
start=$SECONDS

if [[ -n ${DATA-} ]]; then
    speech=$DATA
else
    speech=$out/speech
    "$python" -m demo.synthesize_speech --out "$speech" --minutes 10
fi
"$python" prepare_data.py --data "$speech" --out "$out/data"
"$python" convert_hubert_from_hf.py --model demo/mini-hubert --out "$out/mini-hubert.pth"
python=$python exp_dir=$out/exp teacher_ckpt=$out/mini-hubert.pth tsv_dir=$out/data bash run.sh conf/demo.conf
final=$out/exp/final/ckpts/pruned_hubert_base.pth
"$python" evaluate.py --teacher "$out/mini-hubert.pth" --models "$out/exp/ckpts/pruned_hubert_base.pth" "$final" \
    --names "after pruning" "after final distillation" --tsv "$out/data/valid.tsv" --distill_layers 0.2,4,6 \
    --speed_seconds --device cpu --out "$out/exp/evaluation.json"
"$python" -m report "$out/exp" --evaluation "$out/exp/evaluation.json" >>"$out/exp/report.log" # run.sh has shown it
printf '\nto load it:\n  import wav2vec2\n  model = wav2vec2.load("%s")\n' "$final"
echo
echo "demo finished in $((SECONDS - start)) s"
