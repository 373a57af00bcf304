# Sourced by the proofs: a binary, a lab, data, and checks that are counted.
set -uo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export LAB="${LAB:-/tmp/dunlearn-lab}"
lab="$repo/cluster/lab/lab"
work="$LAB/work"
began=$(date +%s)
passed=0
failed=0

# check WORDS COMMAND...: counts how the command went
check() {
  local words=$1
  shift
  if "$@"; then
    passed=$((passed + 1))
    printf 'ok    %4s s  %s\n' $(($(date +%s) - began)) "$words"
  else
    failed=$((failed + 1))
    printf 'FAIL  %4s s  %s\n' $(($(date +%s) - began)) "$words"
  fi
}

# within SECONDS COMMAND...: waits until the command succeeds; on a machine that others use too, LAB_PATIENCE times as long
within() {
  local end=$(($(date +%s) + $1 * ${LAB_PATIENCE:-1}))
  shift
  until "$@"; do
    [ "$(date +%s)" -lt "$end" ] || return 1
    sleep 0.1
  done
}

finish() {
  "$lab" down >/dev/null
  echo "$passed passed, $failed failed, $(($(date +%s) - began)) s"
  [ "$failed" = 0 ]
}

# Steps that a run has told of; checkpoints are as of now.
steps() { cat "$1/metrics.jsonl" 2>/dev/null | grep -c '"loss"' || true; }
reached() { [ "$(steps "$1")" -ge "$2" ]; }
weights() { sha256sum <"$1/model/model.safetensors"; }
same_weights() { [ "$(weights "$1")" = "$(weights "$2")" ]; }
# The folder is that of a finished run.
finished() { [ -f "$1/summary.json" ]; }
# Ranks of the binary that live anywhere in the lab.
ranks_left() { for pid in /proc/[0-9]*; do [ "$(readlink "$pid/exe" 2>/dev/null)" = "$DUNLEARN" ] && echo "${pid#/proc/}"; done; true; }
no_ranks_left() { [ -z "$(ranks_left)" ]; }

if [ -z "${DUNLEARN:-}" ]; then
  (cd "$repo" && launch/setup && cargo build --release) || exit 1
  DUNLEARN="$repo/target/release/dunlearn"
fi
DUNLEARN=$(readlink -f "$DUNLEARN")
export DUNLEARN
# the lab's network, and MPI's plain ways over it
export PRTE_MCA_prte_if_include=10.78.0.0/24 OMPI_MCA_btl_tcp_if_include=10.78.0.0/24
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=tcp,sm,self OMPI_MCA_coll=^han
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mkdir -p "$work"
cd "$work" || exit 1
case "$repo/" in /tmp/*) export LAB_SHARED="$repo" ;; esac
export LAB_TTL="${LAB_TTL:-1800}"
trap '"$lab" down >/dev/null' EXIT
if [ ! -f runs/quickstart_base/model/model.safetensors ]; then
  "$DUNLEARN" data synth --out runs/quickstart_data --force >/dev/null || exit 1
  "$DUNLEARN" --config "$repo/configs/quickstart_train.toml" --overwrite >base.log 2>&1 || { cat base.log; exit 1; }
fi
