# shellcheck shell=bash
# What the scripts beside this file share. It is sourced, never run:
#
#   . "$(dirname "$0")/lib.sh"
#
# It sets $repo (the repository, absolute) and defines say, die, shown and need_packages.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# say TEXT...: one line to stderr, so that stdout stays the command's own.
say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# die TEXT...: say it and exit, with status $die_status if that is set, else 1.
die() {
    say "$@"
    exit "${die_status:-1}"
}

# shown PATH: the path as a person wants to read it, relative to the repository where it is inside.
shown() {
    case $1 in
        "$repo"/*) printf '%s\n' "${1#"$repo"/}" ;;
        *) printf '%s\n' "$1" ;;
    esac
}

# need_packages PACKAGE...: installs those of the named Debian packages that are missing.
need_packages() {
    local package log apt
    local -a missing=()

    for package in dpkg-query apt-get; do
        command -v "$package" >/dev/null || die "there is no $package here: this needs Debian"
    done
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            missing+=("$package")
    done
    ((${#missing[@]})) || return 0

    ((EUID == 0)) ||
        die "missing packages, and only root can install them: apt-get install ${missing[*]}"
    say "installing packages that are missing: ${missing[*]}"
    log=$(mktemp)
    apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
    # The lists may be absent (a fresh container) or older than the archive: both show as a failed
    # install, so the update is done only then. The first round's error would only confuse.
    if ! "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
        if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; } \
            >"$log" 2>&1; then
            tail -n 20 "$log" | sed 's|://[^/ ]*|://...|' >&2
            rm -f "$log"
            die "apt-get could not install ${missing[*]}"
        fi
    fi
    rm -f "$log"
}
