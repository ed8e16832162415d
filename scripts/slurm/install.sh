#!/bin/sh
# A Slurm for tests: installs slurm-wlm and munge by apt (Debian, Ubuntu; as root). tests/support/slurm.py starts one
# node of it in a temporary folder; nothing is started here, and no service.
#
#     sh scripts/slurm/install.sh
set -eu
if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then exit 0; fi
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || {
    echo "error: slurmctld, slurmd and munged are needed: install them by your system's packages, as root" >&2
    exit 1
}
POLICY=/usr/sbin/policy-rc.d # keeps the packages from starting their services
if [ ! -e $POLICY ]; then
    printf '#!/bin/sh\nexit 101\n' >$POLICY
    chmod +x $POLICY
    trap 'rm -f $POLICY' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install -y --no-install-recommends slurm-wlm munge || { apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; }
