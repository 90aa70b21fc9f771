#!/usr/bin/env bash
# Installs kontextd from the wheelhouse that this script lies in, into a new folder. Uses no network and no package
# index, whatever pip's own settings say. `make wheelhouse` makes the wheelhouse; Dockerfile.cuda runs this same script.
#
#   WHEELHOUSE/install.sh FOLDER [PYTHON]
set -euo pipefail

folder=$1
python=${2:-python3}
wheelhouse=$(cd "$(dirname "$0")" && pwd)

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install.sh: $python is older than 3.11; name a newer one: $0 $folder python3.11" >&2
    exit 1
}
# No cache and no settings of pip: what is installed came from the wheelhouse and nowhere else.
export PIP_CONFIG_FILE=/dev/null
"$python" -m venv "$folder"
"$folder/bin/pip" --isolated --disable-pip-version-check install --quiet --no-cache-dir \
    --no-index --find-links "$wheelhouse" --constraint "$wheelhouse/constraints.txt" kontextd
"$folder/bin/pip" --isolated --disable-pip-version-check check

cat <<TEXT
kontextd is installed: $folder/bin/kontextd --help
No FLUX weights are included. FLUX.1 Kontext [dev] weights are for non-commercial use unless Black Forest Labs licensed
you otherwise; the embedded demonstration model needs none. The safety filter is on by default.
TEXT
