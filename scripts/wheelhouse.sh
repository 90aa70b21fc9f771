#!/usr/bin/env bash
# Collects the wheels of kontextd and of all it needs, with constraints.txt and install.sh, in one folder: copied to a
# machine without internet, `./install.sh FOLDER` installs from it. The only step that uses a package index.
#
#   scripts/wheelhouse.sh PYTHON WHEELHOUSE
#
# PYTHON has hatchling installed; the wheels fit its version and this kind of machine.
set -euo pipefail

python=$1
wheelhouse=$2
cd "$(dirname "$0")/.."
pip=("$python" -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --wheel-dir "$wheelhouse")

# The dependencies are hundreds of megabytes and seldom change; our own wheel is small and changes all the time.
fingerprint=$("$python" --version; sha256sum pyproject.toml constraints.txt)
if [[ "$(cat "$wheelhouse/fingerprint.txt" 2>/dev/null)" != "$fingerprint" ]]; then
    rm -rf "$wheelhouse"
    "${pip[@]}" --constraint constraints.txt .
fi
rm -f "$wheelhouse"/kontextd-*.whl
"${pip[@]}" --no-deps .

cp constraints.txt scripts/install.sh "$wheelhouse/"
echo "$fingerprint" >"$wheelhouse/fingerprint.txt"
echo "$(find "$wheelhouse" -name '*.whl' | wc -l) wheels, $(du -sh "$wheelhouse" | cut -f1), in $wheelhouse"
