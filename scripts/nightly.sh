#!/bin/sh
# Run full sizes with a fresh seed (or the one given): sh scripts/nightly.sh PYTHON [SEED [TESTS...]]
# A worker per processor, four at most, each with a file of tests; then, by themselves, the tests
# marked `alone`. With TESTS given, the report is appended to the last one.
set -u
python=$1
seed=${2:-$(date +%s)}
[ $# -le 2 ] && shift $# || shift 2
report=benchmarks/results/nightly.txt
[ $# -gt 0 ] || : > "$report"
log=$(mktemp)
trap 'rm -f "$log" "$log.status"' EXIT
failed=0
ran=0
run() { # EXPRESSION [OPTIONS AND TESTS...]
    {
        CHUNKLLAMA_TEST_SEED=$seed "$python" -m pytest --durations=0 -m "$@"
        echo $? > "$log.status"
    } 2>&1 | tee "$log"
    # 5: the tests given have none of this kind
    case $(cat "$log.status") in 0) ran=1 ;; 5) ;; *) failed=1 ;; esac
    grep -E '^(seed:|[1-9][0-9.]*s (call|setup)|FAILED|ERROR|!+ |=+ .*(passed|failed|error))' "$log" >> "$report"
}
{
    echo "command: make nightly ARGS=\"$seed${*:+ $*}\""
    echo "date: $(date -u +%Y-%m-%d)"
    echo "machine: $("$python" -c 'from chunkllama.resources import usable_threads; print(usable_threads())') threads," \
        "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
    echo "versions: $("$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
} >> "$report"
run "nightly and not alone" -n logical --maxprocesses 4 --dist loadfile "$@"
run "nightly and alone" "$@"
if [ "$failed$ran" = 00 ]; then
    echo "nightly: no test was collected" >&2
    exit 5
fi
exit $failed
