#!/usr/bin/env bash
# Builds build/deb/elemento-storage_<version>_<architecture>.deb for the Debian it runs on. Needs what `setup.sh serve`
# installs. Prints the package's path.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022

say() { printf 'deb: %s\n' "$*" >&2; }

# shellcheck source=/dev/null
. /etc/os-release
python=/usr/bin/python3
minor=$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=$($python -c 'import sys; print("%d.%d" % (sys.version_info[0], sys.version_info[1] + 1))')
upstream=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' src/elemento_storage/__init__.py)
version=$upstream+deb${VERSION_ID:?}
architecture=$(dpkg --print-architecture)
package=build/deb/elemento-storage_${version}_$architecture.deb
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

mkdir -p build/deb
work=$(mktemp -d build/deb/work.XXXXXX)
trap 'rm -rf "$work"' EXIT
root=$work/root
site=$root/usr/lib/elemento-storage

# The pinned packages as they are in .venv: what was tested is what is shipped.
say "packages of requirements.txt"
mkdir -p "$site"
.venv/bin/python - "$site" <<'PYTHON'
import importlib.metadata, pathlib, re, shutil, sys

site = pathlib.Path(sys.argv[1])
for line in pathlib.Path("requirements.txt").read_text().split():
    name, version = line.split("==")
    distribution = importlib.metadata.distribution(name)
    if distribution.version != version:
        sys.exit(f"deb: .venv has {name} {distribution.version} and not {version}: run make setup")
    for file in distribution.files or []:
        if ".." in file.parts or "__pycache__" in file.parts or file.name in ("RECORD", "REQUESTED", "direct_url.json"):
            continue  # programs and what only pip reads
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.locate(), target)
PYTHON
cp -R src/elemento_storage "$site/"
find "$site" -name __pycache__ -type d -prune -exec rm -rf {} +
find "$site/elemento_storage" -name '*.so' -delete
make --quiet -C native out="$PWD/$site/elemento_storage/native"
# Not looked at again at run time, so that no clock and no upgrade in place can make them stale.
$python -m compileall -q -s "$root" --invalidation-mode unchecked-hash "$site"

say "files"
install -D -m 755 packaging/debian/launcher "$root/usr/bin/elemento-storage"
for unit in elemento-storage elemento-storage-gateway; do
    sed 's|/opt/elemento-storage/.venv/bin/|/usr/bin/|' "packaging/$unit.service" |
        install -D -m 644 /dev/stdin "$root/lib/systemd/system/$unit.service"
done
install -D -m 644 packaging/elemento-storage.toml "$root/etc/elemento-storage.toml"
docs=$root/usr/share/doc/elemento-storage
install -D -m 644 -t "$docs" README.md LICENSE docs/*.md
install -D -m 644 -t "$docs/examples" packaging/elemento-storage-gateway.toml
cp -R packaging/prometheus packaging/grafana examples/libvirt "$docs/examples/"
gzip -9n <CHANGELOG.md >"$docs/changelog.gz"
{
    printf 'The Elemento Storage Server is licensed under the Apache License 2.0, see LICENSE.\n'
    printf 'Packages that it brings along, below /usr/lib/elemento-storage; their licences are in *.dist-info:\n\n'
    sed 's/^/  /' requirements.txt
} >"$docs/copyright"

mkdir "$root/DEBIAN"
cp packaging/debian/conffiles "$root/DEBIAN/"
for script in postinst prerm postrm; do install -m 755 "packaging/debian/$script" "$root/DEBIAN/$script"; done
(cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
sed -e "s|@VERSION@|$version|" -e "s|@ARCHITECTURE@|$architecture|" -e "s|@PYTHON@|$minor|" \
    -e "s|@PYTHON_NEXT@|$next|" -e "s|@SIZE@|$(du -sk "$root" | cut -f1)|" packaging/debian/control.in >"$root/DEBIAN/control"
chmod -R u=rwX,go=rX "$root"
find "$root" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

dpkg-deb --root-owner-group -Zgzip --build "$root" "$work/package.deb" >/dev/null
mv "$work/package.deb" "$package"
echo "$package"
