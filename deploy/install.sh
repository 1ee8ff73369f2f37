#!/bin/sh
# Installs the wheels of this folder into a Python environment, without a network: sh install.sh
# PYTHON names its interpreter; without it python, then python3, on PATH.
set -eu

fail() {
    printf 'install.sh: %s\n' "$1" >&2
    exit 1
}

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
command -v sha256sum >/dev/null || fail "sha256sum: not found on PATH, wanted it to verify the files (coreutils)"
[ -f "$here/SHA256SUMS" ] || fail "$here/SHA256SUMS: not found, wanted a whole bundle; copy it again"
told=$(cd "$here" && sha256sum -c SHA256SUMS 2>/dev/null) ||
    fail "$here: $(printf '%s\n' "$told" | grep -v ': OK$' | head -n 1), wanted the files that SHA256SUMS lists; copy the bundle again"

python=${PYTHON:-$(command -v python || command -v python3 || true)}
[ -n "$python" ] || fail "python: not found on PATH, wanted 3.10 or newer; activate an environment, or PYTHON=/path/to/python sh install.sh"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "$python: does not run, wanted a Python of 3.10 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python: is Python $version, wanted 3.10 or newer; PYTHON=/path/to/python sh install.sh"

exec "$python" "$here/install.py" "$@"
