#!/usr/bin/env bash
# Everything that must hold, in order: the export is current and clean, the tests pass, the notebooks run, the main job runs.
set -euo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export SPARSEMAX_SAE_RUNS="$out/runs"

echo "== export and clean leave the checkout as it is"
git_state() { git status --porcelain 2>/dev/null || true; git diff HEAD 2>/dev/null || true; }
before=$(git_state)
nbdev_export
nbdev_clean
[ "$before" = "$(git_state)" ] || { git status --short; git diff --stat; echo "run nbdev_export and nbdev_clean, and commit what they change"; exit 1; }

echo "== pytest"
python -m pytest

echo "== notebooks"
OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --do_print

echo "== the main job, in small"
papermill nbs/train.ipynb "$out/train.ipynb" -p arch sparsemax -p preset smoke --no-progress-bar
[ "$before" = "$(git_state)" ] || { git status --short; echo "the tests changed the checkout"; exit 1; }
echo "== all passed"
