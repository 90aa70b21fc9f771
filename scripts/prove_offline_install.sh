#!/usr/bin/env bash
# Proves that a machine without internet can install kontextd from a wheelhouse and edit a photo: in a network namespace
# that has nothing but loopback, as a user without privileges, in a folder that did not exist before.
# There is no way to skip it: where the kernel permits no namespaces the proof fails.
#
#   scripts/prove_offline_install.sh WHEELHOUSE
#
# Calls itself for its two inner stages: `inside` (in the namespace) and `as-user` (there, without privileges).
set -euo pipefail

readonly NOBODY=65534

fail() {
    echo "prove_offline_install: $*" >&2
    exit 1
}

# Stage 1, outside: copy the wheelhouse to where any user may read it, then enter the namespace.
main() {
    local wheelhouse=$1 stage
    [[ -x $wheelhouse/install.sh ]] || fail "no wheelhouse at $wheelhouse: run 'make wheelhouse' first"
    stage=$(mktemp -d)
    # shellcheck disable=SC2064  # the path is known now, and `stage` is gone when the trap runs
    trap "rm -rf '$stage'" EXIT
    chmod 755 "$stage"
    # Hard links where the file system allows: torch alone is hundreds of megabytes.
    cp -rl "$wheelhouse" "$stage/linked" 2>/dev/null && mv "$stage/linked" "$stage/wheelhouse" ||
        cp -r "$wheelhouse" "$stage/wheelhouse"
    cp "$0" "$stage/proof.sh"
    chmod -R a+rX "$stage"
    mkdir "$stage/home"
    if [[ $(id -u) == 0 ]]; then
        chown "$NOBODY:$NOBODY" "$stage/home"
        unshare --net "$stage/proof.sh" inside "$stage"
    else
        unshare --user --map-root-user --net "$stage/proof.sh" inside "$stage" "$(id -u)" "$(id -g)"
    fi || fail "failed (see above). If 'unshare' was not permitted: run as root, or allow user namespaces"
}

# Stage 2, in the namespace as its root: bring loopback up, then give all privileges away.
inside() {
    local stage=$1
    ip link set lo up
    local plain=(env -i PATH=/usr/local/bin:/usr/bin:/bin HOME="$stage/home" LANG=C.UTF-8 OMP_NUM_THREADS=1)
    cd "$stage/home"
    if [[ $# == 1 ]]; then
        setpriv --reuid "$NOBODY" --regid "$NOBODY" --clear-groups --no-new-privs \
            "${plain[@]}" "$stage/proof.sh" as-user "$stage"
    else # a user namespace of one user: become that user again
        unshare --user --map-user="$2" --map-group="$3" "${plain[@]}" "$stage/proof.sh" as-user "$stage"
    fi
}

# Stage 3, in the namespace as a plain user: no network, install, first edit, look at the result.
as_user() {
    local stage=$1 python samples
    [[ $(id -u) != 0 ]] || fail "still root"
    python=$(find_python "$stage/wheelhouse")
    prove_no_network "$python"

    "$stage/wheelhouse/install.sh" "$HOME/kontextd" "$python"

    samples=("$HOME"/kontextd/lib/python3*/site-packages/kontextd_models/embedded/samples/*.jpg)
    [[ -f ${samples[0]} ]] || fail "the installed package holds no sample photo: ${samples[0]}"
    "$HOME/kontextd/bin/kontextd" edit "${samples[0]}" "make it black and white" -o "$HOME/edited.png" --seed 1
    check_edit "${samples[0]}" "$HOME/edited.png"
    echo "proved: installed and edited a photo without network as uid $(id -u)"
}

# The wheels fit one Python version; the interpreter must be one that a plain user can run.
find_python() {
    local version python
    version=$(sed -n 's/^Python \([0-9]*\.[0-9]*\).*/\1/p' "$1/fingerprint.txt")
    for python in "python$version" python3; do
        if "$python" -c "import ensurepip, sys, venv; sys.exit(f'{sys.version_info[0]}.{sys.version_info[1]}' != '$version')" \
            2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    fail "no Python $version with venv on $PATH that uid $(id -u) may run; on Debian: apt-get install python3-venv"
}

# 192.0.2.1 belongs to nobody (RFC 5737). With any route a connection to it hangs; without one it is refused at once
# with ENETUNREACH, which is what is asked for. Loopback must work, or the check would prove too much.
prove_no_network() {
    "$1" - <<'PYTHON'
import errno, socket

interfaces = [name for _, name in socket.if_nameindex()]
assert interfaces == ["lo"], f"interfaces besides loopback: {interfaces}"
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname(), timeout=5).close()
try:
    socket.create_connection(("192.0.2.1", 443), timeout=5)
except OSError as error:
    assert error.errno == errno.ENETUNREACH, f"not refused at once: {error!r}"
else:
    raise AssertionError("a public address was reached")
print("no network: loopback only, a public address is unreachable")
PYTHON
}

# A black and white photo of the same aspect: channels nearly equal, and not one flat colour.
check_edit() {
    "$HOME/kontextd/bin/python" - "$@" <<'PYTHON'
import sys

import numpy as np
from PIL import Image

before, after = (Image.open(path).convert("RGB") for path in sys.argv[1:])
pixels = np.asarray(after, dtype=float)
spread, contrast = np.ptp(pixels, axis=2).mean(), pixels.std()
colour_before = np.ptp(np.asarray(before, dtype=float), axis=2).mean()
print(f"{before.size} -> {after.size}, colour {colour_before:.1f} -> {spread:.1f}, contrast {contrast:.1f}")
assert abs(np.log(before.width / before.height * after.height / after.width)) < 0.1, "aspect changed"
assert spread < 0.5 * colour_before, "still in colour"
assert contrast > 10, "a flat picture"
PYTHON
}

case ${1:-} in
    inside) inside "${@:2}" ;;
    as-user) as_user "$2" ;;
    *) main "${1:?usage: prove_offline_install.sh WHEELHOUSE}" ;;
esac
