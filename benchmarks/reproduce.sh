#!/usr/bin/env bash
# The experiments that ask for a GPU, one after the other, those first whose figures are wanted most.
#
#   benchmarks/reproduce.sh OUT [MINUTES] [options of smallvit reproduce, such as --data DIR or --budget 0.01]
#
# OUT takes the runs' folders. After MINUTES the run at hand is saved and the script ends (exit code 124); started again,
# here or on another machine where OUT and the images lie at the same places, it goes on there. Records go to results/
# (to OUT/records with --budget) and are not made twice. Experiments that cannot be done (exit code 2) do not keep the others from it; the script ends
# with that code.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$1
shift
minutes=""
if [[ ${1-} =~ ^[0-9]+$ ]]; then
    minutes=$1
    shift
fi
root=$(cd "$(dirname "$0")/.." && pwd)
smallvit=${SMALLVIT:-smallvit}
started=$SECONDS

reproduce() { # NAME, then options
    local limit=()
    if [ -n "$minutes" ]; then
        local left=$((minutes * 60 - (SECONDS - started)))
        [ "$left" -gt 0 ] || exit 124
        limit=(timeout --signal=TERM --kill-after=120 "$left")
    fi
    local code=0 name=$1
    ${limit[@]+"${limit[@]}"} "$smallvit" reproduce "$@" --out "$out/$name$scale" --record "$record" ${more[@]+"${more[@]}"} || code=$?
    case $code in
        0 | 1) ;; # 1: a training failed
        2) worst=2 ;;
        *) exit "$code" ;;
    esac
}

more=("$@")
worst=0
scale="" # in the names of folders, as runs of another length are others
record=$root/results # of the whole experiments; of scaled ones OUT/records
while [ $# -gt 0 ]; do
    case $1 in
        --budget) scale="@${2-}" ;;
        --budget=*) scale="@${1#*=}" ;;
    esac
    [ -z "$scale" ] || record=$out/records
    shift
done
plain_and_patched=(--rows vit --rows vit+spt+lsa)
reproduce lee2021/cifar100 "${plain_and_patched[@]}" --seeds 1
reproduce best/cifar100 --seeds 1
reproduce lee2021/cifar100 "${plain_and_patched[@]}" --seeds 2
for arch in swin pit cait; do
    reproduce lee2021/cifar100 --rows "$arch" --rows "$arch+spt+lsa" --seeds 1
done
reproduce quick/cifar100
reproduce lee2021/cifar100
reproduce lee2021/ablation
reproduce best/cifar100
reproduce deit/cifar100
reproduce binaryvit/cifar100
exit "$worst"
