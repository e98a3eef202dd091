#!/usr/bin/env bash
# Trains and tests a task of SUPERB with s3prl on a model file of this project, with a suitable learning rate.
#
#   bash s3prl_upstream/superb.sh TASK MODEL [--dry-run] [--lr RATE] [--layer N] [-o KEY=VALUE] [FLAGS]
#
# TASK is one of PR ASR KS IC SF SID ASV SD ER QbE. Call it in the folder s3prl/s3prl of a clone of s3prl, or set S3PRL to
# that folder. --dry-run shows the commands and runs nothing. -o and FLAGS (--device cpu, -f) are run_downstream.py's; -o
# gives the path of a corpus: -o config.downstream_expert.datarc.file_path=/corpora/VoxCeleb1. --layer is for QbE: the
# best layer on dev, to be tested. Results go to MODEL.superb/task, without the suffix of MODEL; the same call again
# continues a stopped training.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

tasks=(PR ASR KS IC SF SID ASV SD ER QbE)
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
words=() flags=() dry_run=false lr='' layer='' override=''
while (($#)); do
    case $1 in
        --dry-run) dry_run=true ;;
        --lr | --layer | -o)
            [[ -n ${2-} ]] || fail "$1: expected a value behind it"
            case $1 in --lr) lr=$2 ;; --layer) layer=$2 ;; -o) override+=",,$2" ;; esac
            shift
            ;;
        -*) flags+=("$1") ;;
        *) if ((${#words[@]} < 2)); then words+=("$1"); else flags+=("$1"); fi ;;
    esac
    shift
done
((${#words[@]} == 2)) || fail "expected TASK MODEL, found ${#words[@]} words: ${words[*]-}"
task=${words[0]} model=${words[1]}

# s3prl's name of the task, its configuration, its name of the best checkpoint, and the rate. The rates are those of
# s3prl's configurations, except for SID: 1e-4 gives HuBERT Base 65 to 67%, 1e-1 the published 81% (s3prl's issues #268, #578).
case $task in
    PR) set ctc libriphone dev-best.ckpt 1e-2 ;;
    ASR) set asr config dev-clean-best.ckpt 1e-4 ;;
    KS) set speech_commands config dev-best.ckpt 1e-4 ;;
    IC) set fluent_commands config dev-best.ckpt 1e-4 ;;
    SF) set ctc snips dev-best.ckpt 1e-4 ;;
    SID) set voxceleb1 config dev-best.ckpt 1e-1 ;;
    ASV) set sv_voxceleb1 config 'states-*.ckpt' 1e-4 ;;
    SD) set diarization config best-states-dev.ckpt 1e-4 ;;
    ER) set emotion config dev-best.ckpt 1e-4 ;;
    QbE) set quesst14_dtw config '' '' ;;
    *) fail "TASK: $task is none of ${tasks[*]}" ;;
esac
downstream=$1 config=downstream/$1/$2.yaml best=$3 rate=${lr:-$4}
[[ -e $model ]] || fail "MODEL: $model: no such file"
model=$(realpath "$model")
[[ -z $layer || $task == QbE ]] || fail "--layer: is of QbE alone; the other tasks learn what each layer is worth"
[[ -z $layer || $layer =~ ^[0-9]+$ ]] || fail "--layer: expected the number of a layer from 0, found $layer"
[[ -z $lr || $task != QbE ]] || fail "--lr: QbE trains nothing"
[[ -z $rate || $rate =~ ^[0-9]*\.?[0-9]+([eE]-?[0-9]+)?$ ]] || fail "--lr: expected a number such as 1e-3, found $rate"

python=${python:-python} s3prl=$(realpath -m "${S3PRL:-.}")
command -v "$python" >/dev/null || fail "python: $python: no such command; set python=..."
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") # other folders follow
if ! $dry_run; then
    [[ -f $s3prl/$config ]] ||
        fail "S3PRL: no $config in $s3prl; git clone https://github.com/s3prl/s3prl, and set S3PRL to its folder s3prl/s3prl"
    "$python" -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("s3prl"))' ||
        fail "$python has no s3prl; see Environment in $here/README.md"
fi
num_layers=$(cd "$here/.." && "$python" -c '
import sys
from wav2vec2.files.checkpoint import load_model
from wav2vec2.files.errors import UserError
try:
    print(len(load_model(sys.argv[1]).encoder.transformer.layers))
except (UserError, OSError) as error:
    sys.exit(f"error: {error}")
' "$model")

# Prints a line of bash and runs it.
run() {
    printf '%s\n' "$*"
    $dry_run || eval "$*"
}

run "cd ${s3prl@Q}"
out=${model%.pth}.superb/${task,,}
downstream_py="${python@Q} ${here@Q}"
upstream="-u dphubert_local -k ${model@Q} -d $downstream -c $config ${flags[*]@Q}"

# Trains into a folder, with more overrides, and tests the best checkpoint, or each if s3prl does not name the best.
train_and_test() {
    local keys="config.optimizer.lr=$rate$2$override" test="$downstream_py -m evaluate"
    [[ $task != ASR ]] || test+=" -t test-clean"
    run "$downstream_py -m train -a $upstream -p ${1@Q} -o ${keys@Q}"
    if [[ $task == ASV ]]; then
        run "for checkpoint in ${1@Q}/$best; do $test -e \"\$checkpoint\" ${flags[*]@Q}; done"
    else
        run "$test -e ${1@Q}/$best ${flags[*]@Q}"
    fi
}

if [[ $task == QbE ]]; then
    split=dev layers=$(seq -s ' ' 0 "$num_layers")
    [[ -z $layer ]] || split=test layers=$layer
    ((${layer:-0} <= num_layers)) || fail "--layer: $model has the layers 0 to $num_layers, found $layer"
    keys=${override#,,}
    run "for layer in $layers; do" \
        "$downstream_py -m evaluate -t $split -l \$layer $upstream -p ${out@Q}-\$layer-$split ${keys:+-o ${keys@Q}}; done"
elif [[ $task == ER ]]; then
    for fold in fold1 fold2 fold3 fold4 fold5; do
        train_and_test "$out-$fold" ",,config.downstream_expert.datarc.test_fold='$fold'"
    done
else
    train_and_test "$out" ''
fi
