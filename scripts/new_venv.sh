#!/usr/bin/env bash
# new_venv.sh FOLDER INTERPRETER [OPTION...]   Makes a virtual environment anew, with a recent pip. OPTIONs
# are those of `python -m venv`.
set -euo pipefail
folder=${1:?usage: scripts/new_venv.sh FOLDER INTERPRETER [OPTION...]}
interpreter=${2:?usage: scripts/new_venv.sh FOLDER INTERPRETER [OPTION...]}
"$interpreter" -m venv --clear "${@:3}" "$folder"
# The pip that Pythons bring takes minutes of CPU time to look through an index; a newer one seconds.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip ||
  echo "setup: pip stays at the version that Python brought, and takes longer" >&2
