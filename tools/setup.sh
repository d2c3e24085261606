#!/usr/bin/env bash
# Makes .venv and installs physio-dist into it: `bash tools/setup.sh [EXTRA ...]`. Without arguments it installs the extra
# `all`; `test` is all plus what the tests need.
#
# PHYSIO_DIST_VENV   where the environment lies (default: .venv beside this checkout)
# PHYSIO_DIST_TORCH  what to ask pip for (default: a release with a CPU build where there is no NVIDIA driver)
# PHYSIO_DIST_CONSTRAINTS  versions for pip (default: constraints.txt; empty for the newest ones that fit)
# PIP_EXTRA_INDEX_URL and pip's other variables work as usual, for example to name PyTorch's index of CPU builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${PHYSIO_DIST_VENV:-.venv}
python=${PYTHON:-python3}
constraints=${PHYSIO_DIST_CONSTRAINTS-constraints.txt}

say() { printf '\033[1m== %s\033[0m\n' "$*"; }

need_debian() {  # need_debian COMMAND PACKAGE: install a Debian package if the command is missing
    command -v "$1" >/dev/null 2>&1 && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing $2"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2" >/dev/null
    else
        echo "tools/setup.sh: $1 is missing: install the package $2 and start again" >&2
        exit 2
    fi
}

need_debian "$python" python3
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "tools/setup.sh: $("$python" --version) is too old: physio-dist needs Python 3.11 or newer (set PYTHON=...)" >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip' >/dev/null 2>&1; then
    need_debian no-such-command-so-always python3-venv
fi

if [ ! -x "$venv/bin/python" ]; then
    say "making $venv"
    "$python" -m venv "$venv"
fi

# What was installed, and for what: a second start is quick.
[ $# != 0 ] || set -- all
extras=$(IFS=,; echo "$*")
stamp="$venv/.physio-dist-installed"
wanted=$(cat pyproject.toml tools/setup.sh ${constraints:+"$constraints"} | sha256sum; echo "${PHYSIO_DIST_TORCH:-} $PWD")
if [ -f "$stamp" ] && grep -qxF "[$extras]" "$stamp" && [ "$(sed 1,/^---$/d "$stamp")" = "$wanted" ]; then
    exit 0
fi

# torch first and by itself: asked for by another package it would come in its newest build, several GB of CUDA
# libraries on a machine that cannot use them.
if [ -n "${PHYSIO_DIST_TORCH:-}" ]; then
    torch=$PHYSIO_DIST_TORCH
elif command -v nvidia-smi >/dev/null 2>&1; then
    torch='torch>=2.6'
else
    torch='torch==2.13.0'
fi
say "installing $torch"
# shellcheck disable=SC2086  # several words may be meant
"$venv/bin/pip" install --quiet --disable-pip-version-check $torch
say "installing physio-dist[$extras]"
"$venv/bin/pip" install --quiet --disable-pip-version-check ${constraints:+-c "$constraints"} --editable ".[$extras]"

want_debian() {  # want_debian COMMAND PACKAGE: as need_debian; without the right to install it, tests are left out
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        need_debian "$@"
    elif ! PATH="$PATH:/usr/sbin" command -v "$1" >/dev/null 2>&1; then
        echo "tools/setup.sh: without $1 (package $2) the tests that need it are not run" >&2
    fi
}

# For tests with several hosts. A server that comes with its package is not to be started.
if [[ " $* " == *" test "* ]]; then
    want_debian ip iproute2
    want_debian iptables iptables
    want_debian pdsh pdsh
    if ! command -v sshd >/dev/null && [ "$(id -u)" = 0 ] && [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    want_debian sshd openssh-server
fi

# Its package would start a server, so the one program is taken out of it.
if [[ " $* " == *" test "* ]] && ! PATH="$venv/bin:$PATH" command -v promtool >/dev/null; then
    say "fetching promtool"
    folder=$(mktemp -d)
    [ "$(id -u)" != 0 ] || apt-get update -qq
    if (cd "$folder" && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb .) >/dev/null 2>&1; then
        install "$folder/usr/bin/promtool" "$venv/bin/promtool"
    else
        echo "tools/setup.sh: without promtool (it comes with Prometheus) the tests that need it are not run" >&2
    fi
    rm -rf "$folder"
fi

if [ -f "$stamp" ] && [ "$(sed 1,/^---$/d "$stamp")" = "$wanted" ]; then
    done_before=$(sed '/^---$/,$d' "$stamp")
fi
{ printf '%s\n' "${done_before:-}" "[$extras]" | sed '/^$/d'; echo '---'; echo "$wanted"; } > "$stamp.new"
mv "$stamp.new" "$stamp"
