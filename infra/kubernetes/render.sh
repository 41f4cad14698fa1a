#!/usr/bin/env bash
# Writes jobs/backends/rendered/*.yaml: what `kubectl kustomize` makes of each overlay. They are committed, so that `unlearn submit` needs no
# kubectl. After any change in this folder: bash infra/kubernetes/render.sh [FOLDER to write to]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
to=$(realpath "${1:-../../jobs/backends/rendered}")
for overlay in overlays/*/; do
    name=$(basename "$overlay")
    { echo "# Made by infra/kubernetes/render.sh of overlays/$name, which says why; change it there."; kubectl kustomize "$overlay"; } > "$to/$name.yaml.new"
    mv "$to/$name.yaml.new" "$to/$name.yaml"
done
