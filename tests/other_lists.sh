#!/usr/bin/env bash
# The runs behind the table "Other lists" of RESULTS.md: each list without a flag, and begun from the
# shipped network. Two hours on one core; the networks and what they printed go into FOLDER.
#
#     bash tests/other_lists.sh FOLDER LIST ...
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
for list in "$@"; do
    name=$(basename "$list" .txt)
    for how in alone begun; do
        init=$([ $how = begun ] && echo "--init-from model_state.pth" || true)
        out=$folder/$name-$how
        # shellcheck disable=SC2086
        (time python train.py --data "$list" --out "$out.pth" $init) >"$out.txt" 2>&1
        known=$(python sampling.py --model "$out.pth" -n 1000 --seed 1 | grep -cxFf "$list" || true)
        echo "$name $how: $(grep -A1 'train    test' "$out.txt" | tail -1); of 1,000 samples $known in the list"
    done
done
python tests/kneser_ney.py "$@"
