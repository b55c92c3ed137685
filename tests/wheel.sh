#!/usr/bin/env bash
# Builds the wheel, installs it in a clean venv without development extras, and uses it from outside the tree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$PWD
pip="-m pip --quiet --disable-pip-version-check"
.venv/bin/python $pip wheel --no-deps --no-build-isolation -w "$work" .
.venv/bin/python -m venv "$work/venv"
"$work/venv/bin/python" $pip install -c constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)"
"$work/venv/bin/python" $pip install -c constraints.txt "$work"/optmem-*.whl
cd "$work"
venv/bin/optmem env
printf 'one line\n| a | table |\n' | venv/bin/optmem render - -o pages --json
venv/bin/optmem demo -o demo
venv/bin/python - "$root" <<'PY'
import sys
import optmem
assert not optmem.__file__.startswith(sys.argv[1]), "the wheel is tested, not the tree"
from importlib.resources import files
from optmem.native import native
native("_cpu").require()
assert files("optmem").joinpath("kernels/patch_embed.py").is_file()
pages = optmem.paginate("wheel\n")
assert pages[0].text() == "wheel\n"
assert pages[0].image().shape == (512, 512)
engine = optmem.Engine.from_pretrained("nano")
[done] = engine.decode(engine.encode(pages))
assert done.text == "wheel\n", done.text
PY
echo "the wheel works in a clean venv"
