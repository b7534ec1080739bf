#!/bin/sh
# Run full sizes with a fresh seed (or the one given): sh scripts/nightly.sh PYTHON [SEED [TESTS...]]
# With TESTS given, the report is appended to the last one.
set -u
python=$1
seed=${2:-$(date +%s)}
[ $# -le 2 ] && shift $# || shift 2
report=benchmarks/results/nightly.txt
[ $# -gt 0 ] || : > "$report"
log=$(mktemp)
trap 'rm -f "$log" "$log.status"' EXIT
{
    CHUNKLLAMA_TEST_SEED=$seed "$python" -m pytest -m nightly --durations=0 "$@"
    echo $? > "$log.status"
} 2>&1 | tee "$log"
{
    echo "command: make nightly ARGS=\"$seed${*:+ $*}\""
    echo "date: $(date -u +%Y-%m-%d)"
    echo "machine: $("$python" -c 'from chunkllama.resources import usable_threads; print(usable_threads())') threads," \
        "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
    echo "versions: $("$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
    grep -E '^(seed:|[1-9][0-9.]*s (call|setup)|FAILED|ERROR|!+ |=+ .*(passed|failed|error))' "$log"
} >> "$report"
exit "$(cat "$log.status")"
