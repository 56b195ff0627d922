#!/usr/bin/env bash
# Usage: tools/venv.sh FOLDER UV_REQUIREMENT [PYTHON]
# Makes FOLDER a virtual environment of Python 3.12 with uv in it: of PYTHON if that is given, else of the first
# python3.12 that answers, else of the one that uv finds on this machine or fetches.
set -euo pipefail
folder=$1 uv_requirement=$2 given=${3:-}
want="3.12"

fail() {
  echo "setup needs Python $want: $1" >&2
  echo "Install it (apt, dnf, pyenv, conda or 'uv python install $want') or pass PYTHON=/path/to/python$want" >&2
  exit 1
}

# A shim that says "command not found" is no Python, nor is one that lacks venv's ensurepip of use here.
answers() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$want')" >/dev/null 2>&1; }

if [[ -n $given ]]; then
  answers "$given" || fail "PYTHON='$given' is $("$given" --version 2>&1 || echo 'no Python')"
  found=$given
else
  found=""
  # pyenv's shims answer for one version alone; the others lie beside them
  shims=$(command -v "python$want" || true)
  for candidate in "python$want" python3 python "${shims%/shims/*}/versions/$want".*/bin/python3; do
    if answers "$candidate" && "$candidate" -c "import ensurepip" 2>/dev/null; then
      found=$candidate
      break
    fi
  done
fi

if [[ -n $found ]]; then
  "$found" -m venv "$folder"
else
  if ! uv=$(command -v uv); then
    helper=$(mktemp -d)
    trap 'rm -rf "$helper"' EXIT
    any=""
    for candidate in python3 python python3.14 python3.13 python3.11 python3.10; do
      if "$candidate" -c "import ensurepip" >/dev/null 2>&1; then
        any=$candidate
        break
      fi
    done
    [[ -n $any ]] || fail "no python$want answers here, nor uv, nor another Python with venv that could install uv"
    "$any" -m venv "$helper"
    "$helper/bin/python" -m pip install --quiet "$uv_requirement" || fail "none answers here, and uv, which looks for one, could not be installed"
    uv=$helper/bin/uv
  fi
  echo "no python$want answers here: uv looks for one, or fetches it" >&2
  "$uv" venv --quiet --seed --python "$want" --allow-existing "$folder" || fail "none answers here, and uv neither found nor could fetch one"
fi
"$folder/bin/python" -m pip install --quiet "$uv_requirement"
