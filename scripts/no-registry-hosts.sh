#!/usr/bin/env bash
# A package registry's host name has no place in the tree: pins are names and versions, the registry is the machine's.
set -euo pipefail
cd "$(dirname "$0")/.."
git rev-parse --git-dir >/dev/null 2>&1 || exit 0
pattern=$(printf '%s\\.%s|' pypi org pythonhosted org npmjs org npmjs com)
if git grep -nIE -- "${pattern%|}" -- .; then
    echo "a package registry's host is named above: remove it" >&2
    exit 1
fi
