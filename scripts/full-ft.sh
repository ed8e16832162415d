#!/bin/sh
# scripts/ba-lora.sh with the method full_ft.
#
#     sh scripts/full-ft.sh [CONFIG] [key=value …]
set -eu
exec sh "$(dirname -- "$0")/ba-lora.sh" --method full_ft "$@"
