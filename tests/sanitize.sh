#!/usr/bin/env bash
# Builds the CPU module with AddressSanitizer and UBSan in a copy of the tree and runs the native tests there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -z | xargs -0 cp --parents -P -t "$work"
python=$PWD/.venv/bin/python
cd "$work"
OPTMEM_SANITIZE=1 OPTMEM_CUDA=0 "$python" setup.py --quiet build_ext --inplace
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH="$work"
"$python" -c "import optmem._cpu as m; print('testing', m.__file__)"
"$python" -m pytest -q -p no:cacheprovider tests/test_{draw_text,resample,contact_sheet,cells,linear,linear_rows,grid_attention,rms_norm,rope_cache,route,expert_mlp,paged_attention,pick_token,int8}.py
