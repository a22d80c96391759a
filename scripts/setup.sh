#!/usr/bin/env bash
# Installs what is missing and nothing else: `setup.sh serve|ceph|test|bench`; ceph is serve with a cluster to try.
# Quick when nothing is missing; safe to run again after it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
purpose=${1:-serve}

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# shellcheck source=/dev/null
. /etc/os-release
[ "${ID:-}" = debian ] || fail "this needs Debian 12 or 13 (found ${PRETTY_NAME:-an unknown system}); install the packages named in scripts/setup.sh by hand and call the .venv part yourself"

packages=(python3 python3-venv util-linux qemu-utils ca-certificates gzip xz-utils zstd tgt fuse3 samba samba-common-bin smbclient libnss-wrapper make gcc libc6-dev)
packages+=(rsync rclone)
# Debian's, unless there is one from elsewhere, which may be newer. They build the web page.
command -v node >/dev/null || packages+=(nodejs)
command -v npm >/dev/null || packages+=(npm)
case $purpose in
# The bindings of Ceph for Debian's own Python, which no registry offers, and what lets QEMU open rbd images.
ceph) packages+=(ceph-mon ceph-osd ceph-mgr ceph-common python3-rados python3-rbd qemu-block-extra) ;;
serve) ;;
*) packages+=(python3-rados python3-rbd) ;;
esac
if [ "$purpose" = ceph ]; then purpose=serve; fi
if [ "$purpose" != serve ]; then
    packages+=(bindfs e2fsprogs mount openssl procps iproute2 qemu-block-extra libiscsi-bin libnbd-bin fio gnutls-bin)
    packages+=(xfsprogs btrfs-progs prometheus systemd libvirt-daemon libvirt-daemon-driver-qemu)
    packages+=(ceph-mon ceph-osd ceph-mgr ceph-common)
    packages+=(curl debootstrap xorriso qemu-system-x86 libvirt-clients libxml2-utils)
    packages+=(chromium)
fi
if [ "$purpose" = bench ]; then packages+=(libvirt-daemon libvirt-clients wrk curl python3-dev); fi

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
# QEMU 10: versions before it lose data in ways docs/operations.md lists.
recent() { installed "$1" && dpkg --compare-versions "$(dpkg-query -W -f '${Version}' "$1")" ge 1:10; }
qemu_is_recent() {
    for package in "${packages[@]}"; do
        case $package in qemu-*) recent "$package" || return 1 ;; esac
    done
}

missing=()
for package in "${packages[@]}"; do
    case $package in
    qemu-*) recent "$package" || missing+=("$package") ;;
    *) installed "$package" || missing+=("$package") ;;
    esac
done

