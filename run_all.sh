#!/usr/bin/env bash
# MetaMoE end to end on one backbone: select proxies, train experts, unify, evaluate. `bash run_all.sh --help`.
# metamoe/plan.py settles the options and names the stages' commands; this script runs them in order.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The plan needs no package: a wrong option shows before anything is installed.
plan=
if "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    plan=$(PYTHONPATH="$here" "${PYTHON:-python3}" "$here/metamoe/plan.py" "$@") || exit $?
fi
for word in "$@"; do
    case $word in --plan | --help | -h) printf '%s\n' "$plan"; exit 0 ;; esac
done
. "$here/metamoe/environment.sh"  # sets PYTHON, or ends where there is no Python that will do

# What interrupts this script ends its stage, which removes its temporary files.
child=
interrupted() {
    trap '' TERM HUP INT
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    echo "run_all: interrupted; run the same command again to go on" >&2
    exit $((128 + $1))
}
trap 'interrupted 1' HUP
trap 'interrupted 2' INT
trap 'interrupted 15' TERM
export METAMOE_RUN_ALL=1  # the stage leaves that line to this script

# Each line of the plan: share of the work, title, command. What is left is told from the stages that took time.
total=$(printf '%s\n' "$plan" | awk -F '\t' '{ sum += $1 } END { print NR, sum }')
steps=${total% *} left=${total#* } number=0 done=0 spent=0
SECONDS=0
while IFS=$'\t' read -r work title command <&3; do
    number=$((number + 1)) began=$SECONDS
    line="run_all: $number of $steps, $title: $((SECONDS / 60)) min so far"
    [ "$done" = 0 ] || line="$line, about $((left * spent / done / 60 + 1)) min left"
    echo "$line"
    eval "\"\$PYTHON\" \"\$here\"/$command &"  # bash would wait for its end before it heeds a signal
    child=$!
    wait "$child"
    child=
    took=$((SECONDS - began)) left=$((left - work))
    [ "$took" -lt 10 ] || done=$((done + work)) spent=$((spent + took))
done 3<<< "$plan"
echo "run_all: done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
