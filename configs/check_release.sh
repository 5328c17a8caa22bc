#!/bin/sh
# Install dist/*.whl and dist/*.tar.gz, each in a clean environment, and generate an image: check_release.sh PYTHON
# The environment of PYTHON lends torch and the other libraries, so that nothing but the package is installed. Run by `make release`.
set -eu
python="$1"
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for file in dist/*.whl dist/*.tar.gz; do
    rm -rf "$folder/venv" "$folder/out"
    "$python" -m venv "$folder/venv"
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$(pwd)/$file"
    site=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$libraries" > "$site/libraries.pth"
    (cd "$folder" && venv/bin/tinysd-batch --version && venv/bin/tinysd-batch txt2img red apple --steps 5 --seed 1 -o out)
    test -s "$folder/out/seed_1_00001.png" || test -n "$(find "$folder/out" -name 'seed_1_*.png')"
    echo "$file works in a clean environment"
done
