#!/usr/bin/env bash
# Run the experiments that need a GPU, one after the other, the most important results first.
#
#   benchmarks/reproduce.sh OUT [MINUTES] [options of smallvit reproduce, e.g. --data DIR or --budget 0.01]
#
# OUT is the folder for the runs. After MINUTES the current run is saved and the script exits with code 124; started
# again, also on another machine with OUT and the images at the same paths, it resumes there. Records are written to
# results/ (to OUT/records with --budget); existing ones are not repeated. Experiments that fail for bad input (exit
# code 2) are skipped, and the script exits with that code at the end.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
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
scale="" # suffix of the folders: runs of another length are separate
record=$root/results # OUT/records with --budget
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