if [ ${#missing[@]} -gt 0 ]; then
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || fail "these packages are missing: ${missing[*]}; run this as root, or install sudo"
        as_root=(sudo)
    fi
    say "installing ${missing[*]}"
    release=()
    if [ "${VERSION_ID:-}" = 12 ]; then
        release=(-t bookworm-backports)
        if ! apt-cache policy | grep -q 'n=bookworm-backports'; then
            # The mirror apt already uses for the release itself.
            mirror=$(apt-cache policy base-files | awk '$3 ~ /^bookworm\// {print $2; exit}')
            if [ -z "$mirror" ]; then
                "${as_root[@]}" apt-get update -qq
                mirror=$(apt-cache policy base-files | awk '$3 ~ /^bookworm\// {print $2; exit}')
            fi
            [ -n "$mirror" ] || fail "apt knows no mirror for bookworm: look at /etc/apt/sources.list"
            printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' "$mirror" |
                "${as_root[@]}" tee /etc/apt/sources.list.d/elemento-storage-backports.sources >/dev/null
        fi
    fi
    "${as_root[@]}" apt-get update -qq
    plain=() recent=()
    for package in "${missing[@]}"; do
        case $package in qemu-*) recent+=("$package") ;; *) plain+=("$package") ;; esac
    done
    # tgt and samba start services of their own when they are installed; ours run private ones.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee /usr/sbin/policy-rc.d >/dev/null
        "${as_root[@]}" chmod +x /usr/sbin/policy-rc.d
        trap '"${as_root[@]}" rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt_install() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2; }
    [ ${#plain[@]} -eq 0 ] || apt_install "${plain[@]}"
    [ ${#recent[@]} -eq 0 ] || apt_install "${release[@]}" "${recent[@]}"
    qemu_is_recent || fail "qemu-utils is $(dpkg-query -W -f '${Version}' qemu-utils), 10.0 or newer is needed"
fi

# Debian's own Python: its site packages hold the Ceph bindings, which no registry offers.
requirements=(requirements.txt)
[ "$purpose" = serve ] || requirements+=(requirements-dev.txt)
for file in "${requirements[@]}"; do
    wanted=$(cat "$file" pyproject.toml | sha256sum | cut -d' ' -f1)
    stamp=.venv/.installed-${file%.txt}
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && head -1 .venv/bin/elemento-storage 2>/dev/null | grep -qF "$PWD/.venv"; then
        continue
    fi
    say "installing $file into .venv"
    [ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null || { rm -rf .venv; /usr/bin/python3 -m venv --system-site-packages .venv; }
    pip=(.venv/bin/python -m pip install -qq --disable-pip-version-check)
    # With the versions of the first file where the second one's packages need the same.
    "${pip[@]}" --ignore-installed -r "$file" -c requirements.txt
    # Without isolation it needs no network; Debian 13's venv has no setuptools, there pip fetches it.
    "${pip[@]}" --force-reinstall --no-deps --no-build-isolation -e . 2>/dev/null || "${pip[@]}" --force-reinstall --no-deps -e .
    echo "$wanted" >"$stamp"
done

# Programs that the tests run as they are published, each in an environment of its own: they want other versions of what
# we use. The vendor's command line, against the gateway (it keeps its cookie beside its code); Ansible, with our modules.
if [ "$purpose" != serve ]; then
    for name in vendor-cli ansible; do
        wanted=$(sha256sum <"requirements-$name.txt" | cut -d' ' -f1)
        stamp=.venv/$name/.installed
        if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || ! head -1 ".venv/$name/bin/pip" | grep -qF "$PWD/.venv"; then
            say "installing requirements-$name.txt into .venv/$name"
            rm -rf ".venv/$name"
            /usr/bin/python3 -m venv ".venv/$name"
            ".venv/$name/bin/python" -m pip install -qq --disable-pip-version-check -r "requirements-$name.txt"
            echo "$wanted" >"$stamp"
        fi
    done
fi
npm_install() {
    local wanted stamp=$1/node_modules/.installed
    wanted=$(sha256sum <"$1/package-lock.json" | cut -d' ' -f1)
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
    say "installing $1"
    npm --prefix "$1" ci --ignore-scripts --no-audit --no-fund --loglevel=error >&2 && echo "$wanted" >"$stamp"
}

# What the bench measures against, in an environment of its own.
if [ "$purpose" = bench ]; then
    wanted=$(sha256sum <bench/requirements-imageio.txt)
    stamp=build/imageio/.installed
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing bench/requirements-imageio.txt into build/imageio"
        rm -rf build/imageio
        /usr/bin/python3 -m venv build/imageio
        build/imageio/bin/python -m pip install -qq --disable-pip-version-check -r bench/requirements-imageio.txt
        echo "$wanted" >"$stamp"
    fi
fi

# Clients in JavaScript that the tests run as they are published.
[ "$purpose" = serve ] || npm_install tests/js

# The web page, built again when its sources or the API's types are others.
build_page() {
    local page=src/elemento_storage/page document=build/openapi.json wanted
    local -a sources=(find web src/elemento_storage -type d '(' -name node_modules -o -name page -o -name __pycache__ ')' -prune -o -type f)
    if [ -e "$page/.built" ] && [ -z "$("${sources[@]}" ! -name schema.d.ts -newer "$page/.built" -print -quit)" ]; then
        return 0
    fi
    mkdir -p build
    .venv/bin/python -c 'import sys; from elemento_storage.api import app, openapi
sys.stdout.buffer.write(openapi.to_json(openapi.document(app.CALLS, app.ROUTES, "/api/v1.0")))' >"$document" || return
    wanted=$({ find web -name node_modules -prune -o -type f ! -name schema.d.ts -print0 | sort -z | xargs -0 sha256sum && cat "$document"; } | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$page/.built" 2>/dev/null)" != "$wanted" ] || [ ! -e web/src/api/schema.d.ts ]; then
        npm_install web && say "building web" && node web/build.mjs "$document" "$PWD/$page" >&2 || return
    fi
    echo "$wanted" >"$page/.built"
}
build_page || say "web/ was not built: the server runs without its page"

# Lets tgtd serve qcow2 images without a detour over FUSE; the server runs without it too, slower.
make --quiet -C native || say "native/ was not built: iSCSI on qcow2 goes over FUSE, which is slower"
