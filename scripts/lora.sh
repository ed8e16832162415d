#!/bin/sh
# scripts/ba-lora.sh with the method lora.
#
#     sh scripts/lora.sh [CONFIG] [key=value …]
set -eu
exec sh "$(dirname -- "$0")/ba-lora.sh" --method lora "$@"
