# Sourced by the scripts in this folder and by .ci/run: `ensure_environment EXTRA...` makes the
# virtual environment .venv in the repository root and installs sparsemem[EXTRA,...] into it,
# editable, under constraints.txt. What was installed is stamped, so that running again reuses it.
#
# Sets: root (the repository), venv, python (the environment's interpreter).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)
venv=$root/.venv
python=$venv/bin/python
# Without bytecode on the disk, each of the hundreds of processes that tests start would compile the
# package for itself: a second each.
unset PYTHONDONTWRITEBYTECODE

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# True for a Python 3.11+ that can make virtual environments with pip.
is_suitable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if is_suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no suitable Python among: ${candidates[*]}." \
    "Python 3.11 or newer with its venv module is needed (on Debian and Ubuntu: apt install" \
    "python3-venv). Name another one with PYTHON=/path/to/python."
}

# A folder whose creation was interrupted is made anew; one that somebody else made is kept, or
# refused if it will not do.
ensure_venv() {
  local unfinished=$root/.venv.unfinished
  if [ -e "$unfinished" ]; then rm -rf "$venv"; fi
  if [ ! -e "$venv" ]; then
    local base
    base=$(find_python) || exit
    echo "Creating .venv with $("$base" --version)"
    touch "$unfinished"
    "$base" -m venv "$venv" || fail "$base -m venv failed"
  fi
  if ! is_suitable "$python" || ! "$python" -m pip --version >/dev/null 2>&1; then
    fail "$venv is not an environment with Python 3.11+ and pip. Remove it and run this again."
  fi
  rm -f "$unfinished"
}

# What decides whether an installation is still good. The path is in it because an editable install
# and the console script hold it.
fingerprint() {
  { echo "$root"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | cksum
}

# The stamp's first line is the fingerprint, the second the extras installed so far. It is removed
# before an installation and written after it: an interrupted one leaves no stamp.
ensure_installed() {
  local stamp=$venv/.sparsemem-installed old_print="" extras="" extra
  if [ -e "$stamp" ]; then { read -r old_print; read -r extras; } <"$stamp"; fi
  local wanted=$extras
  for extra in "$@"; do
    case " $wanted " in *" $extra "*) ;; *) wanted="${wanted:+$wanted }$extra" ;; esac
  done
  if [ "$old_print" = "$(fingerprint)" ] && [ "$extras" = "$wanted" ]; then return; fi
  echo "Installing sparsemem[${wanted// /,}] into .venv (the first time takes a minute or more)"
  rm -f "$stamp"
  "$python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "${root}[${wanted// /,}]" \
    || fail "the installation failed; run this again to go on"
  printf '%s\n%s\n' "$(fingerprint)" "$wanted" >"$stamp"
}

ensure_environment() {
  # Two scripts at once take turns, where the system can lock.
  exec 9>"$root/.venv.lock"
  if command -v flock >/dev/null; then flock 9; fi
  ensure_venv
  ensure_installed "$@"
  exec 9>&-
}
