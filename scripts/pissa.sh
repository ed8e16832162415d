#!/bin/sh
# scripts/ba-lora.sh with the method pissa.
#
#     sh scripts/pissa.sh [CONFIG] [key=value …]
set -eu
exec sh "$(dirname -- "$0")/ba-lora.sh" --method pissa "$@"
