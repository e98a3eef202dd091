#!/usr/bin/env bash
# make demo: speech -> manifests -> teacher -> distil and prune -> prune -> final distillation -> table.
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
"$python" -m demo.report --exp_dir "$out/exp" --teacher_ckpt "$out/mini-hubert.pth" --tsv "$out/data/valid.tsv"
echo
echo "demo finished in $((SECONDS - start)) s"
